"""The one place where a checkpoint meets a model."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from runner.checkpoints.checkpoint import Checkpoint
from runner.checkpoints.detect import open_checkpoint
from runner.checkpoints.runs import resolve
from runner.errors import CheckpointError, ConfigError, ModelError
from runner.evaluation.base_models import Base, build_plain, load_base, torch_device, torch_dtype
from runner.evaluation.placement import DeviceMap, follow, is_spread
from runner.families.gpt import model as gpt
from runner.families.gpt.layouts import GptDetails
from runner.families.hf.checkpoint import HfDetails
from runner.families.lora.adapter import AdapterDetails, check_fit, read_factors
from runner.families.lora_moe.checkpoint import MoeDetails, check_base, read_experts, read_router
from runner.families.npt import checkpoint as npt_delta
from runner.families.npt.full import NptFullDetails
from runner.families.npt.model import NptDecoderLayer, NptLlamaForCausalLM, RankKUpdate
from runner.files.tensors import is_finite, non_finite

# On a CPU, oneDNN's native bfloat16 instructions round otherwise than the programs did that wrote the files (by 0.03 on
# the mean logit of a GPT); without them the logits are bit-equal, in the time that float32 takes. oneDNN reads this
# once, before the first product of a process.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")


def load(
    path: str | Path,
    *,
    base: str | Path | None = None,
    device: str = "auto",
    dtype: str = "float32",
    device_map: DeviceMap | None = None,
    format: str = "auto",
    step: int | None = None,
) -> nn.Module:
    """The checkpoint at `path` as a module: `model(input_ids, attention_mask=None).logits` is [B, T, V].

    `base`: the model it needs to run (a directory or a hub name), by default the one that the checkpoint names.
    `dtype`: float32, bfloat16, float16, or "stored" (that of the embedding). `device_map`: auto, or
    module → device: spread a Llama base over devices. `step` chooses from a run directory.
    Raises CheckpointError, ModelError or ConfigError, each with one line that says what to do.
    """
    checkpoint = open_checkpoint(resolve(Path(path).expanduser(), step), format)
    options: dict[str, Any] = {"device": device, "dtype": dtype, "device_map": device_map}
    return build(checkpoint, own_base(checkpoint, base, **options), **options)


def own_base(
    checkpoint: Checkpoint, base: str | Path | None, *, device: str, dtype: str, device_map: DeviceMap | None = None
) -> Base | None:
    """The base model that the checkpoint's format needs to run; None for a format that is complete by itself."""
    if device_map is not None and not _can_be_spread(checkpoint):
        raise ConfigError(
            f"family.device_map: a checkpoint of the format {checkpoint.format} runs on one device; give device="
        )
    if _is_delta(checkpoint):
        return load_base(checkpoint, base, device=device, dtype=dtype, device_map=device_map, llama=True)
    if isinstance(checkpoint.details, (MoeDetails, AdapterDetails)):
        return load_base(checkpoint, base, device=device, dtype=dtype)
    return None


def build(
    checkpoint: Checkpoint,
    base: Base | None,
    *,
    device: str = "auto",
    dtype: str = "float32",
    device_map: DeviceMap | None = None,
    routing: Mapping[str, Any] | None = None,
) -> nn.Module:
    """The checkpoint's model in evaluation mode; where it stands on `base` it shares the base's weights.

    `routing`: options of `LoraMoeForCausalLM` that take the place of the checkpoint's own (top_k, router_features).
    Raises ModelError where the two do not fit, CheckpointError for NaN or Inf, which would make figures meaningless.
    """
    details = checkpoint.details
    checkpoint.require_complete()
    if base is not None:
        if isinstance(details, MoeDetails):
            return _build_moe(checkpoint, details, base, routing or {})
        return _build_adapter(checkpoint, base) if isinstance(details, AdapterDetails) else build_npt(checkpoint, base)
    where = torch_device(device)
    if isinstance(details, GptDetails):
        return _build_gpt(checkpoint, details, torch_dtype(dtype, checkpoint.weights, "embed.weight"), where)
    target = torch_dtype(dtype, checkpoint.weights)
    if isinstance(details, NptFullDetails):
        names = [name for name in checkpoint.weights.infos if name not in details.adapter_keys]
        plain = build_plain(details.config, checkpoint.weights, names, target, where, device_map)
        return _npt(plain, npt_updates(checkpoint, target, where))
    if isinstance(details, HfDetails):
        return build_plain(details.config, checkpoint.weights, checkpoint.weights.infos, target, where, device_map)
    raise ModelError(f"{checkpoint.path}: a checkpoint of the format {checkpoint.format} has no model here")


def _build_gpt(checkpoint: Checkpoint, details: GptDetails, dtype: torch.dtype, device: torch.device) -> nn.Module:
    config = gpt.GptConfig(**{each.name: getattr(details, each.name) for each in fields(gpt.GptConfig)})
    model = gpt.build(config, {name: checkpoint.weights.read(name) for name in details.keys}, dtype, device)
    _require_finite(checkpoint, model.parameters(), dtype)
    return model


def _build_moe(checkpoint: Checkpoint, details: MoeDetails, base: Base, routing: Mapping[str, Any]) -> nn.Module:
    from runner.families.lora.model import linear_shapes
    from runner.families.lora_moe.model import LoraMoeForCausalLM

    model = base.model
    check_base(checkpoint, linear_shapes(model), model.config.hidden_size, base.path)
    options = {"top_k": details.top_k, "temperature": details.temperature, **routing}
    experts = read_experts(checkpoint, dtype=model.dtype, device=model.device)
    router = read_router(checkpoint, dtype=model.dtype, device=model.device)
    return LoraMoeForCausalLM(model, experts, router, **options).eval().requires_grad_(False)


def _build_adapter(checkpoint: Checkpoint, base: Base) -> nn.Module:
    from runner.families.lora.model import linear_shapes
    from runner.families.lora_moe.model import LoraForCausalLM

    model, details = base.model, checkpoint.details
    check_fit(details, linear_shapes(model), base.path)
    factors = read_factors(checkpoint.weights, details, dtype=model.dtype, device=model.device)
    return LoraForCausalLM(model, [factors]).eval().requires_grad_(False)


def _can_be_spread(checkpoint: Checkpoint) -> bool:
    return _is_delta(checkpoint) or isinstance(checkpoint.details, (HfDetails, NptFullDetails))


def _is_delta(checkpoint: Checkpoint) -> bool:
    """Whether it holds NPT layers and nothing else, in whatever format."""
    return bool(checkpoint.layers) and not isinstance(checkpoint.details, NptFullDetails)


def build_npt(checkpoint: Checkpoint, base: Base) -> NptLlamaForCausalLM:
    """The model of an npt_delta checkpoint on its base. Raises the errors of `build`."""
    checkpoint.require_complete()
    _check_fit(checkpoint, base)
    return _npt(base.model, npt_updates(checkpoint, base.model.dtype, base.model.device))


def _npt(plain: PreTrainedModel, updates: Mapping[int, Mapping[str, RankKUpdate]]) -> NptLlamaForCausalLM:
    model = NptLlamaForCausalLM(plain, updates)
    if is_spread(plain):
        for layer in model.npt_layers.values():
            layer.updates.to(layer.mlp.down_proj.weight.device)
            follow(layer)
    model.eval().requires_grad_(False)
    return model


def _check_fit(checkpoint: Checkpoint, base: Base) -> None:
    config = base.model.config
    for layer in checkpoint.layers:
        if layer.layer >= config.num_hidden_layers:
            raise ModelError(
                f"{checkpoint.path}: has NPT layer {layer.layer}, but the base {base.path} has only the layers 0 to "
                f"{config.num_hidden_layers - 1}; give its own base model as base="
            )
        sizes, expected = (layer.hidden_size, layer.intermediate_size), (config.hidden_size, config.intermediate_size)
        if sizes != expected:
            raise ModelError(
                f"{checkpoint.path}: NPT layer {layer.layer} is made for hidden size {sizes[0]} and MLP size "
                f"{sizes[1]}, but the base {base.path} has {expected[0]} and {expected[1]}; give its own base as base="
            )


def npt_updates(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> dict[int, dict[str, RankKUpdate]]:
    """The rank-k updates of every NPT layer, by layer and projection. Raises CheckpointError for NaN or Inf."""
    full = checkpoint.details if isinstance(checkpoint.details, NptFullDetails) else None

    def matrices(names: tuple[str, ...]) -> list[torch.Tensor]:
        tensors = [checkpoint.weights.read(name).to(device=device, dtype=dtype) for name in names]
        return [tensor.T for tensor in tensors] if full else tensors  # npt_full stores Linear weights: transposed

    updates = {
        layer.layer: {
            projection: RankKUpdate(
                matrices(keys["W_down"]),
                matrices(keys["W_a_up"]),
                matrices(keys["W_b_up"]),
                full.scale if full else 1.0,
            )
            for projection, keys in layer.keys.items()
        }
        for layer in checkpoint.layers
    }
    made = (p for projections in updates.values() for update in projections.values() for p in update.parameters())
    _require_finite(checkpoint, made, dtype)
    return updates


def _require_finite(checkpoint: Checkpoint, parameters: Iterable[torch.Tensor], dtype: torch.dtype) -> None:
    """Raise CheckpointError, with the names in the file, where a parameter made from it holds NaN or Inf."""
    if all(map(is_finite, parameters)):
        return
    bad = non_finite(checkpoint.weights)
    what = f"NaN or Inf in {', '.join(bad[:5])}{' …' if len(bad) > 5 else ''}" if bad else f"a value overflows {dtype}"
    raise CheckpointError(f"{checkpoint.path}: {what}")


def npt_tensors(model: NptLlamaForCausalLM) -> dict[str, torch.Tensor]:
    """The NPT weights of `model` under the names that npt_delta saves: the inverse of `npt_updates`."""
    return {
        npt_delta.key(index, layer.modulation, projection, matrix, rank, update.num_ranks): tensor
        for index, layer in model.npt_layers.items()
        for projection, update in _projections(layer).items()
        for matrix, tensors in zip(npt_delta.MATRICES, update.matrices(), strict=True)
        for rank, tensor in enumerate(tensors)
    }


def _projections(layer: NptDecoderLayer) -> dict[str, RankKUpdate]:
    return {name: update for name, update in layer.updates.items() if isinstance(update, RankKUpdate)}
