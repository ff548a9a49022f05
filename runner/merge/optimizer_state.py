"""Optimizer states of separate trainings, united over the merged parameters.

Index i of a saved state belongs to the i-th key of the weights saved with it; index j of the merged one to the j-th
merged key. So every parameter keeps its own moments and its own step count, and steps on as it would have alone.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from runner.merge import lazy_tensor as pieces
from runner.merge.moments import NAMES, Moments
from runner.merge.plain_values import same
from runner.merge.plan import Plan, PlannedTensor
from runner.merge.sources import Source

# What a parameter group says of its parameters one by one; all else is a setting.
_OF_PARAMETERS = ("params", NAMES)
# A source, one of its names, and what its optimizer holds for it.
Entry = tuple[Source, str, Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class United:
    """The merged optimizer state, None where no source has one, and what the user should know of it."""

    state: dict[str, Any] | None
    findings: tuple[str, ...] = ()
    differences: tuple[dict[str, Any], ...] = field(default=())


def unite(plan: Plan, moments: Sequence[Moments], furthest: Moments) -> United:
    """One state over the plan's tensors, with `Piece`s for tensors.

    The parameter groups are those of `furthest`, since its scheduler counts them; where another source's settings
    differ, they are said. So are parameters that start without moments, for want of them or of what the kept
    optimizer needs.
    """
    by_source = {id(each.source): each for each in moments}
    needed = _needed(furthest)
    state: dict[int, dict[str, Any]] = {}
    members: list[list[int]] = [[] for _ in furthest.groups]
    lacking = _Lacking()
    for index, tensor in enumerate(plan.tensors):
        group = _group(tensor, by_source, len(members))
        members[group].append(index)
        found = _found(tensor, by_source, lacking)
        if found is None:
            continue
        leader = max(found, key=lambda each: -1 if each[0].step is None else each[0].step)
        if absent := [name for name in needed[group] if name not in leader[2]]:
            lacking.unlike[str(leader[0].path)] = (tuple(leader[2]), tuple(absent))
            continue
        state[index] = {name: _value(name, leader, found, tensor) for name in leader[2]}
    names = _names(plan, by_source)
    groups = [
        {
            **{name: value for name, value in group.items() if name not in _OF_PARAMETERS},
            **({NAMES: [names[index] for index in indices]} if names else {}),
            "params": indices,
        }
        for group, indices in zip(furthest.groups, members, strict=True)
    ]
    differences = _differences(moments, furthest)
    findings = [*lacking.said(furthest.source), *(_said(difference, furthest.source) for difference in differences)]
    return United(
        state={"state": state, "param_groups": groups}, findings=tuple(findings), differences=tuple(differences)
    )


@dataclass(frozen=True, kw_only=True)
class _Lacking:
    """Whose parameters start without moments. `of` and `among`: a source's weights without, and all that are merged.

    `combined`: layers of several sources, some of which have none. `unlike`: source → what its entries hold, and what
    those of the kept optimizer hold beside.
    """

    of: Counter[str] = field(default_factory=Counter)
    among: Counter[str] = field(default_factory=Counter)
    combined: dict[int, dict[str, None]] = field(default_factory=dict)
    unlike: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = field(default_factory=dict)

    def said(self, furthest: Source) -> list[str]:
        """One line a source, and one a layer of several."""
        found = []
        for path, count in self.of.items():
            if count == self.among[path]:
                found.append(f"{path}: has no optimizer moments: its parameters start without moments")
            elif count:
                of = f"{count} of its {self.among[path]} parameters"
                found.append(f"{path}: has no optimizer moments for {of}, which start without")
        for layer, paths in self.combined.items():
            found.append(f"layer {layer} starts without optimizer moments, since {' and '.join(paths)} has none for it")
        for path, (held, absent) in self.unlike.items():
            found.append(
                f"{path}: its parameters start without moments: its optimizer holds {', '.join(held) or 'nothing'}, "
                f"but that of {furthest.path}, the furthest, needs {', '.join(absent)}"
            )
        return found


def _needed(furthest: Moments) -> list[list[str]]:
    """What every entry of the kept optimizer holds, group by group: without it, its next step would fail."""
    held: list[list[Mapping[str, Any]]] = [[] for _ in furthest.groups]
    for name, entry in furthest.entries.items():
        held[furthest.group_of[name]].append(entry)
    everywhere = list(furthest.entries.values())
    return [_common(entries or everywhere) for entries in held]


def _common(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    return [name for name in entries[0] if all(name in entry for entry in entries)] if entries else []


def _found(tensor: PlannedTensor, by_source: Mapping[int, Moments], lacking: _Lacking) -> list[Entry] | None:
    """The entries of one parameter in all of its sources; None where one has none, which `lacking` then knows."""
    found: list[Entry] = []
    several = len(tensor.layer.sources) > 1
    for source, name in zip(tensor.layer.sources, tensor.names, strict=True):
        moments = by_source.get(id(source))
        entry = moments.entries.get(name) if moments else None
        if entry is not None:
            found.append((source, name, entry))
        elif several:
            lacking.combined.setdefault(tensor.layer.layer.layer, {})[str(source.path)] = None
        if moments and not several:
            lacking.among[str(source.path)] += 1
            lacking.of[str(source.path)] += entry is None
    return found if len(found) == len(tensor.layer.sources) else None


def _names(plan: Plan, by_source: Mapping[int, Moments]) -> list[str]:
    """What the trainers called the merged parameters; [] unless each one has a name of its own."""
    names = []
    for tensor in plan.tensors:
        moments = by_source.get(id(tensor.layer.sources[0]))
        names.append(moments.own_names.get(tensor.names[0], "") if moments else "")
    return names if all(names) and len(set(names)) == len(names) else []


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
                if name not in _OF_PARAMETERS and not same(a, b):
                    found.append(_difference(name, number, other, a, b))
    return found


def _difference(what: str, group: int | None, other: Moments, theirs: Any, kept: Any) -> dict[str, Any]:
    values = {"source": str(other.source.path), "value": _plain(theirs), "kept": _plain(kept)}
    return {"setting": what, "group": group, **values}


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
