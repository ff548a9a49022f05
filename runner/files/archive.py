"""Both layouts of torch.save, checked before torch sees a file, since torch's own reader checks little.

One is a zip archive of a pickle and a record for each storage. The other, which torch wrote before, is four pickles,
the list of storage keys, then the raw storages.
"""

import copy
import hashlib
import mmap
import struct
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import Any, BinaryIO

from runner.errors import CheckpointError, DamagedError
from runner.files.file_type import LEGACY_MAGIC, ZIP_START, Kind, kind_of
from runner.files.pickle_check import MAX_PICKLE_BYTES, scan
from runner.files.pickle_values import Container, entries

# torch.save's legacy layout starts with its magic number as a pickle of protocol 2 (or an older one).


MAX_ENTRIES = 500_000
STORAGE = "data/"  # what the names of the storages' records begin with
_END = struct.Struct("<4s4H2LH")
_LOCATOR = struct.Struct("<4sLQL")  # signature, disk, position of the zip64 end record, disks
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENCRYPTED = 0x1
# The files whose every record was read and found sound, and who reads one now.
_SOUND: set[tuple[int, ...]] = set()
_LOCKS: dict[tuple[int, ...], Lock] = {}
# Nanoseconds since its last change after which another change would show in a file's ctime.
_SETTLED = 1_000_000_000

# Cuts a record's bytes into the steps in which they are read.
Steps = Callable[[memoryview], Iterable[memoryview]]


def whole(view: memoryview) -> Iterable[memoryview]:
    """All of a record in one step."""
    return (view,)


@dataclass(frozen=True, kw_only=True)
class Archive:
    """A torch.save archive whose structure is sound: its pickle, and its records by their name inside its folder."""

    path: Path
    pickle: bytes
    entries: Mapping[str, zipfile.ZipInfo]

    @property
    def records(self) -> dict[str, int]:
        """The size in bytes of each storage's record, by the storage's key."""
        sizes = {name: entry.file_size for name, entry in self.entries.items() if name.startswith(STORAGE)}
        return {name.removeprefix(STORAGE): size for name, size in sizes.items()}


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
    return Archive(path=path, pickle=pickled, entries=entries)


def verify_crc(path: Path) -> bool:
    """Read every record of a torch.save file and compare its CRC (about 0.3 s/GB); whether there are any to compare.

    Other layouts carry none. Raises CheckpointError that names the first damaged record.
    """
    return kind_of(path) is Kind.ZIP and Crcs(check_archive(path)).check_all()


def require_crc(path: Path, steps: Steps = whole) -> None:
    """As `verify_crc`, of any file, but one that was found sound is not read again while nobody changes it.

    Who asks while another thread reads the file waits for what that one finds.
    """
    file = identity(path)
    with _LOCKS.setdefault(file, Lock()):
        if file not in _SOUND and is_zip(path):
            Crcs(check_archive(path)).check_all(steps)
        if is_settled(file):
            _SOUND.add(file)


def hash_sound(path: Path, steps: Steps) -> str:
    """As `require_crc`, and in the same pass over the file its SHA-256. Raises CheckpointError."""
    file = identity(path)
    with _LOCKS.setdefault(file, Lock()):
        crcs = Crcs(check_archive(path)) if file not in _SOUND and is_zip(path) else None
        digest, at = hashlib.sha256(), 0
        for step in steps(mapped(path)):
            digest.update(step)
            if crcs is not None:
                crcs.feed(at, step)
            at += len(step)
        if is_settled(file):
            _SOUND.add(file)
    return digest.hexdigest()


class Crcs:
    """The CRCs of an archive's records, each compared with the bytes when somebody reads the record, and once.

    Files written without CRCs (torch.serialization.set_crc32_options(False) writes zeros) have none to compare.
    """

    def __init__(self, archive: Archive) -> None:
        self._path = archive.path
        self._file = identity(archive.path)
        self._entries = archive.entries
        self._left = dict(archive.entries) if _has_crc(archive.entries.values()) else {}
        self._view = mapped(archive.path)
        self._fed: list[tuple[int, zipfile.ZipInfo]] | None = None
        self._crc = 0

    def feed(self, at: int, content: memoryview) -> None:
        """The file's bytes from `at` on, which come in order and whole. Raises CheckpointError for a damaged record."""
        if self._fed is None:
            self._fed = sorted(
                ((self._start(entry), entry) for entry in self._left.values()), key=lambda each: -each[0]
            )
        end = at + len(content)
        while self._fed:
            start, entry = self._fed[-1]
            if start >= end and entry.file_size:
                return
            stop = start + entry.file_size
            self._crc = zlib.crc32(content[max(start - at, 0) : max(stop - at, 0)], self._crc)
            if stop > end and end < len(self._view):
                return
            self._require(entry, self._crc, min(stop, end) - start)
            self._fed.pop()
            self._crc = 0

    def check(self, name: str) -> None:
        """Raise CheckpointError where the record `name` (its name inside the archive's folder) is damaged."""
        if name in self._left and self._file not in _SOUND:
            self._compare(self._left[name], whole)
            self._left.pop(name, None)

    def read(self, name: str) -> memoryview:
        """The bytes of the record `name`, mapped. Raises CheckpointError where it is damaged."""
        self.check(name)
        content = self._bytes(self._entries[name])
        if len(content) != self._entries[name].file_size:
            raise DamagedError(f"{self._path}: record {name} reaches beyond the end of the file")
        return content

    def check_all(self, steps: Steps = whole) -> bool:
        """Whether there are CRCs. Raises CheckpointError for the first damaged record, whatever was found before."""
        for entry in self._left.values():
            self._compare(entry, steps)
        return bool(self._left)

    def _start(self, entry: zipfile.ZipInfo) -> int:
        # The lengths of name and padding stand at bytes 26 to 29 of a record's own header.
        at = entry.header_offset
        return at + 30 + sum(int.from_bytes(self._view[i : i + 2], "little") for i in (at + 26, at + 28))

    def _bytes(self, entry: zipfile.ZipInfo) -> memoryview:
        start = self._start(entry)
        return self._view[start : start + entry.file_size]

    def _compare(self, entry: zipfile.ZipInfo, steps: Steps) -> None:
        content, crc = self._bytes(entry), 0
        for step in steps(content):
            crc = zlib.crc32(step, crc)
        self._require(entry, crc, len(content))
        # Whoever reads the tensors maps the file once more: these pages need not stay in memory beside those.
        first = entry.header_offset - entry.header_offset % mmap.PAGESIZE
        view: Any = self._view.obj
        view.madvise(mmap.MADV_DONTNEED, first, min(len(self._view), entry.header_offset + len(content)) - first)

    def _require(self, entry: zipfile.ZipInfo, crc: int, size: int) -> None:
        if crc != entry.CRC or size != entry.file_size:
            raise DamagedError(
                f"{self._path}: record {entry.filename} (at byte {entry.header_offset}) is damaged: its CRC does not "
                "match; copy or download the file again"
            )


def mapped(path: Path) -> memoryview:
    """The bytes of a file that is not empty, mapped. Raises CheckpointError."""
    try:
        with path.open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def is_zip(path: Path) -> bool:
    """Whether a file starts as torch.save's archives do. Raises CheckpointError where it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(len(ZIP_START)) == ZIP_START
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def identity(path: Path) -> tuple[int, ...]:
    """Changes with the file and its content, even where a modification time was set back: its ctime cannot be."""
    try:
        stat = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def is_settled(file: tuple[int, ...]) -> bool:
    """Whether a file of this `identity` was changed long enough ago for a further change to show in it."""
    return bool(file) and time.time_ns() - file[-1] > _SETTLED


def _has_crc(entries: Iterable[zipfile.ZipInfo]) -> bool:
    return any(entry.CRC for entry in entries)


def _content(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    if not _has_crc(archive.infolist()):
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


def check_legacy(path: Path) -> object:
    """Check a non-zip torch.save file: its pickles, and each storage's size against the file's. No data is read.

    Returns the record of the object in it. Raises CheckpointError.
    """
    with path.open("rb") as file:
        magic = scan(file, path).value
        version = scan(file, path).value
        if magic != LEGACY_MAGIC or version != _PROTOCOL:
            raise CheckpointError(f"{path}: damaged torch.save file (its magic number or protocol version is wrong)")
        system = scan(file, path).value
        if not _little_endian(system):
            raise CheckpointError(f"{path}: only little-endian checkpoints are read")
        found = scan(file, path)
        storages = found.storages
        keys = scan(file, path).value
        if not isinstance(keys, Container) or not all(isinstance(key, str) for key in keys.items):
            raise CheckpointError(f"{path}: damaged torch.save file (no list of storages)")
        names = [key for key in keys.items if isinstance(key, str)]
        if sorted(names) != sorted(storages):
            raise CheckpointError(f"{path}: damaged torch.save file (its storages are not those that its tensors use)")
        for key in names:
            _check_storage(path, file, key, storages[key].record_bytes // storages[key].item_bytes)
            file.seek(storages[key].record_bytes, 1)
        _check_size(path, file.tell())
    return found.value


def _little_endian(system: object) -> bool:
    return entries(system).get("little_endian", True) is True


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
