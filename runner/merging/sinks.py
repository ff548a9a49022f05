"""Output files that are only appended to, so that they can be written from tensors that never are in memory at once."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import BoundedSemaphore
from typing import Any

from runner.files.readback import forget

# Smaller writes are gathered up to this many bytes.
BUFFER = 1 << 18
# Writes that may wait for the hash: each holds at most one part of a tensor.
_WAITING = 8
# After so many bytes the disk is told to begin, and the system to let go of what the disk has.
_BEHIND = 1 << 23


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
        self._size = self._begun = self._gone = 0

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

    def sha256(self) -> str:
        """The hash of all that was written so far, in hexadecimal."""
        self.flush()
        return self._hashing.submit(self._digest.hexdigest).result()

    def _write(self, view: memoryview) -> None:
        self._room.acquire()
        self._hashing.submit(self._hash, view)
        while view:
            written = os.write(self._descriptor, view)
            view = view[written:]
            self._size += written
            self._on_bytes(written)
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


def write_json_files(directory: Path, texts: Mapping[str, Mapping[str, Any]]) -> None:
    """Write new JSON files into `directory` by their names. Raises OSError where the disk fails."""
    for name, values in texts.items():
        with new_file(directory / name) as sink:
            text = json.dumps(dict(values), indent=2, ensure_ascii=False) + "\n"
            # Half a surrogate pair, as of a path that is no UTF-8, stands in JSON as its escape.
            sink.write(text.encode(errors="backslashreplace"))
