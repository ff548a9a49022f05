"""New files that are only appended to: what is written is hashed beside the writing, what is copied the kernel copies.

For the read-back a file is a row of runs: written ones with their hash, copied ones with where they come from.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import BoundedSemaphore

from runner.files.staging import forget
from runner.files.stored import Stored, copy_range

# Smaller writes are gathered up to this many bytes; smaller tensors are not worth a copy by the kernel.
BUFFER = 1 << 18
# Writes that may wait for the hash: each holds at most one part of a tensor.
_WAITING = 8
# After so many bytes the disk is told to begin, and the system to let go of what the disk has.
_BEHIND = 1 << 23


@dataclass(frozen=True, kw_only=True)
class Written:
    """`size` bytes from `offset` that were written, and their SHA-256."""

    offset: int
    size: int
    sha256: str


class Sink:
    """A new file. `write` takes any buffer and returns only when all of it is taken, or raises OSError.

    What is written is hashed beside the writing, so a buffer must not change afterwards.
    """

    def __init__(self, descriptor: int, on_bytes: Callable[[int], None], hashing: ThreadPoolExecutor) -> None:
        self._descriptor = descriptor
        self._on_bytes = on_bytes
        self._waiting = bytearray()
        self._hashing = hashing
        self._digest = hashlib.sha256()
        self._room = BoundedSemaphore(_WAITING)
        self._runs: list[Written] = []
        self._run = self._size = self._begun = self._gone = 0
        self.has_copies = False

    @property
    def size(self) -> int:
        """Bytes so far."""
        return self._size + len(self._waiting)

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

    def copies(self, stored: Stored) -> bool:
        """Whether these bytes are copied by the kernel, and not read and written."""
        return stored.size > BUFFER

    def copy(self, stored: Stored) -> int:
        """Append stored bytes, which are not looked at; their size. Raises as `copy_range`."""
        self._end_run()
        self.has_copies = True
        for count in copy_range(stored, self._descriptor):
            self._grown(count)
        self._run = self._size
        return stored.size

    def flush(self) -> None:
        """Hand everything to the system."""
        waiting, self._waiting = self._waiting, bytearray()
        self._write(memoryview(waiting))

    def sha256(self) -> str:
        """The hash of all that was written so far, in hexadecimal; of a file without copies."""
        assert not self.has_copies, "what was copied is not hashed"
        self.flush()
        return self._hashing.submit(self._digest.hexdigest).result()

    def runs(self) -> list[Written]:
        """What was written, between the copies."""
        self._end_run()
        return self._runs

    def _end_run(self) -> None:
        self.flush()
        if self._size > self._run:
            digest = self._hashing.submit(self._digest.hexdigest).result()
            self._runs.append(Written(offset=self._run, size=self._size - self._run, sha256=digest))
            self._digest = hashlib.sha256()
        self._run = self._size

    def _write(self, view: memoryview) -> None:
        self._room.acquire()
        self._hashing.submit(self._hash, view)
        while view:
            written = os.write(self._descriptor, view)
            view = view[written:]
            self._grown(written)

    def _grown(self, count: int) -> None:
        self._size += count
        self._on_bytes(count)
        if self._size - self._begun >= _BEHIND:
            # What the disk begins with now can be let go at the next call.
            forget(self._descriptor, self._gone, self._size - self._gone)
            self._gone, self._begun = self._begun, self._size

    def _hash(self, view: memoryview) -> None:
        self._digest.update(view)
        self._room.release()


@contextmanager
def new_file(path: Path, on_bytes: Callable[[int], None] = lambda count: None) -> Iterator[Sink]:
    """Create `path`, which must not exist, and give it to be written; `on_bytes` hears how many bytes it took."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="hashing") as hashing:
            sink = Sink(descriptor, on_bytes, hashing)
            yield sink
            sink.flush()
    finally:
        os.close(descriptor)
