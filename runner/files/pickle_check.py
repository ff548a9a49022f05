"""Walk a pickle without building anything from it: every opcode, global and tensor is checked before torch loads it.

The walk knows only the opcodes that torch.save writes (protocol 2, as torch's own restricted unpickler does) and
gives each the same meaning; what it makes are plain records (pickle_values.py).
"""

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, cast

from runner.errors import CheckpointError
from runner.files.pickle_values import (
    Container,
    Refused,
    Storage,
    build,
    check_global,
    check_key,
    check_shape,
    new,
    reduce,
    storage,
)

MAX_PICKLE_BYTES = 256 << 20
MAX_OPCODES = 2_000_000


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


_MARK = object()
# What an opcode does with the machine, and its argument.
Step = Callable[["Machine", object], None]


@dataclass(frozen=True, kw_only=True)
class Scan:
    """The value that a pickle would make, as records, and its storages by key."""

    value: object
    storages: Mapping[str, Storage]


@dataclass(kw_only=True)
class Machine:
    """What a pickle has made so far, as records."""

    stack: list[object] = field(default_factory=list)
    memo: dict[int, object] = field(default_factory=dict)
    storages: dict[str, Storage] = field(default_factory=dict)

    def top(self) -> object:
        """The uppermost value, which must belong to the innermost mark."""
        if self.stack[-1] is _MARK:
            raise IndexError("a mark where a value should be")
        return self.stack[-1]

    def pop(self) -> object:
        """Take the uppermost value."""
        value = self.top()
        del self.stack[-1]
        return value

    def since_mark(self) -> list[object]:
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


def scan(file: BinaryIO, path: Path, further: "Mapping[str, Step] | None" = None) -> Scan:
    """Check the pickle at the position of `file`, which then stands behind it. Raises CheckpointError.

    `further`: what other opcodes mean, or these in another pickle than torch.save's (python_pickle.py).
    """
    steps = _STEPS if further is None else {**_STEPS, **further}
    reader = BoundedReader(file, MAX_PICKLE_BYTES)
    machine = Machine()
    position = 0
    value: object = None
    try:
        for count, (opcode, argument, at) in enumerate(pickletools.genops(cast(BinaryIO, reader))):
            position = at or 0
            if count >= MAX_OPCODES:
                raise Refused(f"more than {MAX_OPCODES} pickle opcodes")
            step = steps.get(opcode.name)
            if step is None:
                raise Refused(_unknown(opcode.name, opcode.proto))
            step(machine, argument)
        value = machine.pop()
        if machine.stack:
            raise IndexError("values left over")
        check_shape(value)
    except (Refused, RecursionError, ValueError, IndexError, KeyError, UnicodeDecodeError, TypeError) as error:
        named = f"{path}: {machine.key()}" if isinstance(error, Refused) and error.about_tensor else f"{path}"
        # What a refused file holds is not kept for as long as its error.
        machine, value = Machine(), None
        raise CheckpointError(f"{named}: {_reason(error, position)}") from error.with_traceback(None)
    return Scan(value=value, storages=machine.storages)


def _reason(error: Exception, position: int) -> str:
    if isinstance(error, Refused):
        return str(error)
    if isinstance(error, RecursionError):
        return "its pickle is nested too deep"
    return f"damaged pickle near byte {position}: copy or download the file again"


def _unknown(name: str, protocol: int) -> str:
    if protocol > 2:
        return f"pickle protocol {protocol} or later (opcode {name}); torch.save it with the default protocol"
    return f"pickle opcode {name}, which torch.save never writes"


def _index(argument: object) -> int:
    assert isinstance(argument, int), "pickletools reads a number for this opcode"
    return argument


def _put(machine: Machine, argument: object) -> None:
    machine.memo[_index(argument)] = machine.top()


def _get(machine: Machine, argument: object) -> None:
    machine.stack.append(machine.memo[_index(argument)])


def _tuple(count: int) -> Callable[[Machine, object], None]:
    def step(machine: Machine, _: object) -> None:
        items = [machine.pop() for _ in range(count)]
        machine.stack.append(tuple(reversed(items)))

    return step


def _append(machine: Machine, items: list[object]) -> None:
    _container(machine, "list").extend(items)


def _set(machine: Machine, pairs: list[object]) -> None:
    if len(pairs) % 2:
        raise IndexError("a key without a value")
    for key in pairs[::2]:
        check_key(key)
    _container(machine, "dict").extend(pairs)


def _container(machine: Machine, kind: str) -> list[object]:
    value = machine.top()
    if not isinstance(value, Container) or value.kind != kind:
        raise TypeError(f"not a {kind}")
    return value.items


def _pair(machine: Machine, _: object) -> None:
    value, key = machine.pop(), machine.pop()
    _set(machine, [key, value])


def _single(machine: Machine, _: object) -> None:
    item = machine.pop()
    _append(machine, [item])


def _reduce(machine: Machine, _: object) -> None:
    arguments = machine.pop()
    function = machine.pop()
    machine.stack.append(reduce(function, arguments))


def _new(machine: Machine, _: object) -> None:
    arguments = machine.pop()
    machine.stack.append(new(machine.pop(), arguments))


def _build(machine: Machine, _: object) -> None:
    state = machine.pop()
    build(machine.top(), state)


def _persistent(machine: Machine, _: object) -> None:
    made = storage(machine.pop())
    known = machine.storages.setdefault(made.key, made)
    if known.record_bytes != made.record_bytes:
        raise Refused(f"storage {made.key} is said to hold {known.record_bytes} and {made.record_bytes} bytes")
    machine.stack.append(made)


def _push(machine: Machine, value: object) -> None:
    machine.stack.append(value)


def _global(machine: Machine, argument: object) -> None:
    assert isinstance(argument, str), "pickletools reads a name for this opcode"
    machine.stack.append(check_global(argument))


_STEPS: dict[str, Step] = {
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
