"""Reading a written file back from the disk, once and in order, for its hash and for whoever compares it."""

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# Bytes of one step. Small, so that few pages are in use: each step's are given back before many more are taken.
STEP = 1 << 23

Watcher = Callable[[int, memoryview], None]


def unwatched(offset: int, content: memoryview) -> None:
    """A watcher that sees nothing."""


def read_back(path: Path, watch: Watcher = unwatched) -> dict[str, Any]:
    """The size in bytes and SHA-256 of a synced file, as a manifest lists them, read from the disk.

    `watch` gets the content step by step, each with its offset, and at the end an empty one with the size. The file's
    pages are let go before the reading and behind it. Raises OSError, and what `watch` raises.
    """
    digest = hashlib.sha256()
    step = min(STEP, path.stat().st_size + 1)
    ready, hashing = bytearray(step), bytearray(step)
    offset = 0
    with path.open("rb", buffering=0) as file, ThreadPoolExecutor(max_workers=1) as pool:
        forget(file.fileno())
        hashed = pool.submit(digest.update, b"")
        while count := file.readinto(ready):
            hashed.result()
            content = memoryview(ready)[:count].toreadonly()
            hashed = pool.submit(digest.update, content)
            watch(offset, content)
            forget(file.fileno(), offset, count)
            offset += count
            ready, hashing = hashing, ready
        hashed.result()
    watch(offset, memoryview(b""))
    return {"size": offset, "sha256": digest.hexdigest()}


def forget(descriptor: int, offset: int = 0, count: int = 0) -> None:
    """Let the system give up pages of a file that the disk has, and begin to write those that it has not.

    Pages that are used again cost less than new ones, which a virtual machine gets one by one from its host; and what
    others hold in the page cache stays there. `count` 0 is all to the end of the file.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, offset, count, os.POSIX_FADV_DONTNEED)
