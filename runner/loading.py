"""The one place where a checkpoint meets a model."""

from collections.abc import Mapping
from pathlib import Path

import torch

from runner.bases import Base, load_base
from runner.checkpoints import npt_delta
from runner.checkpoints.checkpoint import Checkpoint
from runner.checkpoints.detect import open_checkpoint
from runner.checkpoints.runs import resolve
from runner.checkpoints.tensors import is_finite, non_finite
from runner.errors import CheckpointError, ModelError
from runner.models.npt_llama import NptDecoderLayer, NptLlamaForCausalLM, RankKUpdate


def load(
    path: str | Path,
    *,
    base: str | Path | None = None,
    device: str = "auto",
    dtype: str = "float32",
    format: str = "auto",
    step: int | None = None,
) -> NptLlamaForCausalLM:
    """The checkpoint at `path` as a module: `model(input_ids, attention_mask=None).logits` is [B, T, V].

    `base`: the model it needs to run (a directory or a hub name), by default the one that the checkpoint names.
    `dtype`: float32, bfloat16, float16, or "stored" (the base's own). `step` chooses from a run directory.
    Raises CheckpointError, ModelError or ConfigError, each with one line that says what to do.
    """
    checkpoint = open_checkpoint(resolve(Path(path), step), format)
    return build(checkpoint, load_base(checkpoint, base, device=device, dtype=dtype))


def build(checkpoint: Checkpoint, base: Base) -> NptLlamaForCausalLM:
    """The checkpoint's model on `base`, whose weights it shares. Raises ModelError where the two do not fit.

    Raises CheckpointError for weights with NaN or Inf, which would make every figure meaningless.
    """
    _check_fit(checkpoint, base)
    updates = npt_updates(checkpoint, base.model.dtype, base.model.device)
    return NptLlamaForCausalLM(base.model, updates).eval().requires_grad_(False)


def _check_fit(checkpoint: Checkpoint, base: Base) -> None:
    config = base.model.config
    for layer in checkpoint.layers:
        if layer.layer >= config.num_hidden_layers:
            raise ModelError(
                f"{checkpoint.path}: has NPT layer {layer.layer}, but the base {base.path} has only the layers 0 to "
                f"{config.num_hidden_layers - 1}; give its own base as base="
            )
        sizes, expected = (layer.hidden_size, layer.intermediate_size), (config.hidden_size, config.intermediate_size)
        if sizes != expected:
            raise ModelError(
                f"{checkpoint.path}: NPT layer {layer.layer} is made for hidden size {sizes[0]} and MLP size "
                f"{sizes[1]}, but the base {base.path} has {expected[0]} and {expected[1]}; give its own base as base="
            )


def npt_updates(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> dict[int, dict[str, RankKUpdate]]:
    """The rank-k updates of every NPT layer, by layer and projection. Raises CheckpointError for NaN or Inf."""

    def matrices(names: tuple[str, ...]) -> list[torch.Tensor]:
        return [checkpoint.weights.read(name).to(device=device, dtype=dtype) for name in names]

    updates = {
        layer.layer: {
            projection: RankKUpdate(*(matrices(keys[matrix]) for matrix in npt_delta.MATRICES))
            for projection, keys in layer.keys.items()
        }
        for layer in checkpoint.layers
    }
    parameters = [p for projections in updates.values() for update in projections.values() for p in update.parameters()]
    if not all(map(is_finite, parameters)):
        bad = non_finite(checkpoint.weights)
        what = (
            f"NaN or Inf in {', '.join(bad[:5])}{' …' if len(bad) > 5 else ''}" if bad else f"a value overflows {dtype}"
        )
        raise CheckpointError(f"{checkpoint.path}: {what}")
    return updates


def npt_tensors(model: NptLlamaForCausalLM) -> dict[str, torch.Tensor]:
    """The NPT weights of `model` under the names that npt_delta saves: the inverse of `npt_updates`."""
    return {
        npt_delta.key(index, layer.modulation, projection, matrix, rank, update.num_ranks): tensor
        for index, layer in model.npt_layers.items()
        for projection, update in _projections(layer).items()
        for matrix, tensors in zip(npt_delta.MATRICES, update.matrices(), strict=True)
        for rank, tensor in enumerate(tensors)
    }


def _projections(layer: NptDecoderLayer) -> Mapping[str, RankKUpdate]:
    return {name: update for name, update in layer.updates.items() if isinstance(update, RankKUpdate)}
