"""The layout that torch.save wrote before zip: four pickles, the list of storage keys, then the raw storages."""

import struct
from pathlib import Path
from typing import Any, BinaryIO

from runner.checkpoints.content import LEGACY_MAGIC
from runner.checkpoints.pickle_records import Container
from runner.errors import CheckpointError
from runner.files.pickle_check import scan

_PROTOCOL = 1001
_COUNT = struct.Struct("<q")


def check_legacy(path: Path) -> None:
    """Check a non-zip torch.save file: its pickles, and each storage's size against the file's. No data is read."""
    with path.open("rb") as file:
        magic = scan(file, path).value
        version = scan(file, path).value
        if magic != LEGACY_MAGIC or version != _PROTOCOL:
            raise CheckpointError(f"{path}: damaged torch.save file (its magic number or protocol version is wrong)")
        system = scan(file, path).value
        if not _little_endian(system):
            raise CheckpointError(f"{path}: only little-endian checkpoints are read")
        storages = scan(file, path).storages
        keys = scan(file, path).value
        if not isinstance(keys, Container) or not all(isinstance(key, str) for key in keys.items):
            raise CheckpointError(f"{path}: damaged torch.save file (no list of storages)")
        if sorted(keys.items) != sorted(storages):
            raise CheckpointError(f"{path}: damaged torch.save file (its storages are not those that its tensors use)")
        for key in keys.items:
            _check_storage(path, file, key, storages[key].record_bytes // storages[key].item_bytes)
            file.seek(storages[key].record_bytes, 1)
        _check_size(path, file.tell())


def _little_endian(system: Any) -> bool:
    if not isinstance(system, Container):
        return True
    values = system.items[1::2]
    pairs = dict(zip(system.items[: 2 * len(values) : 2], values, strict=True))
    return pairs.get("little_endian", True) is True


def _check_storage(path: Path, file: BinaryIO, key: str, count: int) -> None:
    stored = file.read(_COUNT.size)
    if len(stored) < _COUNT.size:
        _check_size(path, file.tell() - len(stored) + _COUNT.size)
    if _COUNT.unpack(stored)[0] != count:
        raise CheckpointError(f"{path}: storage {key} is said to hold {count} elements, the file says otherwise")


def _check_size(path: Path, needed: int) -> None:
    size = path.stat().st_size
    if size < needed:
        raise CheckpointError(
            f"{path}: truncated at byte {size}: its tensors reach at least byte {needed}; copy or download it again"
        )
    if size > needed:
        raise CheckpointError(f"{path}: {size - needed} bytes after the last tensor: damaged file")
