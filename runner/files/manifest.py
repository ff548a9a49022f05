"""MANIFEST.json: what an output consists of, so that any later change of any byte is found.

    files      path inside the directory → {size, sha256}
    versions   of the libraries that wrote it
    digest     SHA-256 of the manifest's own canonical text without this field
    …          what the writer adds: the recipe, hashes of the inputs

Nothing in it depends on the time or the place of writing: the same inputs give the same bytes. Hashes of inputs are
remembered, so that unchanged files are not read again.
"""

import hashlib
import json
import os
import platform
import stat
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from runner.errors import CheckpointError
from runner.files.atomic import write_json
from runner.files.file_type import sha256_of
from runner.files.strict_json import parse_object

FILE_NAME = "MANIFEST.json"
_LIMIT = 64 << 20
_LIBRARIES = ("torch", "safetensors", "transformers", "peft")


def render(content: Mapping[str, Any]) -> bytes:
    """The one text of a manifest with this content, its digest included. Raises TypeError or ValueError."""
    body = {key: value for key, value in content.items() if key != "digest"}
    return _canonical({**body, "digest": hashlib.sha256(_canonical(body)).hexdigest()})


def _canonical(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True, ensure_ascii=True, allow_nan=False) + "\n").encode()


def versions() -> dict[str, str]:
    """Versions of the libraries that write checkpoints, and of Python."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def describe(path: Path) -> dict[str, Any]:
    """A file's entry: its size in bytes and its SHA-256."""
    return {"size": path.stat().st_size, "sha256": sha256_of(path)}


def list_files(directory: Path) -> dict[str, Path]:
    """The regular files below `directory` by their path inside it. Raises CheckpointError for links and devices."""
    found: dict[str, Path] = {}
    for folder, folders, names in os.walk(directory):
        for name in sorted((*folders, *names)):
            path = Path(folder, name)
            mode = path.lstat().st_mode
            if stat.S_ISREG(mode):
                found[path.relative_to(directory).as_posix()] = path
            elif not stat.S_ISDIR(mode):
                raise CheckpointError(f"{path}: a link or special file, which an output may not hold")
    return dict(sorted(found.items()))


def read(directory: Path) -> dict[str, Any]:
    """The manifest of `directory`. Raises CheckpointError where it is missing or one byte of it was changed."""
    path = directory / FILE_NAME
    if path.is_symlink() or not path.is_file():
        raise CheckpointError(f"{path}: missing: not written by this runner, or incomplete")
    if path.stat().st_size > _LIMIT:
        raise CheckpointError(f"{path}: larger than {_LIMIT >> 20} MB")
    raw = path.read_bytes()
    content = parse_object(raw, path, "manifest")
    files = content.get("files")
    well_formed = isinstance(files, dict) and all(isinstance(entry, dict) for entry in files.values())
    if not well_formed or render(content) != raw:
        raise CheckpointError(f"{path}: damaged: its text does not match its own digest")
    return content


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
