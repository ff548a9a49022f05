"""The zip archive that torch.save writes: checked before torch sees it, since torch's own reader checks little.

What a file is, told by its first bytes and never by its name.

The layout that torch.save wrote before zip: four pickles, the list of storage keys, then the raw storages.
"""

import copy
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from runner.errors import CheckpointError
from runner.files.file_type import LEGACY_MAGIC, Kind, kind_of
from runner.files.pickle_check import MAX_PICKLE_BYTES, Container, scan

# torch.save's legacy layout starts with its magic number as a pickle of protocol 2 (or an older one).


MAX_ENTRIES = 500_000
_END = struct.Struct("<4s4H2LH")
_LOCATOR = struct.Struct("<4sLQL")  # signature, disk, position of the zip64 end record, disks
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENCRYPTED = 0x1


@dataclass(frozen=True, kw_only=True)
class Archive:
    """A torch.save archive whose structure is sound: its pickle, and the size in bytes of each storage's record."""

    path: Path
    pickle: bytes
    records: Mapping[str, int]


def check_archive(path: Path) -> Archive:
    """Check the structure of the zip file `path` and give its pickle.

    Entries must be stored (not compressed), unique, inside one folder and apart from each other; the byte order
    little. Tensor data is not read. Raises CheckpointError.
    """
    try:
        _check_end(path)
        with zipfile.ZipFile(path) as archive:
            entries = _checked_entries(path, archive)
            order = _content(archive, entries["byteorder"]) if "byteorder" in entries else b"little"
            if order != b"little":
                raise CheckpointError(f"{path}: byte order {order[:8]!r}: only little-endian checkpoints are read")
            pickled = _content(archive, entries["data.pkl"])
    except (zipfile.BadZipFile, EOFError, NotImplementedError, UnicodeDecodeError, struct.error) as error:
        raise CheckpointError(f"{path}: damaged zip archive ({error}): copy or download it again") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    records = {name.removeprefix("data/"): e.file_size for name, e in entries.items() if name.startswith("data/")}
    return Archive(path=path, pickle=pickled, records=records)


def verify_crc(path: Path) -> None:
    """Read every record of a torch.save file and compare its CRC (about 0.8 s/GB); other layouts carry none.

    Raises CheckpointError that names the first damaged record.
    """
    if kind_of(path) is not Kind.ZIP:
        return
    check_archive(path)
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if not _has_crc(archive):
            return
        for entry in entries:
            try:
                with archive.open(entry) as record:
                    while record.read(1 << 24):
                        pass
            except (zipfile.BadZipFile, EOFError, OSError) as error:
                raise CheckpointError(
                    f"{path}: record {entry.filename} (at byte {entry.header_offset}) is damaged: its CRC does not "
                    "match; copy or download the file again"
                ) from error


def _has_crc(archive: zipfile.ZipFile) -> bool:
    """Whether records carry CRCs: torch.serialization.set_crc32_options(False) writes zeros."""
    return any(entry.CRC for entry in archive.infolist())


def _content(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    if not _has_crc(archive):
        # A copy without the attribute: zipfile would hold the zeros against the record.
        entry = copy.copy(entry)
        del entry.CRC
    with archive.open(entry) as record:
        return record.read()


def _check_end(path: Path) -> None:
    """The zip's end record must be the last thing in the file, so that torch and zipfile read the same directory."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - _END.size))
        tail = file.read(_END.size)
        if len(tail) < _END.size or not tail.startswith(b"PK\x05\x06"):
            raise CheckpointError(
                f"{path}: truncated at byte {size}: the zip directory that ends a torch.save file is missing; "
                "copy or download it again"
            )
        _, disk, directory_disk, _, count, length, offset, comment = _END.unpack(tail)
        end = size - _END.size
        file.seek(max(0, end - _LOCATOR.size))
        locator = file.read(_LOCATOR.size)
        if locator.startswith(b"PK\x06\x07"):
            zip64 = _LOCATOR.unpack(locator)[2]
            end -= _LOCATOR.size + _END64.size
            file.seek(max(0, end))
            count, length, offset = _zip64_end(path, file.read(_END64.size))
            if zip64 != end:
                raise CheckpointError(f"{path}: the zip64 end record is not where the archive says: damaged")
    if comment or disk or directory_disk:
        raise CheckpointError(f"{path}: the zip archive has a comment or several parts, which torch.save never writes")
    if count > MAX_ENTRIES:
        raise CheckpointError(f"{path}: {count} zip entries; the limit is {MAX_ENTRIES}")
    if offset + length != end:
        raise CheckpointError(f"{path}: the zip directory is not where the archive says: damaged, or data prepended")


def _zip64_end(path: Path, record: bytes) -> tuple[int, int, int]:
    """Number of entries, length and offset of the zip directory."""
    signature, *_, count, length, offset = _END64.unpack(record)
    if signature != b"PK\x06\x06":
        raise CheckpointError(f"{path}: the zip64 end record is missing: damaged archive")
    return count, length, offset


def _checked_entries(path: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The entries by their name inside the archive's one folder."""
    entries: dict[str, zipfile.ZipInfo] = {}
    folders = set()
    end = 0
    for entry in sorted(archive.infolist(), key=lambda e: e.header_offset):
        folder, _, name = entry.filename.partition("/")
        folders.add(folder)
        if not name or ".." in PurePosixPath(name).parts:
            raise CheckpointError(f"{path}: zip entry {entry.filename!r} is not inside the archive's folder")
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise CheckpointError(f"{path}: zip entry {entry.filename!r} is compressed; torch.save never compresses")
        if entry.flag_bits & _ENCRYPTED:
            raise CheckpointError(f"{path}: zip entry {entry.filename!r} is encrypted")
        if name in entries:
            raise CheckpointError(f"{path}: duplicate zip entry {entry.filename!r}: which one counts is undefined")
        if entry.header_offset < end:
            raise CheckpointError(f"{path}: zip entry {entry.filename!r} overlaps the one before it")
        end = entry.header_offset + 30 + len(entry.filename.encode()) + entry.file_size
        entries[name] = entry
    if len(folders) > 1:
        raise CheckpointError(f"{path}: the zip archive holds several folders ({', '.join(sorted(folders)[:4])})")
    if end > archive.start_dir:
        raise CheckpointError(f"{path}: zip entries overlap the zip directory")
    _check_members(path, entries)
    return entries


def _check_members(path: Path, entries: Mapping[str, zipfile.ZipInfo]) -> None:
    if "constants.pkl" in entries or any(name.startswith("code/") for name in entries):
        raise CheckpointError(f"{path}: a TorchScript archive holds code and is not read: save the state dict instead")
    if "data.pkl" not in entries:
        raise CheckpointError(f"{path}: a zip archive without data.pkl: not written by torch.save")
    if entries["data.pkl"].file_size > MAX_PICKLE_BYTES:
        raise CheckpointError(f"{path}: data.pkl is larger than {MAX_PICKLE_BYTES >> 20} MB")
    if "byteorder" in entries and entries["byteorder"].file_size > 16:
        raise CheckpointError(f"{path}: the byteorder record is not a byte order")


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
