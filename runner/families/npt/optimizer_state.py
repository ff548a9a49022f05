"""An optimizer's state between the stacked parameters of `RankKUpdate` and the keys of the npt_delta format.

The format saves every rank-1 term under a key of its own, and the i-th entry of a saved optimizer state belongs to
the i-th key of the weights; the modules hold the k terms of a matrix stacked in one parameter.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from runner.errors import ModelError
from runner.families.npt.model import NptLlamaForCausalLM, RankKUpdate


def flat_optimizer_state(state: Mapping[str, Any], model: NptLlamaForCausalLM) -> dict[str, Any]:
    """A state dict over the updates' parameters → the same over the keys of the saved weights, in their order."""
    flat: dict[int, dict[str, Any]] = {}
    for index, (update, stacked_by_columns) in enumerate(_matrices(model)):
        entries = state["state"][index]
        parts = {name: _split(value, update, stacked_by_columns) for name, value in entries.items()}
        for rank in range(update.num_ranks):
            flat[len(flat)] = {name: values[rank] for name, values in parts.items()}
    return {"state": flat, "param_groups": [{**_only_group(state), "params": list(range(len(flat)))}]}


def stacked_optimizer_state(state: Mapping[str, Any], model: NptLlamaForCausalLM) -> dict[str, Any]:
    """The inverse of `flat_optimizer_state`. Raises ModelError where the state has another number of tensors."""
    expected = sum(update.num_ranks for update, _ in _matrices(model))
    if not isinstance(state, Mapping) or not isinstance(state.get("state"), Mapping):
        raise ModelError("the training state holds no state of an optimizer")
    if len(state["state"]) != expected:
        raise ModelError(
            f"the training state holds moments for {len(state['state'])} tensors, but the weights are {expected}; "
            "resume with the layers, ranks and modulation of the checkpoint"
        )
    stacked: dict[int, dict[str, Any]] = {}
    taken = 0
    for update, stacked_by_columns in _matrices(model):
        entries = [state["state"].get(taken + rank) for rank in range(update.num_ranks)]
        names = set(entries[0]) if isinstance(entries[0], Mapping) else set()
        if not names or not all(isinstance(entry, Mapping) and set(entry) == names for entry in entries):
            raise ModelError(f"the training state's moments {taken} to {taken + len(entries) - 1} are not of one kind")
        taken += update.num_ranks
        stacked[len(stacked)] = {
            name: _join([entry[name] for entry in entries], stacked_by_columns) for name in entries[0]
        }
    return {"state": stacked, "param_groups": [{**_only_group(state), "params": list(range(len(stacked)))}]}


def _matrices(model: NptLlamaForCausalLM) -> Iterator[tuple[RankKUpdate, bool]]:
    """The update of each parameter in their order, and whether its terms lie side by side in columns (w_down)."""
    for layer in model.npt_layers.values():
        for update in layer.updates.values():
            assert isinstance(update, RankKUpdate)
            yield from ((update, True), (update, False), (update, False))


def _only_group(state: Mapping[str, Any]) -> Mapping[str, Any]:
    groups = state.get("param_groups")
    if not isinstance(groups, (list, tuple)) or not all(isinstance(group, Mapping) for group in groups):
        raise ModelError("the training state has no parameter groups")
    if len(groups) != 1:
        raise ModelError(f"the training state has {len(groups)} parameter groups where training uses one")
    return groups[0]


def _split(value: Any, update: RankKUpdate, by_columns: bool) -> list[Any]:
    """One value a rank-1 term: parts of a matrix, copies of a step count."""
    if not isinstance(value, torch.Tensor) or value.ndim == 0:
        return [value.clone() if isinstance(value, torch.Tensor) else value for _ in range(update.num_ranks)]
    parts = value.chunk(update.num_ranks, dim=1 if by_columns else 0)
    return [part.clone(memory_format=torch.contiguous_format) for part in parts]


def _join(values: list[Any], by_columns: bool) -> Any:
    if not isinstance(values[0], torch.Tensor) or values[0].ndim == 0:
        return values[0]
    shapes = {value.shape if isinstance(value, torch.Tensor) else None for value in values}
    if len(shapes) != 1 or values[0].ndim != 2:
        raise ModelError("the training state's moments are not matrices of one shape")
    return torch.cat(values, dim=1 if by_columns else 0)
