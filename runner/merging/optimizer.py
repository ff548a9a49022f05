"""Optimizer states of separate trainings, united over the merged parameters.

Index i of a saved state belongs to the i-th key of the weights saved with it; index j of the merged one to the j-th
merged key. So every parameter keeps its own moments and its own step count, and steps on as it would have alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from runner.merging import pieces
from runner.merging.plan import Plan, PlannedTensor
from runner.merging.sources import Source

# A source, one of its names, and what its optimizer holds for it.
Entry = tuple[Source, str, Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Moments:
    """One source's optimizer state: its entry and its parameter group for each of its weights' names."""

    source: Source
    entries: Mapping[str, Mapping[str, Any]]
    group_of: Mapping[str, int]
    groups: Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class United:
    """The merged optimizer state, None where no source has one, and what the user should know of it."""

    state: dict[str, Any] | None
    findings: tuple[str, ...] = ()
    differences: tuple[dict[str, Any], ...] = field(default=())


def read_moments(source: Source, state: Any) -> tuple[Moments | None, str | None]:
    """An `optimizer_state_dict` by the names of the weights it belongs to; or None, and why it cannot be used."""
    if state is None:
        return None, None
    where = f"{source.path}: its optimizer state is left out, its parameters start without moments:"
    if not isinstance(state, Mapping) or not isinstance(state.get("state"), Mapping):
        return None, f"{where} it is no state of a torch optimizer"
    groups = state.get("param_groups")
    if not isinstance(groups, (list, tuple)) or not all(isinstance(group, Mapping) for group in groups) or not groups:
        return None, f"{where} it has no parameter groups"
    numbered = {index: number for number, group in enumerate(groups) for index in group.get("params", ())}
    if set(numbered) != set(range(len(source.order))):
        return None, f"{where} it is for {len(numbered)} parameters, the weights are {len(source.order)}"
    entries = {}
    for index, entry in state["state"].items():
        name = source.order[index] if index in numbered else None
        if name is None or not isinstance(entry, Mapping):
            return None, f"{where} entry {index} belongs to no parameter"
        shape = source.checkpoint.weights.infos[name].shape
        for field_name, value in entry.items():
            if isinstance(value, torch.Tensor) and value.ndim and tuple(value.shape) != shape:
                return (
                    None,
                    f"{where} {field_name} of entry {index} is {list(value.shape)}, but {name} is {list(shape)}",
                )
        entries[name] = entry
    group_of = {source.order[index]: number for index, number in numbered.items()}
    return Moments(source=source, entries=entries, group_of=group_of, groups=groups), None


def unite(plan: Plan, moments: Sequence[Moments], furthest: Moments) -> United:
    """One state over the plan's tensors, with `Piece`s for tensors.

    The parameter groups are those of `furthest`, since its scheduler counts them; where another source's settings
    differ, they are said.
    """
    by_source = {id(each.source): each for each in moments}
    state: dict[int, dict[str, Any]] = {}
    members: list[list[int]] = [[] for _ in furthest.groups]
    without: dict[str, None] = {}
    for index, tensor in enumerate(plan.tensors):
        entry = _entry(tensor, by_source)
        if entry is not None:
            state[index] = entry
        else:
            without |= dict.fromkeys(str(source.path) for source in tensor.layer.sources)
        members[_group(tensor, by_source, len(members))].append(index)
    groups = [
        {**{name: value for name, value in group.items() if name != "params"}, "params": indices}
        for group, indices in zip(furthest.groups, members, strict=True)
    ]
    differences = _differences(moments, furthest)
    findings = [f"{path}: has no optimizer moments: its parameters start without" for path in without]
    findings += [_said(difference, furthest.source) for difference in differences]
    return United(
        state={"state": state, "param_groups": groups}, findings=tuple(findings), differences=tuple(differences)
    )


def _entry(tensor: PlannedTensor, by_source: Mapping[int, Moments]) -> dict[str, Any] | None:
    """The moments of one parameter; those of a combined one are combined alike; None where a source has none."""
    found: list[Entry] = []
    for source, name in zip(tensor.layer.sources, tensor.names, strict=True):
        moments = by_source.get(id(source))
        entry = moments.entries.get(name) if moments else None
        if entry is None:
            return None
        found.append((source, name, entry))
    leader = max(found, key=lambda each: -1 if each[0].step is None else each[0].step)
    return {name: _value(name, leader, found, tensor) for name in leader[2]}


def _value(name: str, leader: Entry, found: Sequence[Entry], tensor: PlannedTensor) -> Any:
    """One value of an entry: a tensor of the parameter's shape is combined as the parameter is, others the leader's."""
    value = leader[2][name]
    if not isinstance(value, torch.Tensor):
        return value
    parts = [
        pieces.from_tensor(entry[name], f"{source.path}: {name} of {own}")
        for source, own, entry in found
        if isinstance(entry.get(name), torch.Tensor)
    ]
    of_parameter = all(part.shape == tensor.piece.shape and part.dtype.is_floating_point for part in parts)
    if len(parts) > 1 and len(parts) == len(found) and of_parameter:
        combined = pieces.average if tensor.layer.how == "average" else pieces.weighted
        return combined(parts, tensor.layer.weights)
    return pieces.from_tensor(value, f"{leader[0].path}: {name} of {leader[1]}")


def _group(tensor: PlannedTensor, by_source: Mapping[int, Moments], count: int) -> int:
    """The parameter group of one parameter: that of its first source with moments, the last where there are fewer."""
    for source, name in zip(tensor.layer.sources, tensor.names, strict=True):
        if moments := by_source.get(id(source)):
            return min(moments.group_of[name], count - 1)
    return 0


def _differences(moments: Sequence[Moments], furthest: Moments) -> list[dict[str, Any]]:
    """Where the settings of parameter groups differ from those that are kept."""
    found = []
    for other in moments:
        if other is furthest:
            continue
        if len(other.groups) != len(furthest.groups):
            found.append(_difference("number of groups", None, other, len(other.groups), len(furthest.groups)))
        common = min(len(other.groups), len(furthest.groups))
        for number, (theirs, kept) in enumerate(zip(other.groups[:common], furthest.groups[:common], strict=True)):
            for name in dict.fromkeys((*kept, *theirs)):
                a, b = theirs.get(name), kept.get(name)
                if name != "params" and not _same(a, b):
                    found.append(_difference(name, number, other, a, b))
    return found


def _difference(what: str, group: int | None, other: Moments, theirs: Any, kept: Any) -> dict[str, Any]:
    values = {"source": str(other.source.path), "value": _plain(theirs), "kept": _plain(kept)}
    return {"setting": what, "group": group, **values}


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _said(difference: Mapping[str, Any], furthest: Source) -> str:
    group = "" if difference["group"] is None else f"group {difference['group']}: "
    return (
        f"optimizer {group}{difference['setting']} is {difference['value']} in {difference['source']}; "
        f"{difference['kept']} of {furthest.path}, the furthest, is kept"
    )
