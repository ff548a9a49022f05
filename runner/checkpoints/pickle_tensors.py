"""Which tensors a checkpoint's pickle may describe: dense ones whose every element lies inside their storage."""

import math
from typing import Any

import torch

from runner.checkpoints.pickle_records import Container, Global, Refused, Storage, Tensor

MAX_DIMENSIONS = 64
# A tensor that repeats its storage (stride 0) may have this many elements; a larger one claims memory out of nothing.
MAX_REPEATED = 1 << 20
_STORAGE_BYTES = {
    "Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1,
    "Bool": 1, "ComplexDouble": 16, "ComplexFloat": 8,
}  # fmt: skip
STORAGES = {f"{module}.{name}Storage": n for name, n in _STORAGE_BYTES.items() for module in ("torch", "torch.cuda")}
STORAGES |= {"torch.storage.UntypedStorage": 1, "torch.UntypedStorage": 1}
# Not torch's quantised dtypes, nor those of less than a byte, with which nothing can be computed.
_DTYPE_NAMES = (
    "float64", "float32", "float16", "bfloat16", "complex64", "complex128", "bool", "int64", "int32", "int16", "int8",
    "uint64", "uint32", "uint16", "uint8", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz",
    "float8_e8m0fnu",
)  # fmt: skip
DTYPES = {f"torch.{name}": getattr(torch, name) for name in _DTYPE_NAMES}


def storage(identity: Any) -> Storage:
    """The storage that a persistent id names: ("storage", type, key, location, count[, view])."""
    if not isinstance(identity, tuple) or len(identity) not in (5, 6) or identity[0] != "storage":
        raise Refused("a persistent id that is not a storage")
    _, kind, key, _, count, *view = identity
    if not isinstance(kind, Global) or kind.name not in STORAGES or not isinstance(key, str):
        raise Refused("a storage of unknown type")
    _check_count(count)
    item = STORAGES[kind.name]
    record = count * item
    if view and view[0] is not None:
        _, offset, size = view[0]
        _check_count(offset)
        _check_count(size)
        if offset + size > count:
            raise Refused(f"a view beyond the end of storage {key}")
        count = size
    return Storage(key=key, count=count, item_bytes=item, record_bytes=record)


def _check_count(value: Any) -> None:
    if type(value) is not int or not 0 <= value < 1 << 48:
        raise Refused(f"a size of {value!r}", about_tensor=True)


def tensor_v2(base: Any, offset: Any, shape: Any, strides: Any, grad: Any = False, hooks: Any = None,
               metadata: Any = None) -> Tensor:  # fmt: skip
    """The arguments of torch's `_rebuild_tensor_v2` (and of the older `_rebuild_tensor`)."""
    if metadata is not None and not (isinstance(metadata, Container) and not metadata.items):
        raise Refused("a tensor with metadata (conjugate or negative view); save it resolved", about_tensor=True)
    return _tensor(base, offset, shape, strides, hooks, None)


def tensor_v3(base: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any,
               metadata: Any = None) -> Tensor:  # fmt: skip
    """The arguments of torch's `_rebuild_tensor_v3`: the dtypes that have no storage class, such as float8."""
    if not isinstance(dtype, Global) or dtype.name not in DTYPES:
        raise Refused("a tensor without a known dtype", about_tensor=True)
    tensor_v2(base, 0, (), (), grad, hooks, metadata)
    return _tensor(base, offset, shape, strides, hooks, DTYPES[dtype.name].itemsize)


def _tensor(base: Any, offset: Any, shape: Any, strides: Any, hooks: Any, item_bytes: int | None) -> Tensor:
    """The record of a tensor whose every element lies inside its storage."""
    if not isinstance(base, Storage) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
        raise TypeError("not a tensor's arguments")
    if len(shape) != len(strides) or len(shape) > MAX_DIMENSIONS:
        raise Refused(f"{len(shape)} sizes and {len(strides)} strides", about_tensor=True)
    for value in (offset, *shape, *strides):
        _check_count(value)
    check_hooks(hooks)
    item = item_bytes or base.item_bytes
    available = base.count * base.item_bytes // item
    elements = math.prod(shape)
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if elements and last >= available:
        raise Refused(
            f"shape {list(shape)} needs {last + 1} elements, its storage holds {available}", about_tensor=True
        )
    if elements > max(available, MAX_REPEATED):
        raise Refused(
            f"shape {list(shape)} repeats a storage of {available} elements (stride 0); save it contiguous",
            about_tensor=True,
        )
    return Tensor(storage=base, shape=shape)


def check_hooks(hooks: Any) -> None:
    """Hooks would be called by a backward pass: a tensor in a checkpoint has none."""
    if hooks is not None and not (isinstance(hooks, Container) and not hooks.items):
        raise Refused("a tensor with hooks; save it detached", about_tensor=True)
