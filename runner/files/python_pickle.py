"""A pickle of Python's own (protocols 3 to 5) as inert records: for the few files of other programs that are one.

Nothing is unpickled: the walk of pickle_check.py makes records of plain containers, of the classes that the caller
names, of times, and of tensors; every other global is refused. A tensor's storage is a whole torch file inside the
pickle, which torch's restricted reader loads after our own checks.
"""

import io
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.errors import CheckpointError
from runner.files.pickle_check import MAX_PICKLE_BYTES, Machine, Step, scan
from runner.files.pickle_values import (
    Container,
    Global,
    Refused,
    Storage,
    check_hooks,
    check_key,
    tensor_v2,
)
from runner.files.tensors import load_pickle

if TYPE_CHECKING:
    import torch

_TIME, _DICT, _SET = "datetime.datetime", "collections.OrderedDict", "builtins.set"
_TENSOR, _STORAGE = "torch._utils._rebuild_tensor_v2", "torch.storage._load_from_bytes"
_KNOWN = (_TIME, _DICT, _SET, _TENSOR, _STORAGE)
_TEXT = ("SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "LONG4")


@dataclass(frozen=True, kw_only=True)
class Instance:
    """What a pickle says about an object: its class by its full name, and its attributes."""

    name: str
    state: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _Bytes:
    """A torch file inside the pickle."""

    content: bytes


@dataclass(frozen=True, kw_only=True)
class _Tensor:
    storage: _Bytes
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_records(path: Path, classes: Collection[str]) -> Any:
    """The value of the pickle `path`: dicts, lists, sets, constants, `Instance` of `classes`, times as their ten bytes,
    tensors. Raises CheckpointError for anything else in it.
    """
    try:
        size = path.stat().st_size
        if size > MAX_PICKLE_BYTES:
            raise CheckpointError(f"{path}: {size >> 20} MB, a pickle may have {MAX_PICKLE_BYTES >> 20}")
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    found = scan(io.BytesIO(content), path, _steps(frozenset(classes)))
    return _value(found.value, path)


def _steps(classes: frozenset[str]) -> dict[str, Step]:
    def push(machine: Machine, value: object) -> None:
        machine.stack.append(value)

    def known(name: str) -> Global:
        if name not in classes and name not in _KNOWN:
            raise Refused(f"refers to {name}, which a file of this kind never holds: nothing in it is executed")
        return Global(name=name)

    def from_stack(machine: Machine, _: object) -> None:
        name, module = machine.pop(), machine.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise TypeError("not a name")
        push(machine, known(f"{module}.{name}"))

    def written(machine: Machine, argument: object) -> None:
        push(machine, known(".".join(str(argument).split(" ", 1))))

    def memoize(machine: Machine, _: object) -> None:
        machine.memo[len(machine.memo)] = machine.top()

    def add_items(machine: Machine, _: object) -> None:
        items, target = machine.since_mark(), machine.top()
        if not isinstance(target, Container) or target.kind != "set":
            raise TypeError("not a set")
        for item in items:
            check_key(item)
        target.items.extend(items)

    def new(machine: Machine, _: object) -> None:
        arguments, cls = machine.pop(), machine.pop()
        if arguments != () or not isinstance(cls, Global) or cls.name not in classes:
            raise Refused("makes an object of a class that it only may name")
        push(machine, Container(kind=cls.name))

    def build(machine: Machine, _: object) -> None:
        state, target = machine.pop(), machine.top()
        if not isinstance(target, Container) or target.kind not in classes or target.items:
            raise Refused("gives state to something that takes none")
        target.items.append(state)

    def reduce(machine: Machine, _: object) -> None:
        arguments, function = machine.pop(), machine.pop()
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise TypeError("not a call")
        push(machine, _called(function.name, arguments))

    own: dict[str, Step] = {
        "FRAME": lambda machine, _: None,
        "STACK_GLOBAL": from_stack,
        "GLOBAL": written,
        "MEMOIZE": memoize,
        "ADDITEMS": add_items,
        "NEWOBJ": new,
        "BUILD": build,
        "REDUCE": reduce,
        "BINPERSID": partial(_refuse, "a persistent id"),
    }
    return {**own, **dict.fromkeys(_TEXT, push)}


def _refuse(what: str, machine: Machine, _: object) -> None:
    raise Refused(f"holds {what}, which a file of this kind never does")


def _called(name: str, arguments: tuple[object, ...]) -> object:
    """What a call would make, as a record."""
    if name == _DICT and not arguments:
        return Container(kind="dict")
    if name == _SET and len(arguments) == 1 and isinstance(arguments[0], Container) and arguments[0].kind == "list":
        for item in arguments[0].items:
            check_key(item)
        return Container(kind="set", items=list(arguments[0].items))
    if name == _TIME and len(arguments) == 1 and isinstance(arguments[0], bytes) and len(arguments[0]) == 10:
        return arguments[0]
    if name == _STORAGE and len(arguments) == 1 and isinstance(arguments[0], bytes):
        return _Bytes(content=arguments[0])
    if name == _TENSOR and len(arguments) >= 4 and isinstance(arguments[0], _Bytes):
        base, offset, shape, strides, *rest = arguments
        if len(rest) > 1:
            check_hooks(rest[1])
        # Every element must lie inside the storage, which can be no larger than its file.
        size = len(base.content)  # type: ignore[attr-defined]
        tensor_v2(
            Storage(key="inside", count=size, item_bytes=1, record_bytes=size, dtype="uint8"), offset, shape, strides
        )
        return _Tensor(storage=base, offset=offset, shape=shape, strides=strides)  # type: ignore[arg-type]
    raise Refused(f"calls {name} in a way that a file of this kind never does")


def _value(record: object, path: Path) -> Any:
    if isinstance(record, _Tensor):
        return _tensor(record, path)
    if isinstance(record, tuple):
        return tuple(_value(item, path) for item in record)
    if not isinstance(record, Container):
        if isinstance(record, (Global, _Bytes, Storage)):
            raise CheckpointError(f"{path}: damaged: a class or a storage where a value should be")
        return record
    values = [_value(item, path) for item in record.items]
    if record.kind == "dict":
        return dict(zip(values[::2], values[1::2], strict=True))
    if record.kind in ("list", "set"):
        return values if record.kind == "list" else set(values)
    state = values[0] if values else {}
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise CheckpointError(f"{path}: damaged: a {record.kind} without attributes")
    return Instance(name=record.kind, state=state)


def _tensor(record: _Tensor, path: Path) -> "torch.Tensor":
    import torch

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "storage.pt"
        file.write_bytes(record.storage.content)
        try:
            storage = load_pickle(file, tensors="mmap")
        except CheckpointError as error:
            raise CheckpointError(f"{path}: a tensor in it: {str(error).removeprefix(f'{file}: ')}") from error
        if not isinstance(storage, torch.storage.TypedStorage):
            raise CheckpointError(f"{path}: damaged: a {type(storage).__name__} where a tensor's storage should be")
        elements = torch.tensor([], dtype=storage.dtype).set_(storage)
        last = record.offset + sum((n - 1) * s for n, s in zip(record.shape, record.strides, strict=True))
        if last >= len(elements):
            raise CheckpointError(f"{path}: damaged: a tensor reaches beyond its storage")
        return elements.as_strided(record.shape, record.strides, record.offset).clone()
