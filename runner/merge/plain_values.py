"""What stands in the files beside the weights, as values that can be written again: nothing executed, nothing cut."""

import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch

from runner.files.stubs import Inert, InertArray, InertPath
from runner.merge import lazy_tensor as pieces
from runner.merge.sources import Source

_NAMESPACES = ("argparse.Namespace", "types.SimpleNamespace")
# numpy's codes of the dtypes that torch has, too.
_DTYPES = {
    "b1": torch.bool, "u1": torch.uint8, "i1": torch.int8, "i2": torch.int16, "i4": torch.int32, "i8": torch.int64,
    "u2": torch.uint16, "u4": torch.uint32, "u8": torch.uint64, "f2": torch.float16, "f4": torch.float32,
    "f8": torch.float64,
}  # fmt: skip


def writable(value: Any, source: Source) -> tuple[Any, list[str]]:
    """`value` with tensors as `Piece`s and foreign objects as the plain values that they hold, which is said."""
    findings: list[str] = []

    def convert(item: Any, at: str) -> Any:
        if isinstance(item, torch.Tensor):
            return pieces.from_tensor(item, f"{source.path}: {at}")
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


def same(a: Any, b: Any) -> bool:
    """Whether two settings are equal, in type too; tensors inside them element by element."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, Mapping):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


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
