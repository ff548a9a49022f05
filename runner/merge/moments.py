"""One source's optimizer state, read as what it holds for each of the weights saved with it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from runner.merge.sources import Source

# torch's list of the names that a trainer gave its parameters, one for each index of a group's `params`.
NAMES = "param_names"


@dataclass(frozen=True, kw_only=True)
class Moments:
    """One source's optimizer state: its entry and its parameter group for each of its weights' names.

    `own_names`: what its trainer called each weight, where the state says it.
    """

    source: Source
    entries: Mapping[str, Mapping[str, Any]]
    group_of: Mapping[str, int]
    groups: Sequence[Mapping[str, Any]]
    own_names: Mapping[str, str] = field(default_factory=dict)


def read_moments(source: Source, state: Any) -> tuple[Moments | None, str | None]:
    """An `optimizer_state_dict` by the names of the weights it belongs to; or None and why it cannot be used.

    Its index i is the i-th key of the weights, unless it names its parameters as the weights are named.
    """
    where = f"{source.path}: its optimizer state is left out, its parameters start without moments:"
    if not isinstance(state, Mapping) or not isinstance(state.get("state"), Mapping):
        return None, f"{where} it is no state of a torch optimizer"
    groups = state.get("param_groups")
    if not isinstance(groups, (list, tuple)) or not groups or not all(map(_is_group, groups)):
        return None, f"{where} it has no parameter groups"
    numbered = {index: number for number, group in enumerate(groups) for index in group["params"]}
    if set(numbered) != set(range(len(source.order))):
        return None, f"{where} it is for {len(numbered)} parameters, the weights are {len(source.order)}"
    called = _called(groups)
    by_name = sorted(called.values()) == sorted(source.order)
    order = [called[index] for index in range(len(numbered))] if by_name else source.order
    entries = {}
    for index, entry in state["state"].items():
        name = order[index] if index in numbered else None
        if name is None or not isinstance(entry, Mapping):
            return None, f"{where} entry {index} belongs to no parameter"
        shape = source.checkpoint.weights.infos[name].shape
        for field_name, value in entry.items():
            if isinstance(value, torch.Tensor) and not _fits(tuple(value.shape), shape):
                return (
                    None,
                    f"{where} {field_name} of entry {index} is {list(value.shape)}, but {name} is {list(shape)}",
                )
        entries[name] = entry
    group_of = {order[index]: number for index, number in numbered.items()}
    own_names = {order[index]: own for index, own in called.items()}
    return Moments(source=source, entries=entries, group_of=group_of, groups=groups, own_names=own_names), None


def _is_group(group: Any) -> bool:
    indices = group.get("params") if isinstance(group, Mapping) else None
    return isinstance(indices, (list, tuple)) and all(type(index) is int for index in indices)


def _called(groups: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    """What the trainer called each parameter, by its index; {} unless every one has a name."""
    called: dict[int, str] = {}
    for group in groups:
        names = group.get(NAMES)
        if not isinstance(names, (list, tuple)) or len(names) != len(group["params"]):
            return {}
        called |= {index: str(name) for index, name in zip(group["params"], names, strict=True)}
    return called


def _fits(shape: tuple[int, ...], parameter: tuple[int, ...]) -> bool:
    """Whether a tensor of an entry can belong to a parameter: its shape, or statistics over some of its dimensions.

    Adafactor keeps means of rows and columns ([r, 1] and [1, c], or [r] and [c]), 8-bit optimizers scales of blocks.
    """
    if len(shape) != len(parameter):
        return len(shape) < len(parameter)
    return all(size in (1, whole) for size, whole in zip(shape, parameter, strict=True))
