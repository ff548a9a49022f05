"""Optimizer states of separate trainings, merged over the merged parameters.

Index i of a saved state belongs to the i-th key of the weights saved with it; index j of the merged one to the j-th
merged key. So every parameter keeps its own moments and its own step count, and steps on as it would have alone.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from runner.merge import lazy_tensor
from runner.merge.plan import JsonObject, MergedTensor, Source

# torch's list of the names that a trainer gave its parameters, one for each index of a group's `params`.
NAMES = "param_names"
# What a parameter group says of its parameters one by one; all else is a setting.
_OF_PARAMETERS = ("params", NAMES)
Values = Mapping[str, Any]
# A source, one of its names, and what its optimizer holds for it.
Entry = tuple[Source, str, Values]


@dataclass(frozen=True, kw_only=True)
class Moments:
    """One source's optimizer state: its entry and its parameter group for each of its weights' names.

    `own_names`: what its trainer called each weight, where the state says it.
    """

    source: Source
    entries: Mapping[str, Values]
    group_of: Mapping[str, int]
    groups: Sequence[Values]
    own_names: Mapping[str, str] = field(default_factory=dict)


def read_moments(source: Source, state: object) -> Moments | str:
    """An `optimizer_state_dict` by the names of the weights it belongs to; or a text: why it cannot be used.

    Its index i is the i-th key of the weights, unless it names its parameters as the weights are named.
    """
    where = f"{source.path}: its optimizer state is left out, its parameters start without moments:"
    if not isinstance(state, Mapping) or not isinstance(state.get("state"), Mapping):
        return f"{where} it is no state of a torch optimizer"
    groups = state.get("param_groups")
    if not isinstance(groups, (list, tuple)) or not groups or not all(map(_is_group, groups)):
        return f"{where} it has no parameter groups"
    numbered = {index: number for number, group in enumerate(groups) for index in group["params"]}
    if set(numbered) != set(range(len(source.order))):
        return f"{where} it is for {len(numbered)} parameters, the weights are {len(source.order)}"
    called = _called(groups)
    by_name = sorted(called.values()) == sorted(source.order)
    order = [called[index] for index in range(len(numbered))] if by_name else source.order
    entries = {}
    for index, entry in state["state"].items():
        name = order[index] if index in numbered else None
        if name is None or not isinstance(entry, Mapping):
            return f"{where} entry {index} belongs to no parameter"
        shape = source.checkpoint.weights.infos[name].shape
        for field_name, value in entry.items():
            if isinstance(value, torch.Tensor) and not _fits(tuple(value.shape), shape):
                return f"{where} {field_name} of entry {index} is {list(value.shape)}, but {name} is {list(shape)}"
        entries[name] = entry
    group_of = {order[index]: number for index, number in numbered.items()}
    own_names = {order[index]: own for index, own in called.items()}
    return Moments(source=source, entries=entries, group_of=group_of, groups=groups, own_names=own_names)


def _is_group(group: object) -> bool:
    indices = group.get("params") if isinstance(group, Mapping) else None
    return isinstance(indices, (list, tuple)) and all(type(index) is int for index in indices)


def _called(groups: Sequence[Values]) -> dict[int, str]:
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


@dataclass(frozen=True, kw_only=True)
class MergedOptimizer:
    """The merged optimizer state, what the user should know of it, and the settings on which the sources differ."""

    state: dict[str, Any]
    findings: tuple[str, ...]
    differences: tuple[JsonObject, ...]


def merge_optimizer_states(
    tensors: Sequence[MergedTensor], moments: Sequence[Moments], furthest: Moments
) -> MergedOptimizer:
    """One state over the merged `tensors`, with `LazyTensor`s inside.

    The parameter groups are those of `furthest`, since its scheduler counts them; where another source's settings
    differ, they are said. So are parameters that start without moments, for want of them or of what the kept
    optimizer needs.
    """
    by_source = {id(each.source): each for each in moments}
    needed = _needed(furthest)
    state: dict[int, dict[str, Any]] = {}
    members: list[list[int]] = [[] for _ in furthest.groups]
    lacking = _Lacking()
    for index, tensor in enumerate(tensors):
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
    names = _names(tensors, by_source)
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
    return MergedOptimizer(
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
    held: list[list[Values]] = [[] for _ in furthest.groups]
    for name, entry in furthest.entries.items():
        held[furthest.group_of[name]].append(entry)
    everywhere = list(furthest.entries.values())
    return [_common(entries or everywhere) for entries in held]


def _common(entries: Sequence[Values]) -> list[str]:
    return [name for name in entries[0] if all(name in entry for entry in entries)] if entries else []


def _found(tensor: MergedTensor, by_source: Mapping[int, Moments], lacking: _Lacking) -> list[Entry] | None:
    """The entries of one parameter in all of its sources; None where one has none, which `lacking` then knows."""
    found: list[Entry] = []
    several = len(tensor.sources) > 1
    for source, name in zip(tensor.sources, tensor.names, strict=True):
        moments = by_source.get(id(source))
        entry = moments.entries.get(name) if moments else None
        if entry is not None:
            found.append((source, name, entry))
        elif several:
            lacking.combined.setdefault(tensor.layer, {})[str(source.path)] = None
        if moments and not several:
            lacking.among[str(source.path)] += 1
            lacking.of[str(source.path)] += entry is None
    return found if len(found) == len(tensor.sources) else None


def _names(tensors: Sequence[MergedTensor], by_source: Mapping[int, Moments]) -> list[str]:
    """What the trainers called the merged parameters; [] unless each one has a name of its own."""
    names = []
    for tensor in tensors:
        moments = by_source.get(id(tensor.sources[0]))
        names.append(moments.own_names.get(tensor.names[0], "") if moments else "")
    return names if all(names) and len(set(names)) == len(names) else []


def _value(name: str, leader: Entry, found: Sequence[Entry], tensor: MergedTensor) -> Any:
    """One value of an entry: a tensor of the parameter's shape is combined as the parameter is, others the leader's."""
    value = leader[2][name]
    if not isinstance(value, torch.Tensor):
        return value
    parts = [
        lazy_tensor.from_tensor(entry[name], f"{source.path}: {name} of {own}")
        for source, own, entry in found
        if isinstance(entry.get(name), torch.Tensor)
    ]
    of_parameter = all(part.shape == tensor.tensor.shape and part.dtype.is_floating_point for part in parts)
    if len(parts) > 1 and len(parts) == len(found) and of_parameter:
        combined = lazy_tensor.average if tensor.how == "average" else lazy_tensor.weighted
        return combined(parts, tensor.weights)
    return lazy_tensor.from_tensor(value, f"{leader[0].path}: {name} of {leader[1]}")


def _group(tensor: MergedTensor, by_source: Mapping[int, Moments], count: int) -> int:
    """The parameter group of one parameter: that of its first source with moments, the last where there are fewer."""
    for source, name in zip(tensor.sources, tensor.names, strict=True):
        if moments := by_source.get(id(source)):
            return min(moments.group_of[name], count - 1)
    return 0


def _differences(moments: Sequence[Moments], furthest: Moments) -> list[JsonObject]:
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


def _difference(what: str, group: int | None, other: Moments, theirs: object, kept: object) -> JsonObject:
    values = {"source": str(other.source.path), "value": _plain(theirs), "kept": _plain(kept)}
    return {"setting": what, "group": group, **values}


def same(a: object, b: object) -> bool:
    """Whether two settings are equal, in type too; tensors inside them element by element."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def _plain(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _said(difference: JsonObject, furthest: Source) -> str:
    group = "" if difference["group"] is None else f"group {difference['group']}: "
    return (
        f"optimizer {group}{difference['setting']} is {difference['value']} in {difference['source']}; "
        f"{difference['kept']} of {furthest.path}, the furthest, is kept"
    )
