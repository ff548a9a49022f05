"""What stands in the files beside the weights, as values that can be written again: nothing executed, nothing cut.

And the training state of a merged checkpoint: that of the furthest source, with the optimizer moments of all.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from runner.errors import CheckpointError
from runner.files.stubs import Inert, InertArray, InertPath
from runner.files.tensors import load_pickle
from runner.merge import lazy_tensor
from runner.merge.optimizer_state import Moments, merge_optimizer_states, read_moments
from runner.merge.plan import JsonObject, MergedTensor, Source, furthest, latest_step

_NAMESPACES = ("argparse.Namespace", "types.SimpleNamespace")
# numpy's codes of the dtypes that torch has, too.
_DTYPES = {
    "b1": torch.bool, "u1": torch.uint8, "i1": torch.int8, "i2": torch.int16, "i4": torch.int32, "i8": torch.int64,
    "u2": torch.uint16, "u4": torch.uint32, "u8": torch.uint64, "f2": torch.float16, "f4": torch.float32,
    "f8": torch.float64,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SavedState:
    """One file's content, plain values and `LazyTensor`s, and what the user should know of it."""

    content: dict[str, Any]
    findings: tuple[str, ...] = ()
    differences: tuple[JsonObject, ...] = ()


def read_state(source: Source, name: str) -> dict[str, Any] | None:
    """The dictionary in the file `name` beside a source's weights, tensors mapped; None where there is none.

    Raises CheckpointError for a damaged one.
    """
    file = source.checkpoint.directory / name
    if not file.is_file():
        return None
    state = load_pickle(file, tensors="mmap")
    if not isinstance(state, dict):
        raise CheckpointError(f"{file}: holds a {type(state).__name__}, not a dictionary")
    return state


def merge_training_states(
    sources: Sequence[Source], tensors: Sequence[MergedTensor], name: str, merge_info: JsonObject
) -> SavedState | None:
    """The state to resume from, of the files `name`: that of the furthest source, with the optimizer moments of all.

    None where no source has one. Raises CheckpointError for a damaged one.
    """
    states = {id(source): read_state(source, name) for source in sources}
    having = [source for source in sources if states[id(source)] is not None]
    if not having:
        return None
    moments: list[Moments] = []
    findings, without = [], []
    for source in sources:
        state = states[id(source)]
        if state is None or state.get("optimizer_state_dict") is None:
            without.append((source, name if state is None else "optimizer moments"))
            continue
        read = read_moments(source, state["optimizer_state_dict"])
        if isinstance(read, Moments):
            moments.append(read)
        else:
            findings.append(read)
    # Where no source has moments, that one has none is nothing to say.
    start = ": its parameters start without moments" if moments else ""
    findings += [f"{s.path}: has no {what}{start}" for s, what in without if moments or states[id(s)] is None]
    leader = furthest(having)
    content, said = to_serializable(states[id(leader)], leader)
    findings += said
    if (step := latest_step(sources)) is not None:
        content["global_step"] = step
    differences: tuple[JsonObject, ...] = ()
    if moments:
        leading = furthest([each.source for each in moments])
        merged = merge_optimizer_states(tensors, moments, next(each for each in moments if each.source is leading))
        content["optimizer_state_dict"], said = to_serializable(merged.state, leading)
        findings += [*merged.findings, *said]
        differences = merged.differences
    elif "optimizer_state_dict" in content:
        content["optimizer_state_dict"] = None
    content["merge_info"] = merge_info
    return SavedState(content=content, findings=tuple(dict.fromkeys(findings)), differences=differences)


def to_serializable(value: Any, source: Source) -> tuple[Any, list[str]]:
    """`value` with tensors as `LazyTensor`s and foreign objects as the plain values that they hold, which is said."""
    findings: list[str] = []

    def convert(item: Any, at: str) -> Any:
        if isinstance(item, torch.Tensor):
            return lazy_tensor.from_tensor(item, f"{source.path}: {at}")
        if isinstance(item, Inert):
            held, how = _held(item)
            findings.append(f"{source.path}: {at} was a {item.type_name}; {how}")
            return convert(held, at)
        if isinstance(item, Mapping):
            made = {key: convert(inner, f"{at}.{key}" if at else str(key)) for key, inner in item.items()}
            return OrderedDict(made) if isinstance(item, OrderedDict) else made
        if isinstance(item, (list, tuple)):
            made_items = [convert(inner, f"{at}[{i}]") for i, inner in enumerate(item)]
            return tuple(made_items) if isinstance(item, tuple) else made_items
        if isinstance(item, (torch.device, set, frozenset)):
            return str(item) if isinstance(item, torch.device) else sorted(item, key=str)
        return item

    return convert(value, ""), findings


def _held(item: Inert) -> tuple[Any, str]:
    """What a foreign object holds, and how that is said."""
    if isinstance(item, InertPath):
        return str(item), "it is written as text"
    if isinstance(item, InertArray):
        array = _array(item)
        return (array, "it is written as a tensor") if array is not None else (repr(item), "only its shape is written")
    if item.type_name in _NAMESPACES:
        return dict(item.state), "its plain content is written"
    return repr(item), "its description is written"


def _array(item: InertArray) -> torch.Tensor | None:
    """A numpy array as a tensor; None for a dtype that torch does not have, or bytes that do not fit the shape."""
    state = item.state.get("state")
    if not isinstance(state, tuple) or len(state) != 5:
        return None
    _, shape, kind, by_columns, data = state
    code = kind.args[0] if isinstance(kind, Inert) and kind.args else None
    dtype = _DTYPES.get(code) if isinstance(code, str) else None
    details = kind.state.get("state") if isinstance(kind, Inert) else None
    swapped = isinstance(details, tuple) and len(details) > 1 and details[1] == ">"
    sizes = isinstance(shape, tuple) and all(type(size) is int and size >= 0 for size in shape)
    if dtype is None or swapped or not sizes or not isinstance(data, bytes):
        return None
    if len(data) != math.prod(shape) * dtype.itemsize:
        return None
    flat = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return flat.reshape(shape[::-1]).permute(*reversed(range(len(shape)))) if by_columns else flat.reshape(shape)
