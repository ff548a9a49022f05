"""Where the bytes of tensors lie in files, and how they are copied and compared there: without torch, by the kernel."""

import ctypes
import errno
import io
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from runner.errors import CheckpointError
from runner.files.archive import STORAGE, check_archive, identity, mapped
from runner.files.file_type import Kind, kind_of
from runner.files.pickle_check import scan
from runner.files.pickle_values import Tensor, entries
from runner.files.safetensors_header import read_header

# What a kernel or file system that cannot copy by itself answers.
_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EXDEV, errno.EBADF}
# Bytes that are copied, compared or looked through at a time.
STEP = 1 << 23
# Exponent bits all set: infinity or NaN. The unsigned type of an element, its bits but the sign, the least that is bad.
_BAD = {
    "float64": (np.uint64, 0x7FFFFFFFFFFFFFFF, 0x7FF0000000000000),
    "float32": (np.uint32, 0x7FFFFFFF, 0x7F800000),
    "float16": (np.uint16, 0x7FFF, 0x7C00),
    "bfloat16": (np.uint16, 0x7FFF, 0x7F80),
    "float8_e5m2": (np.uint8, 0x7F, 0x7C),
    "float8_e4m3fn": (np.uint8, 0x7F, 0x7F),
}
# Elements of one look: they stay in the processor's cache.
_LOOK = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Stored:
    """The bytes of one tensor in order: `size` of them from byte `offset` of `path`; `crc`: their CRC-32 by the file,
    None where it says none of them alone."""

    path: Path
    offset: int
    size: int
    crc: int | None = None

    @property
    def view(self) -> memoryview:
        """The bytes, mapped."""
        return _view(self.path, identity(self.path))[self.offset : self.offset + self.size]


def stored_tensors(path: Path) -> Mapping[str, Stored]:
    """The tensors that stand in one piece in the weights file `path`, by their names. Raises CheckpointError."""
    return _stored(path, identity(path))


@lru_cache(maxsize=256)
def _stored(path: Path, stamp: tuple[int, ...]) -> Mapping[str, Stored]:
    kind = kind_of(path)
    if kind is Kind.SAFETENSORS:
        header = read_header(path)
        return {
            name: Stored(path=path, offset=header.data + entry.begin, size=entry.end - entry.begin)
            for name, entry in header.entries.items()
        }
    if kind is Kind.LEGACY:
        return {}
    found = places(path)
    tensors = entries(scan(io.BytesIO(check_archive(path).pickle), path).value)
    return {
        name: stored
        for name, tensor in tensors.items()
        if isinstance(name, str) and isinstance(tensor, Tensor) and (stored := place_of(tensor, found)) is not None
    }


def places(path: Path) -> Mapping[str, Stored]:
    """The records of storages in the torch.save archive `path`, by the storages' keys. Raises CheckpointError."""
    archive, view, found = check_archive(path), mapped(path), {}
    with_crc = any(entry.CRC for entry in archive.entries.values())
    for name, entry in archive.entries.items():
        if name.startswith(STORAGE):
            # The lengths of name and padding stand at bytes 26 to 29 of a record's own header.
            at = entry.header_offset
            start = at + 30 + sum(int.from_bytes(view[i : i + 2], "little") for i in (at + 26, at + 28))
            found[name.removeprefix(STORAGE)] = Stored(
                path=path, offset=start, size=entry.file_size, crc=entry.CRC if with_crc else None
            )
    return found


def place_of(tensor: Tensor, records: Mapping[str, Stored]) -> Stored | None:
    """Where a tensor lies whose storage is one of `records`; None where its elements do not stand in order."""
    record = records.get(tensor.storage.key)
    if record is None or not tensor.is_contiguous:
        return None
    start = tensor.offset * tensor.itemsize
    crc = record.crc if tensor.nbytes == record.size else None
    return Stored(path=record.path, offset=record.offset + start, size=tensor.nbytes, crc=crc)


@lru_cache(maxsize=8)
def _view(path: Path, stamp: tuple[int, ...]) -> memoryview:
    return mapped(path)


def copy_range(stored: Stored, descriptor: int) -> Iterator[int]:
    """Append the bytes to the open file `descriptor`, as the kernel copies them; the bytes of each step.

    Raises OSError, CheckpointError where the file ends early.
    """
    source = os.open(stored.path, os.O_RDONLY)
    try:
        done, by_kernel = 0, hasattr(os, "copy_file_range")
        while done < stored.size:
            count = min(STEP, stored.size - done)
            try:
                if by_kernel:
                    count = os.copy_file_range(source, descriptor, count, stored.offset + done)
                else:
                    count = os.write(descriptor, os.pread(source, count, stored.offset + done))
            except OSError as error:
                if not by_kernel or error.errno not in _UNSUPPORTED:
                    raise
                by_kernel = False
                continue
            if not count:
                raise CheckpointError(f"{stored.path}: ends at byte {stored.offset + done}: changed while it was read")
            done += count
            yield count
    finally:
        os.close(source)


def equal(first: memoryview, second: memoryview) -> bool:
    """Whether the same bytes stand in both: NaN equals NaN, and 0.0 does not equal -0.0."""
    if len(first) != len(second):
        return False
    a, b = np.frombuffer(first, np.uint8), np.frombuffer(second, np.uint8)
    return not len(a) or _memcmp(a.ctypes.data, b.ctypes.data, len(a)) == 0


_memcmp = ctypes.CDLL(None).memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


def all_finite(content: memoryview, dtype: str) -> bool:
    """Whether no element of these whole ones is NaN or Inf; of a dtype without such values always."""
    if dtype in ("complex64", "complex128"):
        dtype = {"complex64": "float32", "complex128": "float64"}[dtype]
    if dtype not in _BAD:
        return True
    kind, mask, least = _BAD[dtype]
    elements = np.frombuffer(content, kind)
    steps = (elements[at : at + _LOOK] for at in range(0, len(elements), _LOOK))
    return all(int((step & kind(mask)).max()) < least for step in steps)
