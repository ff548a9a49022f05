"""MANIFEST.json: what an output consists of, so that any later change of any byte is found.

    files      path inside the directory → {size, sha256}
    versions   of the libraries that wrote it
    digest     SHA-256 of the manifest's own canonical text without this field
    …          what the writer adds: the recipe, hashes of the inputs

Nothing in it depends on the time or the place of writing: the same inputs give the same bytes.
"""

import hashlib
import json
import os
import platform
import stat
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from runner.errors import CheckpointError
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
