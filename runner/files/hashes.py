"""What files hold, as a hash, remembered so that unchanged ones are not read again."""

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runner.checkpoints.content import sha256_of
from runner.results import write_json

# A file that changed so shortly before it was hashed, in nanoseconds, may change again within the clock's resolution.
_SETTLED = 2_000_000_000
_REMEMBERED = 1000


def content_hash(files: Sequence[Path], memory: Path, *, may_read: bool) -> str | None:
    """The SHA-256 over the contents of `files`; None where `may_read` is false and one of them is not in `memory`.

    `memory` is a JSON file of hashes by path. An entry holds as long as size, inode, mtime and ctime of the file are
    the same: whoever changes a file in place and sets its mtime back still changes its ctime. Raises OSError.
    """
    known = _read(memory)
    hashes, learned = [], False
    for file in files:
        path = str(file.resolve())
        entry = known.get(path)
        stamp = _stamp(file)
        if not (isinstance(entry, dict) and entry.get("stamp") == stamp and _settled(entry)):
            if not may_read:
                return None
            entry = {"stamp": stamp, "sha256": sha256_of(file), "hashed": time.time_ns()}
            if _stamp(file) != stamp:
                return None  # it changes under our hands
            known.pop(path, None)
            known[path] = entry
            learned = True
        hashes.append(str(entry["sha256"]))
    if learned:
        write_json(memory, dict(list(known.items())[-_REMEMBERED:]))
    return hashlib.sha256("\0".join(hashes).encode()).hexdigest()


def _stamp(file: Path) -> list[int]:
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev]


def _settled(entry: dict[str, Any]) -> bool:
    return int(entry["hashed"]) - int(entry["stamp"][2]) > _SETTLED  # [2]: ctime


def _read(memory: Path) -> dict[str, Any]:
    try:
        content = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
