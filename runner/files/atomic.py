"""What the file system must do at once: write a file whole, rename without replacing, swap, and make durable."""

import ctypes
import errno
import json
import os
import tempfile
import uuid
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

# Read once, as asking for it changes it for a moment, for all threads.
_UMASK = os.umask(0o077)
os.umask(_UMASK)
_AT_FDCWD = -100
_NOREPLACE = 1
_EXCHANGE = 2
# What a kernel or file system without these flags answers.
_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` to `path`, as `write_whole` does."""
    write_whole(path, (json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def write_whole(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that a reader sees the old file or the new one, never half of one.

    Raises OSError where that is not possible; then the old file stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        by_umask(Path(name))
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def by_umask(path: Path) -> None:
    """Give `path` the mode of any new file: what makes files under a name of its own gives them 0600."""
    path.chmod(0o666 & ~_UMASK)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of ours, such as a `result.json`, as it was written."""
    return json.loads(path.read_text(encoding="utf-8"))


def rename_new(source: Path, target: Path) -> None:
    """Rename `source` to `target`. Raises FileExistsError where `target` exists."""
    if _renameat2(source, target, _NOREPLACE):
        return
    # Two steps where the system has no flag for it; the caller's lock keeps other writers of `target` out.
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    source.rename(target)


def swap(source: Path, target: Path) -> Path:
    """Put `source` in the place of the existing `target`; where the old one is now. It is never without a name."""
    if _renameat2(source, target, _EXCHANGE):
        return source
    aside = aside_name(target)
    target.rename(aside)
    source.rename(target)
    return aside


def aside_name(target: Path) -> Path:
    """A free, visible name beside `target` for what stood there before."""
    return target.with_name(f"{target.name}.old-{uuid.uuid4().hex[:8]}")


def sync(path: Path) -> None:
    """Force a file or directory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _renameat2(source: Path, target: Path, flags: int) -> bool:
    """True where it was done, False where the system cannot; OSError for any other failure."""
    function = _function()
    if function is None:
        return False
    if function(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flags) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(source), None, str(target))


@cache
def _function() -> Any:
    """The C library's renameat2, or None."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
        function.restype = ctypes.c_int
    return function
