"""Output files that are only appended to, so that they can be written from tensors that never are in memory at once."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# Smaller writes are gathered up to this many bytes.
BUFFER = 1 << 18


class Sink:
    """A new file. `write` takes any buffer and returns only when all of it is taken, or raises OSError."""

    def __init__(self, descriptor: int, on_bytes: Callable[[int], None]) -> None:
        self._descriptor = descriptor
        self._on_bytes = on_bytes
        self._waiting = bytearray()

    def write(self, data: "bytes | bytearray | memoryview") -> int:
        """Append `data`; its size in bytes."""
        view = memoryview(data).cast("B")
        if len(self._waiting) + len(view) > BUFFER:
            self.flush()
        if len(view) > BUFFER:
            self._write(view)
        else:
            self._waiting += view
        return len(view)

    def close(self) -> None:
        """Nothing: whoever opened the file closes it."""

    def flush(self) -> None:
        """Hand everything to the system."""
        waiting, self._waiting = self._waiting, bytearray()
        self._write(memoryview(waiting))

    def _write(self, view: memoryview) -> None:
        while view:
            written = os.write(self._descriptor, view)
            view = view[written:]
            self._on_bytes(written)


@contextmanager
def new_file(path: Path, on_bytes: Callable[[int], None] = lambda count: None) -> Iterator[Sink]:
    """Create `path`, which must not exist, and give it to be written; `on_bytes` hears how many bytes it took."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        sink = Sink(descriptor, on_bytes)
        yield sink
        sink.flush()
    finally:
        os.close(descriptor)
