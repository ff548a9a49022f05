"""torch.save's format, written without torch: a zip archive of stored records. `data.pkl`, in which each storage is a
persistent id, then a record for each storage, its bytes at a multiple of 64 so that it can be mapped.

The same values give the same bytes, whatever wrote them, and `torch.load(weights_only=True, mmap=True)` reads it.
"""

import io
import pickle
import struct
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runner.merge.lazy_tensor import LazyTensor, as_bytes
from runner.merge.sink import Sink

ALIGNMENT = 64
# Sizes and offsets from here on have the zip64 form.
_LIMIT = (1 << 31) - 1
_STORAGES = {
    "float64": "DoubleStorage", "float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage",
    "int64": "LongStorage", "int32": "IntStorage", "int16": "ShortStorage", "int8": "CharStorage",
    "uint8": "ByteStorage", "bool": "BoolStorage", "complex128": "ComplexDoubleStorage",
    "complex64": "ComplexFloatStorage",
}  # fmt: skip
_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s4B4H3L5H2L")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_END = struct.Struct("<4s4H2LH")
# 1 January 1980, as torch writes: no time in the file.
_DATE = 33
# The CRC and sizes follow the content; names are UTF-8 where they are no ASCII.
_FOLLOWS, _UTF8 = 0x8, 0x800


def write_torch_file(sink: Sink, folder: str, value: Any) -> None:
    """Write `value`, plain containers of plain values and `LazyTensor`s, as torch.save would.

    `folder` is that of the archive. Raises OSError, TypeError for other values, and what the tensors raise.
    """
    tensors: list[LazyTensor] = []
    archive = _Archive(sink)
    pickled = io.BytesIO()
    _Pickler(pickled, tensors).dump(value)
    archive.add(f"{folder}/data.pkl", pickled.getvalue())
    # No `.format_version`, which promises that records follow each other as miniz lays them out: these are larger by
    # some bytes where one lies beyond 2 GB, and torch would calculate offsets instead of reading.
    archive.add(f"{folder}/byteorder", b"little")
    for number, tensor in enumerate(tensors):
        archive.add_tensor(f"{folder}/data/{number}", tensor)
    archive.add(f"{folder}/version", b"3\n")
    archive.close()


@dataclass(frozen=True)
class _Global:
    """A name that the pickle refers to."""

    module: str
    name: str


@dataclass(frozen=True)
class _Storage:
    """The storage of one tensor, which the pickle names and does not hold."""

    identity: tuple[Any, ...]


_PLAIN = (dict, list, tuple, str, bytes, int, float, bool, type(None), complex, type, OrderedDict)


if TYPE_CHECKING:

    class _PythonPickler(pickle.Pickler):
        """What typeshed does not say of the pickler in Python."""

        write: Callable[[bytes], object]

        def save(self, value: Any, save_persistent_id: bool = True) -> None:
            """Pickle one value."""

else:
    _PythonPickler = pickle._Pickler


class _Pickler(_PythonPickler):
    """Pickles a `LazyTensor` as torch pickles a tensor over a storage of its own.

    The pickler in Python, since the one in C refers only to what is imported.
    """

    def __init__(self, file: io.BytesIO, tensors: list[LazyTensor]) -> None:
        super().__init__(file, protocol=2)
        # Without it the bytes would depend on which equal strings happen to be one object.
        self.fast = True
        self._tensors = tensors

    def persistent_id(self, value: Any) -> Any:
        """That of a storage."""
        return value.identity if isinstance(value, _Storage) else None

    def save(self, value: Any, save_persistent_id: bool = True) -> None:
        """Pickle one value. Raises TypeError for what is no plain one."""
        if isinstance(value, LazyTensor):
            function, arguments = self._made_of(value)
            self.save(function)
            self.save(arguments)
            self.write(pickle.REDUCE)
        elif isinstance(value, _Global):
            self.write(pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode())
        elif type(value) in _PLAIN or isinstance(value, _Storage) or _is_known(value):
            super().save(value, save_persistent_id)
        else:
            raise TypeError(f"a {type(value).__name__} cannot be written into a checkpoint")

    def _made_of(self, tensor: LazyTensor) -> tuple[_Global, tuple[Any, ...]]:
        key = str(len(self._tensors))
        self._tensors.append(tensor)
        name = _STORAGES.get(tensor.dtype_name)
        kind = _Global("torch", name) if name else _Global("torch.storage", "UntypedStorage")
        storage = _Storage(("storage", kind, key, "cpu", tensor.numel if name else tensor.nbytes))
        arguments: tuple[Any, ...] = (storage, 0, tensor.shape, _strides(tensor.shape), False, OrderedDict())
        if name:
            return _Global("torch._utils", "_rebuild_tensor_v2"), arguments
        return _Global("torch._utils", "_rebuild_tensor_v3"), (*arguments, _Global("torch", tensor.dtype_name))


def _is_known(value: Any) -> bool:
    """A dtype of torch, or what makes bytes under the pickle protocol that torch reads."""
    kind = type(value)
    return (kind.__module__, kind.__name__) == ("torch", "dtype") or getattr(value, "__module__", "") == "_codecs"


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * max(size, 1))
    return tuple(strides) if shape else ()


@dataclass(frozen=True, kw_only=True)
class _Record:
    """What the directory at the end says of a record."""

    name: bytes
    flags: int
    crc: int
    size: int
    offset: int


class _Archive:
    """A zip file that is only appended to; its records are stored as they are."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._records: list[_Record] = []

    def add(self, name: str, content: bytes) -> None:
        """A record of these bytes."""
        offset, flags = self._begin(name, len(content))
        self._sink.write(content)
        self._end(name, flags, zlib.crc32(content), len(content), offset)

    def add_tensor(self, name: str, tensor: LazyTensor) -> None:
        """A record of a tensor: copied from file to file where it is stored, with the CRC that its file knows."""
        offset, flags = self._begin(name, tensor.nbytes)
        crc = size = 0
        if tensor.stored is not None and tensor.stored.crc is not None and self._sink.copies(tensor.stored):
            crc, size = tensor.stored.crc, self._sink.copy(tensor.stored)
        else:
            for part in tensor.parts():
                content = as_bytes(part)
                crc = zlib.crc32(content, crc)
                size += self._sink.write(content)
        assert size == tensor.nbytes, f"{tensor.origin}: {size} bytes instead of {tensor.nbytes}"
        self._end(name, flags, crc, size, offset)

    def _begin(self, name: str, size: int) -> tuple[int, int]:
        """The header of a record, padded so that the content stands at a multiple of ALIGNMENT, as torch pads."""
        encoded = name.encode()
        flags = _FOLLOWS | (0 if name.isascii() else _UTF8)
        offset = self._sink.size
        large = size > _LIMIT
        # Sizes of a long record, which follow the content; then the padding that torch writes.
        extra = struct.pack("<2H2Q", 1, 16, 0, 0) if large else b""
        padding = -(offset + _LOCAL.size + len(encoded) + len(extra) + 4) % ALIGNMENT
        extra += b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
        sizes = (0xFFFFFFFF, 0xFFFFFFFF) if large else (0, 0)
        version = 45 if large else 20
        header = _LOCAL.pack(b"PK\x03\x04", version, flags, 0, 0, _DATE, 0, *sizes, len(encoded), len(extra))
        self._sink.write(header + encoded + extra)
        return offset, flags

    def _end(self, name: str, flags: int, crc: int, size: int, offset: int) -> None:
        form = "<4sLQQ" if size > _LIMIT else "<4sLLL"
        self._sink.write(struct.pack(form, b"PK\x07\x08", crc, size, size))
        self._records.append(_Record(name=name.encode(), flags=flags, crc=crc, size=size, offset=offset))

    def close(self) -> None:
        """The directory of the records, and where it lies."""
        start = self._sink.size
        for record in self._records:
            self._sink.write(b"".join(_entry(record)))
        size, count = self._sink.size - start, len(self._records)
        if start > _LIMIT or size > _LIMIT or count > 0xFFFF:
            end64 = self._sink.size
            self._sink.write(_END64.pack(b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, start))
            self._sink.write(_LOCATOR.pack(b"PK\x06\x07", 0, end64, 1))
        listed = min(count, 0xFFFF)
        place = (min(size, 0xFFFFFFFF), 0xFFFFFFFF if start > _LIMIT else start)
        self._sink.write(_END.pack(b"PK\x05\x06", 0, 0, listed, listed, *place, 0))


def _entry(record: _Record) -> Iterator[bytes]:
    large = record.size > _LIMIT
    beyond = record.offset > _LIMIT
    numbers = [record.size, record.size] * large + [record.offset] * beyond
    extra = struct.pack(f"<2H{len(numbers)}Q", 1, 8 * len(numbers), *numbers) if numbers else b""
    version = 45 if numbers else 20
    size = 0xFFFFFFFF if large else record.size
    yield _CENTRAL.pack(
        b"PK\x01\x02", version, 0, version, 0, record.flags, 0, 0, _DATE, record.crc, size, size, len(record.name),
        len(extra), 0, 0, 0, 0o600 << 16, 0xFFFFFFFF if beyond else record.offset,
    )  # fmt: skip
    yield record.name + extra
