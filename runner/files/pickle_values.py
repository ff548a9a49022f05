"""What a checkpoint's pickle may make: plain containers, dense tensors, inert records; each a record of its own here.

A tensor is described by its storage, dtype and shape alone, and every element must lie inside the storage. What is
called, referred to or nested otherwise is refused. `value_of` makes plain Python of the records, all without torch.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from runner.files.stubs import FUNCTIONS, STAND_INS, Inert


class Refused(Exception):
    """A rule is broken; `about_tensor` where the message should be led by the tensor's name."""

    def __init__(self, message: str, *, about_tensor: bool = False) -> None:
        super().__init__(message)
        self.about_tensor = about_tensor


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Global:
    """A name that the pickle refers to."""

    name: str

    def __repr__(self) -> str:
        return self.name


_NO_STATE = object()


@dataclass(kw_only=True, slots=True)
class Container:
    """A list, dict (keys and values in turn) or set in the making; else `kind` is what is called with `items`.

    `state`: what is given to the object once it is made.
    """

    kind: str
    items: list[object] = field(default_factory=list)
    state: object = _NO_STATE


@dataclass(frozen=True, kw_only=True, slots=True)
class Storage:
    """`count` elements of `item_bytes` each, in a record that holds `record_bytes`; `dtype` as torch calls it."""

    key: str
    count: int
    dtype: str
    item_bytes: int
    record_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Tensor:
    """A dense tensor over a storage, from its element `offset` on; `dtype` as torch calls it, as float32."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def __repr__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"

    @property
    def is_meta(self) -> bool:
        """Always, as torch says it of a tensor without data."""
        return True

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return ITEM_BYTES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel() * self.itemsize

    @property
    def is_contiguous(self) -> bool:
        """Whether its elements stand in order, without gaps."""
        step = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size > 1 and stride != step:
                return False
            step *= size
        return True

    def numel(self) -> int:
        """Number of elements; a method, as that of torch's tensors."""
        return math.prod(self.shape)


def entries(record: object) -> dict[object, object]:
    """What a dict's record holds, by key; {} for anything else."""
    if not isinstance(record, Container) or record.kind != "dict":
        return {}
    return dict(zip(record.items[::2], record.items[1::2], strict=True))


MAX_DEPTH = 200
MAX_ITEMS = 10_000_000


def check_shape(root: object) -> None:
    """Refuse what would hang or crash whoever walks the value: cycles, great depth, sharing that multiplies."""
    sizes: dict[int, int] = {}
    path: set[int] = set()
    stack: list[tuple[Container | tuple[object, ...], bool]] = (
        [(root, False)] if isinstance(root, (Container, tuple)) else []
    )
    while stack:
        value, left = stack.pop()
        if not left and id(value) in sizes:
            continue
        items: Sequence[object]
        if isinstance(value, tuple):
            items = value
        else:
            items = value.items if value.state is _NO_STATE else [*value.items, value.state]
        if left:
            path.remove(id(value))
            sizes[id(value)] = 1 + sum(sizes.get(id(item), 1) for item in items)
            if sizes[id(value)] > MAX_ITEMS:
                raise Refused(f"more than {MAX_ITEMS} items once its shared parts are counted")
            continue
        if id(value) in path:
            raise Refused("a container that holds itself")
        path.add(id(value))
        if len(path) > MAX_DEPTH:
            raise Refused(f"nested more than {MAX_DEPTH} deep")
        stack.append((value, True))
        stack.extend((item, False) for item in items if isinstance(item, (Container, tuple)))


MAX_DIMENSIONS = 64
# A tensor that repeats its storage (stride 0) may have this many elements; a larger one claims memory out of nothing.
MAX_REPEATED = 1 << 20
# Not torch's quantised dtypes, nor those of less than a byte, with which nothing can be computed.
ITEM_BYTES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "complex64": 8, "complex128": 16, "bool": 1, "int64": 8,
    "int32": 4, "int16": 2, "int8": 1, "uint64": 8, "uint32": 4, "uint16": 2, "uint8": 1, "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1, "float8_e5m2": 1, "float8_e5m2fnuz": 1, "float8_e8m0fnu": 1,
}  # fmt: skip
DTYPES = {f"torch.{name}": name for name in ITEM_BYTES}
_STORED = {
    "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64", "Int": "int32",
    "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool", "ComplexDouble": "complex128",
    "ComplexFloat": "complex64",
}  # fmt: skip
_STORAGE_DTYPES = {f"{module}.{name}Storage": d for name, d in _STORED.items() for module in ("torch", "torch.cuda")}
_STORAGE_DTYPES |= {"torch.storage.UntypedStorage": "uint8", "torch.UntypedStorage": "uint8"}
STORAGES = {name: ITEM_BYTES[dtype] for name, dtype in _STORAGE_DTYPES.items()}


def storage(identity: object) -> Storage:
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
    return Storage(key=key, count=count, dtype=_STORAGE_DTYPES[kind.name], item_bytes=item, record_bytes=record)


def _check_count(value: object) -> None:
    if type(value) is not int or not 0 <= value < 1 << 48:
        # Only what is short is shown: a number may have hundreds of digits, a list any depth.
        short = type(value) is int and abs(value) < 1 << 64
        shown = value if short else f"a {type(value).__name__} too large or foreign"
        raise Refused(f"a size of {shown}", about_tensor=True)


def tensor_v2(base: object, offset: object, shape: object, strides: object, grad: object = False, hooks: object = None,
               metadata: object = None) -> Tensor:  # fmt: skip
    """The arguments of torch's `_rebuild_tensor_v2` (and of the older `_rebuild_tensor`)."""
    if metadata is not None and not (isinstance(metadata, Container) and not metadata.items):
        raise Refused("a tensor with metadata (conjugate or negative view); save it resolved", about_tensor=True)
    return _tensor(base, offset, shape, strides, hooks, None)


def tensor_v3(base: object, offset: object, shape: object, strides: object, grad: object, hooks: object, dtype: object,
               metadata: object = None) -> Tensor:  # fmt: skip
    """The arguments of torch's `_rebuild_tensor_v3`: the dtypes that have no storage class, such as float8."""
    if not isinstance(dtype, Global) or dtype.name not in DTYPES:
        raise Refused("a tensor without a known dtype", about_tensor=True)
    tensor_v2(base, 0, (), (), grad, hooks, metadata)
    return _tensor(base, offset, shape, strides, hooks, DTYPES[dtype.name])


def _tensor(base: object, offset: object, shape: object, strides: object, hooks: object, dtype: str | None) -> Tensor:
    """The record of a tensor whose every element lies inside its storage."""
    if not isinstance(base, Storage) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
        raise TypeError("not a tensor's arguments")
    if len(shape) != len(strides) or len(shape) > MAX_DIMENSIONS:
        raise Refused(f"{len(shape)} sizes and {len(strides)} strides", about_tensor=True)
    for value in (offset, *shape, *strides):
        _check_count(value)
    check_hooks(hooks)
    dtype = dtype or base.dtype
    available = base.count * base.item_bytes // ITEM_BYTES[dtype]
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
    return Tensor(storage=base, dtype=dtype, offset=offset, shape=shape, strides=strides)  # type: ignore[arg-type]


def check_hooks(hooks: object) -> None:
    """Hooks would be called by a backward pass: a tensor in a checkpoint has none."""
    if hooks is not None and not (isinstance(hooks, Container) and not hooks.items):
        raise Refused("a tensor with hooks; save it detached", about_tensor=True)


_CONSTANTS = (str, bytes, int, float, bool, type(None))
_TENSOR_CLASSES = ("torch.Tensor", "torch.nn.parameter.Parameter")
_QUANTISED = ("torch.q", "torch.Q")
_REFUSED_TENSORS = {
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor; save it dense (tensor.to_dense())",
    "torch._utils._rebuild_sparse_csr_tensor": "a sparse tensor; save it dense (tensor.to_dense())",
    "torch.serialization._get_layout": "a sparse tensor; save it dense (tensor.to_dense())",
    "torch._utils._rebuild_qtensor": "a quantised tensor; save it dequantised (tensor.dequantize())",
    "torch._utils._rebuild_meta_tensor_no_storage": "a meta tensor, which has a shape but no data",
    "torch._utils._rebuild_nested_tensor": "a nested tensor; save its parts",
    "torch._utils._rebuild_wrapper_subclass": "a tensor subclass; save plain tensors",
    "torch._utils._rebuild_device_tensor_from_numpy": "a tensor of a foreign device; save it from the CPU",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "a tensor of a foreign device; save it from the CPU",
    "torch.distributed.tensor.DTensor": "a distributed tensor; save the full tensor",
}


def check_global(argument: str) -> Global:
    """The global that pickletools gives as "module name". Raises Refused unless it is known to be inert."""
    name = ".".join(argument.split(" ", 1)).replace("__builtin__.", "builtins.")
    if name in _REFUSED_TENSORS:
        raise Refused(f"holds {_REFUSED_TENSORS[name]}", about_tensor=True)
    if name.startswith(_QUANTISED):
        raise Refused("holds a quantised tensor; save it dequantised (tensor.dequantize())", about_tensor=True)
    if any(name in known for known in (_CALLS, STORAGES, DTYPES, STAND_INS, FUNCTIONS, _TENSOR_CLASSES)):
        return Global(name=name)
    raise Refused(
        f"refers to {name}, which is neither a tensor nor plain data: nothing in a checkpoint is executed; "
        "save it again as a dict of tensors"
    )


def check_key(key: object) -> None:
    """A dict key must be a constant or a flat tuple of constants."""
    parts = key if isinstance(key, tuple) else (key,)
    if not all(isinstance(part, _CONSTANTS) for part in parts):
        raise Refused("a dict key that is not a string, number or flat tuple")


def reduce(function: object, arguments: object) -> object:
    """What calling `function` would make, as a record. Raises Refused for a call that torch.save does not write."""
    if not isinstance(function, Global) or not isinstance(arguments, tuple):
        raise TypeError("not a call")
    if function.name in STAND_INS or function.name in FUNCTIONS:
        return Container(kind=function.name, items=list(arguments))
    if function.name not in _CALLS:
        raise Refused(f"calls {function.name}, which torch.save never writes")
    return _CALLS[function.name](*arguments)


def new(cls: object, arguments: object) -> Container:
    """An object of a foreign class made without its constructor."""
    if not isinstance(cls, Global) or not isinstance(arguments, tuple):
        raise TypeError("not a class")
    if cls.name not in STAND_INS:
        raise Refused(f"makes a {cls.name}, which torch.save never writes")
    return Container(kind=cls.name, items=list(arguments))


def build(target: object, state: object) -> None:
    """State given to an object: a foreign record takes any, an OrderedDict only attributes that shadow no method."""
    if not isinstance(target, Container) or target.kind not in (*STAND_INS, "dict"):
        raise Refused("gives state to something that takes none")
    if target.state is not _NO_STATE:
        raise Refused("gives state to one object twice, which torch.save never does")
    if target.kind == "dict":
        _check_attributes(state, OrderedDict)
    target.state = state


def _parameter(data: object, grad: object = False, hooks: object = None, state: object = None) -> Tensor:
    if not isinstance(data, Tensor):
        raise TypeError("not a tensor")
    check_hooks(hooks)
    _check_tensor_attributes(state)
    return data


def _typed_tensor(function: object, cls: object, arguments: object, state: object) -> object:
    made = reduce(function, arguments)
    if not isinstance(made, Tensor) or not isinstance(cls, Global) or cls.name not in _TENSOR_CLASSES:
        raise Refused("a tensor of a foreign class; save plain tensors", about_tensor=True)
    _check_tensor_attributes(state)
    return made


def _check_tensor_attributes(state: object) -> None:
    """Hardly any tensor has attributes of its own; only for those torch is imported here."""
    if state is not None:
        from torch.nn import Parameter

        _check_attributes(state, Parameter)


def _check_attributes(state: object, owner: type) -> None:
    """Attributes given to an object must not hide one that its class has."""
    if state is None:
        return
    if not isinstance(state, Container) or state.kind != "dict":
        raise Refused("attributes that are not a dict")
    for name in state.items[::2]:
        if not isinstance(name, str) or hasattr(owner, name):
            raise Refused(f"an attribute {name!r} that hides one of {owner.__name__}")


def _items(value: object) -> list[object]:
    """What going through a plain container gives; raises TypeError for anything else."""
    if isinstance(value, tuple):
        return list(value)
    if not isinstance(value, Container) or value.kind not in ("list", "set", "dict"):
        raise TypeError("not items")
    return value.items[::2] if value.kind == "dict" else list(value.items)


def _mapping(items: object = None) -> Container:
    if items is None:
        return Container(kind="dict")
    if isinstance(items, Container) and items.kind == "dict":
        return Container(kind="dict", items=list(items.items))
    pairs: list[object] = []
    for pair in map(_items, _items(items)):
        if len(pair) != 2:
            raise TypeError("not a pair")
        check_key(pair[0])
        pairs.extend(pair)
    return Container(kind="dict", items=pairs)


def _set_of(items: object = ()) -> Container:
    members = _items(items)
    for item in members:
        check_key(item)
    return Container(kind="set", items=members)


def _bytes(text: object, codec: object = "latin1") -> bytes:
    if not isinstance(text, str) or codec not in ("latin1", "latin-1"):
        raise Refused("bytes that are not written the way pickle writes them")
    return text.encode("latin1")


def _bytearray(content: object, codec: object = "latin1") -> bytearray:
    if isinstance(content, int):
        raise Refused("a bytearray that is made out of nothing")
    return bytearray(content if isinstance(content, bytes) else _bytes(content, codec))


def _record(kind: str) -> Callable[..., Container]:
    def made(*arguments: object) -> Container:
        if not all(isinstance(a, (*_CONSTANTS, tuple)) for a in arguments):
            raise TypeError("not constants")
        return Container(kind=kind, items=list(arguments))

    return made


_CALLS: dict[str, Callable[..., object]] = {
    "torch._utils._rebuild_tensor": tensor_v2,
    "torch._utils._rebuild_tensor_v2": tensor_v2,
    "torch._utils._rebuild_tensor_v3": tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _typed_tensor,
    "collections.OrderedDict": _mapping,
    "collections.Counter": _mapping,
    "torch.Size": _record("torch.Size"),
    "torch.device": _record("torch.device"),
    "builtins.complex": _record("builtins.complex"),
    "builtins.set": _set_of,
    "builtins.bytearray": _bytearray,
    "_codecs.encode": _bytes,
}


def _device(kind: str, index: int | None = None) -> Global:
    """Written as torch writes it."""
    return Global(name=f"device(type={kind!r})" if index is None else f"device(type={kind!r}, index={index})")


_MADE: dict[str, Callable[..., object]] = {
    **STAND_INS,
    **FUNCTIONS,
    "torch.Size": tuple,
    "torch.device": _device,
    "builtins.complex": complex,
}


def value_of(record: object, made: dict[int, object] | None = None) -> Any:
    """The plain Python value of a checked record: what is shared stays shared, foreign objects are `Inert`.

    Tensors stay records. Raises TypeError, ValueError or OverflowError for a call whose arguments do not fit.
    """
    made = {} if made is None else made
    if not isinstance(record, (Container, tuple)):
        return record
    if id(record) not in made:
        items = record.items if isinstance(record, Container) else record
        made[id(record)] = _made(record, [value_of(item, made) for item in items], made)
    return made[id(record)]


def _made(record: Container | tuple[object, ...], items: list[Any], made: dict[int, object]) -> object:
    if isinstance(record, tuple):
        return tuple(items)
    match record.kind:
        case "list":
            return items
        case "dict":
            return dict(zip(items[::2], items[1::2], strict=True))
        case "set":
            return set(items)
    value = _MADE[record.kind](*items)
    if record.state is not _NO_STATE and isinstance(value, Inert):
        value.__setstate__(value_of(record.state, made))
    return value
