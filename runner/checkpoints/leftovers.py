"""What stands beside an output while it is written: its lock, the staged directory, the old output on its way out."""

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from runner.errors import CheckpointError
from runner.files import manifest as manifests
from runner.files.atomic import aside_name

PARTIAL = ".partial-"
REPLACED = ".replaced-"
_LEFTOVER = re.compile(r"\.(?P<target>.+)\.(partial|replaced)-[0-9a-f]{8}", re.DOTALL)


def hidden(target: Path, mark: str) -> Path:
    """A free name beside `target` that a later sweep recognises."""
    return target.with_name(f".{target.name}{mark}{uuid.uuid4().hex[:8]}")


def retire(old: Path, target: Path) -> None:
    """Delete an output of this runner that nothing was added to; keep anything else beside, under a visible name."""
    try:
        known = {*manifests.read(old)["files"], manifests.FILE_NAME}
        ours = set(manifests.list_files(old)) <= known
    except CheckpointError:
        ours = False
    if ours or not any(old.iterdir()):
        # Under a name that a sweep deletes: half deleted, it would look like someone else's.
        doomed = hidden(target, PARTIAL)
        old.rename(doomed)
        shutil.rmtree(doomed)
    elif old.name.startswith("."):
        old.rename(aside_name(target))


def sweep(target: Path) -> None:
    """Remove what killed processes left beside `target`: its own leftovers, and others' that no live lock holds."""
    for path in sorted(target.parent.iterdir()):
        found = _LEFTOVER.fullmatch(path.name)
        if not found or path.is_symlink() or not path.is_dir():
            continue
        if found["target"] == target.name:
            _remove_leftover(path, target)
        elif path.stat().st_uid == os.getuid():
            _sweep_other(path, target.with_name(found["target"]))


def _sweep_other(path: Path, other: Path) -> None:
    try:
        with locked(other):
            if path.exists():
                _remove_leftover(path, other)
    except CheckpointError:
        return  # a live process writes it


def _remove_leftover(path: Path, target: Path) -> None:
    if REPLACED in path.name:
        retire(path, target)
    else:
        shutil.rmtree(path)


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold the one lock of `target`, for which nobody waits."""
    path = target.with_name(f".{target.name}.lock")
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise CheckpointError(f"{target}: another process is writing it: wait for it, or choose another") from error
    try:
        yield
    finally:
        # Unlinked while held: whoever opened the old file finds it without a name, and opens a new one.
        path.unlink(missing_ok=True)
        lock.release()
