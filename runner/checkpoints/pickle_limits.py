"""How much a checkpoint's pickle may ask for: bytes, opcodes, depth, and items once shared parts are counted."""

from typing import Any, BinaryIO

from runner.checkpoints.pickle_records import Container, Refused

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
