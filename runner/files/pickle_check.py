"""Walk a pickle without building anything from it: every opcode, global and tensor is checked before torch loads it.

The walk knows only the opcodes that torch.save writes (protocol 2, as torch's own restricted unpickler does) and
gives each the same meaning; what it makes are plain records.

How much a checkpoint's pickle may ask for: bytes, opcodes, depth, and items once shared parts are counted.

The records that stand for a pickle's values while it is checked, and the error of a broken rule.

What a checkpoint's pickle may refer to, call and build: plain containers, dense tensors, inert records.

Which tensors a checkpoint's pickle may describe: dense ones whose every element lies inside their storage.
"""

import math
import pickletools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from runner.errors import CheckpointError
from runner.files.stubs import FUNCTIONS, STAND_INS


class Refused(Exception):
    """A rule is broken; `about_tensor` where the message should be led by the tensor's name."""

    def __init__(self, message: str, *, about_tensor: bool = False) -> None:
        super().__init__(message)
        self.about_tensor = about_tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Global:
    """A name that the pickle refers to."""

    name: str


@dataclass(kw_only=True, slots=True)
class Container:
    """A list, dict (keys and values in turn), set or foreign record in the making."""

    kind: str
    items: list[Any] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class Storage:
    """`count` elements of `item_bytes` each, in a record that holds `record_bytes`."""

    key: str
    count: int
    item_bytes: int
    record_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Tensor:
    """A dense tensor over a storage."""

    storage: Storage
    shape: tuple[int, ...]


def entries(record: Any) -> dict[Any, Any]:
    """What a dict's record holds, by key; {} for anything else."""
    if not isinstance(record, Container) or record.kind != "dict":
        return {}
    return dict(zip(record.items[::2], record.items[1::2], strict=True))


MAX_PICKLE_BYTES = 256 << 20
MAX_OPCODES = 2_000_000
MAX_DEPTH = 200
MAX_ITEMS = 10_000_000


class BoundedReader:
    """A file from which at most `limit` bytes are read, so that a length inside a pickle cannot claim the memory."""

    def __init__(self, file: BinaryIO, limit: int) -> None:
        self._file = file
        self._left = limit
        self.tell = file.tell

    def read(self, count: int) -> bytes:
        """`count` bytes, or fewer at the end of the file."""
        self._left -= count
        if self._left < 0:
            raise Refused("a string or number in the pickle is longer than the limit")
        return self._file.read(count)

    def readline(self) -> bytes:
        """A line, which only names of globals are."""
        line = self._file.readline(4096)
        self._left -= len(line)
        return line


def check_shape(root: Any) -> None:
    """Refuse what would hang or crash whoever walks the value: cycles, great depth, sharing that multiplies."""
    sizes: dict[int, int] = {}
    path: set[int] = set()
    stack: list[tuple[Any, bool]] = [(root, False)] if isinstance(root, (Container, tuple)) else []
    while stack:
        value, left = stack.pop()
        if not left and id(value) in sizes:
            continue
        items = value.items if isinstance(value, Container) else value
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
        # Only what is short is shown: a number may have hundreds of digits, a list any depth.
        shown = (
            value if type(value) is int and abs(value) < 1 << 64 else f"a {type(value).__name__} too large or foreign"
        )
        raise Refused(f"a size of {shown}", about_tensor=True)


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


def check_key(key: Any) -> None:
    """A dict key must be a constant or a flat tuple of constants."""
    parts = key if isinstance(key, tuple) else (key,)
    if not all(isinstance(part, _CONSTANTS) for part in parts):
        raise Refused("a dict key that is not a string, number or flat tuple")


def reduce(function: Any, arguments: Any) -> Any:
    """What calling `function` would make, as a record. Raises Refused for a call that torch.save does not write."""
    if not isinstance(function, Global) or not isinstance(arguments, tuple):
        raise TypeError("not a call")
    if function.name in STAND_INS or function.name in FUNCTIONS:
        return Container(kind="foreign", items=list(arguments))
    if function.name not in _CALLS:
        raise Refused(f"calls {function.name}, which torch.save never writes")
    return _CALLS[function.name](*arguments)


def new(cls: Any, arguments: Any) -> Container:
    """An object of a foreign class made without its constructor."""
    if not isinstance(cls, Global) or not isinstance(arguments, tuple):
        raise TypeError("not a class")
    if cls.name not in STAND_INS:
        raise Refused(f"makes a {cls.name}, which torch.save never writes")
    return Container(kind="foreign", items=list(arguments))


def build(target: Any, state: Any) -> None:
    """State given to an object: a foreign record takes any, an OrderedDict only attributes that shadow no method."""
    if not isinstance(target, Container) or target.kind not in ("foreign", "dict"):
        raise Refused("gives state to something that takes none")
    if target.kind == "dict":
        _check_attributes(state, OrderedDict)
        target.items.append(None)
    target.items.append(state)


def _parameter(data: Any, grad: Any = False, hooks: Any = None, state: Any = None) -> Tensor:
    if not isinstance(data, Tensor):
        raise TypeError("not a tensor")
    check_hooks(hooks)
    _check_attributes(state, torch.nn.Parameter)
    return data


def _typed_tensor(function: Any, cls: Any, arguments: Any, state: Any) -> Any:
    made = reduce(function, arguments)
    if not isinstance(made, Tensor) or not isinstance(cls, Global) or cls.name not in _TENSOR_CLASSES:
        raise Refused("a tensor of a foreign class; save plain tensors", about_tensor=True)
    _check_attributes(state, torch.Tensor)
    return made


def _check_attributes(state: Any, owner: type) -> None:
    """Attributes given to an object must not hide one that its class has."""
    if state is None:
        return
    if not isinstance(state, Container) or state.kind != "dict":
        raise Refused("attributes that are not a dict")
    for name in state.items[::2]:
        if not isinstance(name, str) or hasattr(owner, name):
            raise Refused(f"an attribute {name!r} that hides one of {owner.__name__}")


def _items(value: Any) -> list[Any]:
    """What going through a plain container gives; raises TypeError for anything else."""
    if isinstance(value, tuple):
        return list(value)
    if not isinstance(value, Container) or value.kind not in ("list", "set", "dict"):
        raise TypeError("not items")
    return value.items[::2] if value.kind == "dict" else list(value.items)


def _mapping(items: Any = None) -> Container:
    if items is None:
        return Container(kind="dict")
    if isinstance(items, Container) and items.kind == "dict":
        return Container(kind="dict", items=list(items.items))
    pairs: list[Any] = []
    for pair in map(_items, _items(items)):
        if len(pair) != 2:
            raise TypeError("not a pair")
        check_key(pair[0])
        pairs.extend(pair)
    return Container(kind="dict", items=pairs)


def _set_of(items: Any = ()) -> Container:
    members = _items(items)
    for item in members:
        check_key(item)
    return Container(kind="set", items=members)


def _bytes(text: Any, codec: Any = "latin1") -> bytes:
    if not isinstance(text, str) or codec not in ("latin1", "latin-1"):
        raise Refused("bytes that are not written the way pickle writes them")
    return text.encode("latin1")


def _bytearray(content: Any, codec: Any = "latin1") -> bytes:
    if isinstance(content, int):
        raise Refused("a bytearray that is made out of nothing")
    return content if isinstance(content, bytes) else _bytes(content, codec)


def _record(*arguments: Any) -> Container:
    if not all(isinstance(a, (*_CONSTANTS, tuple)) for a in arguments):
        raise TypeError("not constants")
    return Container(kind="value", items=list(arguments))


_CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": tensor_v2,
    "torch._utils._rebuild_tensor_v2": tensor_v2,
    "torch._utils._rebuild_tensor_v3": tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _typed_tensor,
    "collections.OrderedDict": _mapping,
    "collections.Counter": _mapping,
    "torch.Size": _record,
    "torch.device": _record,
    "builtins.complex": _record,
    "builtins.set": _set_of,
    "builtins.bytearray": _bytearray,
    "_codecs.encode": _bytes,
}


_MARK = object()


@dataclass(frozen=True, kw_only=True)
class Scan:
    """The value that a pickle would make, as records, and its storages by key."""

    value: Any
    storages: Mapping[str, Storage]


@dataclass(kw_only=True)
class _Machine:
    stack: list[Any] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)
    storages: dict[str, Storage] = field(default_factory=dict)

    def top(self) -> Any:
        """The uppermost value, which must belong to the innermost mark."""
        if self.stack[-1] is _MARK:
            raise IndexError("a mark where a value should be")
        return self.stack[-1]

    def pop(self) -> Any:
        """Take the uppermost value."""
        value = self.top()
        del self.stack[-1]
        return value

    def since_mark(self) -> list[Any]:
        """The items above the last mark, which are popped together with it."""
        for place in range(len(self.stack) - 1, -1, -1):
            if self.stack[place] is _MARK:
                items = self.stack[place + 1 :]
                del self.stack[place:]
                return items
        raise IndexError("no mark")

    def key(self) -> str:
        """The name under which the value in the making will stand, as far as can be told."""
        names = [v for v in self.stack if isinstance(v, str)]
        return names[-1] if names else "(unnamed)"


def scan(file: BinaryIO, path: Path) -> Scan:
    """Check the pickle at the position of `file`, which then stands behind it. Raises CheckpointError."""
    reader = BoundedReader(file, MAX_PICKLE_BYTES)
    machine = _Machine()
    position = 0
    try:
        for count, (opcode, argument, at) in enumerate(pickletools.genops(cast(BinaryIO, reader))):
            position = at or 0
            if count >= MAX_OPCODES:
                raise Refused(f"more than {MAX_OPCODES} pickle opcodes")
            step = _STEPS.get(opcode.name)
            if step is None:
                raise Refused(_unknown(opcode.name, opcode.proto))
            step(machine, argument)
        value = machine.pop()
        if machine.stack:
            raise IndexError("values left over")
        check_shape(value)
    except Refused as error:
        named = f"{path}: {machine.key()}: " if error.about_tensor else f"{path}: "
        raise CheckpointError(f"{named}{error}") from error
    except RecursionError as error:
        raise CheckpointError(f"{path}: its pickle is nested too deep") from error
    except (ValueError, IndexError, KeyError, UnicodeDecodeError, TypeError) as error:
        raise CheckpointError(
            f"{path}: damaged pickle near byte {position}: copy or download the file again"
        ) from error
    return Scan(value=value, storages=machine.storages)


def _unknown(name: str, protocol: int) -> str:
    if protocol > 2:
        return f"pickle protocol {protocol} or later (opcode {name}); torch.save it with the default protocol"
    return f"pickle opcode {name}, which torch.save never writes"


def _put(machine: _Machine, argument: Any) -> None:
    machine.memo[int(argument)] = machine.top()


def _get(machine: _Machine, argument: Any) -> None:
    machine.stack.append(machine.memo[int(argument)])


def _tuple(count: int) -> Callable[[_Machine, Any], None]:
    def step(machine: _Machine, _: Any) -> None:
        items = [machine.pop() for _ in range(count)]
        machine.stack.append(tuple(reversed(items)))

    return step


def _append(machine: _Machine, items: list[Any]) -> None:
    _container(machine, "list").extend(items)


def _set(machine: _Machine, pairs: list[Any]) -> None:
    if len(pairs) % 2:
        raise IndexError("a key without a value")
    for key in pairs[::2]:
        check_key(key)
    _container(machine, "dict").extend(pairs)


def _container(machine: _Machine, kind: str) -> list[Any]:
    value = machine.top()
    if not isinstance(value, Container) or value.kind != kind:
        raise TypeError(f"not a {kind}")
    return value.items


def _pair(machine: _Machine, _: Any) -> None:
    value, key = machine.pop(), machine.pop()
    _set(machine, [key, value])


def _single(machine: _Machine, _: Any) -> None:
    item = machine.pop()
    _append(machine, [item])


def _reduce(machine: _Machine, _: Any) -> None:
    arguments = machine.pop()
    function = machine.pop()
    machine.stack.append(reduce(function, arguments))


def _new(machine: _Machine, _: Any) -> None:
    arguments = machine.pop()
    machine.stack.append(new(machine.pop(), arguments))


def _build(machine: _Machine, _: Any) -> None:
    state = machine.pop()
    build(machine.top(), state)


def _persistent(machine: _Machine, _: Any) -> None:
    made = storage(machine.pop())
    known = machine.storages.setdefault(made.key, made)
    if known.record_bytes != made.record_bytes:
        raise Refused(f"storage {made.key} is said to hold {known.record_bytes} and {made.record_bytes} bytes")
    machine.stack.append(made)


def _push(machine: _Machine, value: Any) -> None:
    machine.stack.append(value)


def _global(machine: _Machine, argument: str) -> None:
    machine.stack.append(check_global(argument))


_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda machine, _: None,
    "STOP": lambda machine, _: None,
    "MARK": lambda machine, _: _push(machine, _MARK),
    "NONE": lambda machine, _: _push(machine, None),
    "NEWTRUE": lambda machine, _: _push(machine, True),
    "NEWFALSE": lambda machine, _: _push(machine, False),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"), _push),
    "EMPTY_DICT": lambda machine, _: _push(machine, Container(kind="dict")),
    "EMPTY_LIST": lambda machine, _: _push(machine, Container(kind="list")),
    "EMPTY_SET": lambda machine, _: _push(machine, Container(kind="set")),
    "EMPTY_TUPLE": lambda machine, _: _push(machine, ()),
    "TUPLE": lambda machine, _: _push(machine, tuple(machine.since_mark())),
    **{f"TUPLE{count}": _tuple(count) for count in (1, 2, 3)},
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _put),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _get),
    "APPEND": _single,
    "APPENDS": lambda machine, _: _append(machine, machine.since_mark()),
    "SETITEM": _pair,
    "SETITEMS": lambda machine, _: _set(machine, machine.since_mark()),
    "GLOBAL": _global,
    "REDUCE": _reduce,
    "NEWOBJ": _new,
    "BUILD": _build,
    "BINPERSID": _persistent,
}
