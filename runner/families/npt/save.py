"""What writes NPT checkpoints: a model in memory, a conversion, and the optimizer's state beside trained weights."""

import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from runner.checkpoints import model_directory
from runner.checkpoints.checkpoint import Checkpoint, Expected, tensor_readers
from runner.errors import ModelError
from runner.families.npt import checkpoint as npt_delta
from runner.families.npt import full
from runner.families.npt.model import NptLlamaForCausalLM, RankKUpdate, npt_tensors
from runner.files.archive import require_crc
from runner.files.staging import staged
from runner.files.tensors import TensorSource

# What is copied beside converted NPT weights, and beside a base taken out of an npt_full.
_BESIDE_DELTA = (npt_delta.TRAINING_STATE, npt_delta.MULTI_LAYER_STATE, npt_delta.MERGE_SUMMARY)
BESIDE_MODEL = (
    "generation_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt",
    *model_directory.TOKENIZER_FILES,
)  # fmt: skip


def save_delta(checkpoint: Checkpoint, model: NptLlamaForCausalLM, base: Path | None, target: Path) -> None:
    """Write the NPT weights of `model`, over the base at `base`, as the directory `target`."""
    state = {"global_step": checkpoint.step} if checkpoint.step is not None else None
    config = {"model_name": str(base.resolve()) if base else ""}
    with staged(target) as directory:
        npt_delta.save(directory, npt_tensors(model), training_state=state, multi_layer_state=None, config=config)


def save_full(checkpoint: Checkpoint, model: NptLlamaForCausalLM, target: Path) -> None:
    """Write `model`, base and adapters together, as the directory `target`."""
    details: full.NptFullDetails = checkpoint.details
    tensors, own = model_directory.stored_tensors(checkpoint, model), npt_tensors(model)
    for layer in checkpoint.layers:
        for matrix, names in layer.keys["gate"].items():
            # Linear weights: transposed to what npt_delta has.
            tensors[names[0]] = own[npt_delta.key(layer.layer, "single", "gate", matrix, 0, 1)].T
    info = checkpoint.directory / full.TRAINING_INFO
    with staged(target) as directory:
        model_directory.save(directory, tensors, config=details.config, beside=[info] if info.is_file() else [])


def convert_delta(checkpoint: Checkpoint, to: str, target: Path, directory: Path) -> Expected:
    """Write the same names and tensors in the container `to` into `directory`, which becomes `target`."""
    read = tensor_readers(checkpoint.weights)
    config = dict(checkpoint.training["config"])
    if base := checkpoint.local_base():
        config["model_name"] = os.path.relpath(base, target)  # the old relative name would lead nowhere from there
    npt_delta.save(
        directory,
        {name: get() for name, get in read.items()},
        training_state=None,
        multi_layer_state=None,
        config=config,
        weights_file=f"npt_weights.{to}",
    )
    if checkpoint.path.is_dir():
        _copy(checkpoint.path, directory, _BESIDE_DELTA)
    return {".": read}


def take_apart(checkpoint: Checkpoint, directory: Path) -> Expected:
    """Write an npt_full as `base/`, a plain model, and `adapters/`, an npt_delta. The scale goes into W_b_up."""
    details: full.NptFullDetails = checkpoint.details
    base, adapters = directory / "base", directory / "adapters"
    base.mkdir()
    adapters.mkdir()
    plain = {n: get for n, get in tensor_readers(checkpoint.weights).items() if n not in details.adapter_keys}
    tensors = {name: get().contiguous() for name, get in plain.items()}
    save_file(tensors, base / model_directory.SINGLE[0], metadata={"format": "pt"})
    model_directory.write_config(base, details.config)
    _copy(checkpoint.path, base, BESIDE_MODEL)
    deltas = {
        npt_delta.key(layer.layer, "single", "gate", matrix, 0, 1): _delta(
            checkpoint.weights, names[0], details.scale if matrix == "W_b_up" else 1.0
        )
        for layer in checkpoint.layers
        for matrix, names in layer.keys["gate"].items()
    }
    npt_delta.save(
        adapters,
        {name: get() for name, get in deltas.items()},
        training_state={"global_step": checkpoint.step} if checkpoint.step is not None else None,
        multi_layer_state=None,
        config={"model_name": "../base"},
        weights_file=npt_delta.WEIGHT_FILES[1],
    )
    return {"base": plain, "adapters": deltas}


def _delta(weights: TensorSource, name: str, scale: float) -> Callable[[], torch.Tensor]:
    """An adapter's Linear weight as npt_delta has it: transposed, in float32, times `scale`."""
    return lambda: weights.read(name).T.float() * scale


def _copy(source: Path, target: Path, names: tuple[str, ...]) -> None:
    for name in names:
        if (source / name).is_file():
            require_crc(source / name)
            shutil.copyfile(source / name, target / name)


def flat_optimizer_state(
    state: Mapping[str, Any],
    model: NptLlamaForCausalLM,
    *,
    trained: Collection[int] | None = None,
    kept: Mapping[str, Mapping[str, object]] | None = None,
) -> dict[str, object]:
    """A state dict over the updates' parameters → the same over the keys of the saved weights, in their order.

    The format saves every rank-1 term under a key of its own, and the i-th entry of a saved state belongs to the i-th
    key of the weights; the modules hold the k terms of a matrix stacked in one parameter. `trained`: the layers that
    the state is of (None: all); `kept`: entries of the others' keys, where there are any.
    """
    flat: dict[int, dict[str, object]] = {}
    names, index, number = list(npt_tensors(model)), 0, 0
    for layer, update, stacked_by_columns in _matrices(model):
        is_trained = trained is None or layer in trained
        entries = state["state"].get(index, {}) if is_trained else {}
        parts = {name: _split(value, update, stacked_by_columns) for name, value in entries.items()}
        for rank in range(update.num_ranks):
            entry = {name: values[rank] for name, values in parts.items()}
            if not is_trained:
                entry = dict((kept or {}).get(names[number], {}))
            if entry:
                flat[number] = entry
            number += 1
        index += is_trained
    return {"state": flat, "param_groups": [{**_only_group(state), "params": list(range(number))}]}


def stacked_optimizer_state(
    state: object, model: NptLlamaForCausalLM, *, trained: Collection[int] | None = None
) -> dict[str, object]:
    """The inverse of `flat_optimizer_state`, of a state of the layers `trained` alone.

    Raises ModelError where the state has another number of tensors.
    """
    matrices = [(u, columns) for layer, u, columns in _matrices(model) if trained is None or layer in trained]
    expected = sum(update.num_ranks for update, _ in matrices)
    if not isinstance(state, Mapping) or not isinstance(state.get("state"), Mapping):
        raise ModelError("the training state holds no state of an optimizer")
    if len(state["state"]) != expected:
        raise ModelError(
            f"the training state holds moments for {len(state['state'])} tensors, but the weights are {expected}; "
            "resume with the layers, ranks and modulation of the checkpoint"
        )
    stacked: dict[int, dict[str, object]] = {}
    taken = 0
    for update, stacked_by_columns in matrices:
        entries = [state["state"].get(taken + rank) for rank in range(update.num_ranks)]
        names = set(entries[0]) if isinstance(entries[0], Mapping) else set()
        if not names or not all(isinstance(entry, Mapping) and set(entry) == names for entry in entries):
            raise ModelError(f"the training state's moments {taken} to {taken + len(entries) - 1} are not of one kind")
        taken += update.num_ranks
        stacked[len(stacked)] = {
            name: _join([entry[name] for entry in entries], stacked_by_columns) for name in entries[0]
        }
    return {"state": stacked, "param_groups": [{**_only_group(state), "params": list(range(len(stacked)))}]}


def _matrices(model: NptLlamaForCausalLM) -> Iterator[tuple[int, RankKUpdate, bool]]:
    """Layer and update of each parameter in their order, and whether its terms lie side by side in columns (w_down)."""
    for index, layer in model.npt_layers.items():
        for update in layer.updates.values():
            assert isinstance(update, RankKUpdate)
            yield from ((index, update, True), (index, update, False), (index, update, False))


def _only_group(state: Mapping[str, object]) -> Mapping[str, object]:
    groups = state.get("param_groups")
    if not isinstance(groups, (list, tuple)) or not all(isinstance(group, Mapping) for group in groups):
        raise ModelError("the training state has no parameter groups")
    if len(groups) != 1:
        raise ModelError(f"the training state has {len(groups)} parameter groups where training uses one")
    return groups[0]


def _split(value: object, update: RankKUpdate, by_columns: bool) -> list[object]:
    """One value a rank-1 term: parts of a matrix, copies of a step count."""
    if not isinstance(value, torch.Tensor) or value.ndim == 0:
        return [value.clone() if isinstance(value, torch.Tensor) else value for _ in range(update.num_ranks)]
    parts = value.chunk(update.num_ranks, dim=1 if by_columns else 0)
    return [part.clone(memory_format=torch.contiguous_format) for part in parts]


def _join(values: list[object], by_columns: bool) -> object:
    if not isinstance(values[0], torch.Tensor) or values[0].ndim == 0:
        return values[0]
    parts = [value for value in values if isinstance(value, torch.Tensor)]
    if len(parts) < len(values) or {part.shape for part in parts} != {values[0].shape} or values[0].ndim != 2:
        raise ModelError("the training state's moments are not matrices of one shape")
    return torch.cat(parts, dim=1 if by_columns else 0)
