"""Writes the files of a merge from tensors that never are in memory at once: each file is only appended to.

torch.save's format is a zip archive of stored records: `data.pkl`, in which each storage is a persistent id, then a
record for each storage, its bytes at a multiple of 64 so that it can be mapped. The same values give the same bytes,
whatever wrote them, and `torch.load(weights_only=True, mmap=True)` reads it.
"""

import codecs
import hashlib
import io
import json
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import BoundedSemaphore
from typing import Any

import torch
from torch import _utils

from runner.errors import CheckpointError
from runner.files.safetensors_header import DTYPES, MAX_HEADER_BYTES
from runner.files.staging import forget
from runner.files.tensors import is_finite
from runner.merge.lazy_tensor import LazyTensor, as_bytes, replaced
from runner.merge.plan import MergeOutput, TensorFile

# Smaller writes are gathered up to this many bytes.
BUFFER = 1 << 18
# Writes that may wait for the hash: each holds at most one part of a tensor.
_WAITING = 8
# Bytes allowed for config.json, merge_summary.json, MANIFEST.json and the like, each.
SMALL_FILE = 1 << 16
# What a record costs beside its bytes: local header and padding, data descriptor, directory entry, and its pickle.
RECORD_BYTES = 512
# After so many bytes the disk is told to begin, and the system to let go of what the disk has.
_BEHIND = 1 << 23


class Sink:
    """A new file. `write` takes any buffer and returns only when all of it is taken, or raises OSError.

    What is written is hashed beside the writing, so a buffer must not change afterwards.
    """

    def __init__(self, descriptor: int, on_bytes: Callable[[int], None], hashing: ThreadPoolExecutor) -> None:
        self._descriptor = descriptor
        self._on_bytes = on_bytes
        self._waiting = bytearray()
        self._hashing = hashing
        self._digest = hashlib.sha256()
        self._room = BoundedSemaphore(_WAITING)
        self._size = self._begun = self._gone = 0

    def write(self, data: "bytes | bytearray | memoryview") -> int:
        """Append `data`; its size in bytes."""
        view = memoryview(data).cast("B")
        if len(self._waiting) + len(view) > BUFFER:
            self.flush()
        if len(view) > BUFFER:
            self._write(view)
        else:
            self._waiting += view
        return len(view)

    def close(self) -> None:
        """Nothing: whoever opened the file closes it."""

    def flush(self) -> None:
        """Hand everything to the system."""
        waiting, self._waiting = self._waiting, bytearray()
        self._write(memoryview(waiting))

    def sha256(self) -> str:
        """The hash of all that was written so far, in hexadecimal."""
        self.flush()
        return self._hashing.submit(self._digest.hexdigest).result()

    def _write(self, view: memoryview) -> None:
        self._room.acquire()
        self._hashing.submit(self._hash, view)
        while view:
            written = os.write(self._descriptor, view)
            view = view[written:]
            self._size += written
            self._on_bytes(written)
        if self._size - self._begun >= _BEHIND:
            # What the disk begins with now can be let go at the next call.
            forget(self._descriptor, self._gone, self._size - self._gone)
            self._gone, self._begun = self._begun, self._size

    def _hash(self, view: memoryview) -> None:
        self._digest.update(view)
        self._room.release()


@contextmanager
def new_file(path: Path, on_bytes: Callable[[int], None] = lambda count: None) -> Iterator[Sink]:
    """Create `path`, which must not exist, and give it to be written; `on_bytes` hears how many bytes it took."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="hashing") as hashing:
            sink = Sink(descriptor, on_bytes, hashing)
            yield sink
            sink.flush()
    finally:
        os.close(descriptor)


def expected_bytes(output: MergeOutput) -> int:
    """About how much space `output` takes, never less."""
    tensors = [tensor for file in output.tensor_files for tensor in file.tensors]
    small = len(output.texts) + 4  # the summary, the manifest, the card
    copies = sum(len(each) if isinstance(each, bytes) else each.stat().st_size for each in output.copies.values())
    return copies + sum(tensor.nbytes + RECORD_BYTES for tensor in tensors) + SMALL_FILE * small


def write_tensors(
    directory: Path,
    files: Iterable[TensorFile],
    on_bytes: Callable[[int], None] = lambda count: None,
    hashes: dict[str, str] | None = None,
) -> list[str]:
    """Write `files` into `directory`; `on_bytes` hears how many bytes each write took.

    `hashes` receives the SHA-256 of each file by its name. Returns what the user should know of tensors that are not
    finite. Raises CheckpointError where such a tensor is refused, OSError where the disk fails.
    """
    hashes = {} if hashes is None else hashes
    bad: dict[str, None] = {}

    def note(tensor: LazyTensor) -> None:
        bad[tensor.origin] = None

    for file in files:
        value = replaced(dict(file.value), partial(_watched, on_bad=_refuse if file.finite else note))
        path = directory / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path, on_bytes) as sink:
            if file.is_safetensors:
                write_safetensors(sink, value, file.metadata)
            else:
                write_torch_file(sink, path.stem, value)
            hashes[file.name] = sink.sha256()
    return [f"{origin}: NaN or Inf, written as it is" for origin in bad]


def _refuse(tensor: LazyTensor) -> None:
    raise CheckpointError(f"{tensor.origin}: NaN or Inf; such weights are not merged")


def _watched(tensor: LazyTensor, on_bad: Callable[[LazyTensor], None]) -> LazyTensor:
    """The same tensor, which calls `on_bad` for a part with NaN or Inf."""

    def parts() -> Iterator[torch.Tensor]:
        for part in tensor.parts():
            if not is_finite(part):
                on_bad(tensor)
            yield part

    return replace(tensor, parts=parts)


def write_json_files(directory: Path, texts: Mapping[str, Mapping[str, Any]]) -> None:
    """Write new JSON files into `directory` by their names. Raises OSError where the disk fails."""
    for name, values in texts.items():
        with new_file(directory / name) as sink:
            text = json.dumps(dict(values), indent=2, ensure_ascii=False) + "\n"
            # Half a surrogate pair, as of a path that is no UTF-8, stands in JSON as its escape.
            sink.write(text.encode(errors="backslashreplace"))


def write_files(directory: Path, files: Mapping[str, bytes | str | Path]) -> None:
    """Write new files into `directory` by their names: their content, or the file that they copy."""
    for name, content in files.items():
        with new_file(directory / name) as sink:
            if isinstance(content, Path):
                content = content.read_bytes()
            sink.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)


ALIGNMENT = 64
_LIMIT = zipfile.ZIP64_LIMIT
_STORAGES = {
    torch.float64: torch.DoubleStorage, torch.float32: torch.FloatStorage, torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage, torch.int64: torch.LongStorage, torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage, torch.int8: torch.CharStorage, torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage, torch.complex128: torch.ComplexDoubleStorage,
    torch.complex64: torch.ComplexFloatStorage,
}  # fmt: skip

# What rebuilds tensors, and bytes under the pickle protocol that torch reads.
_FUNCTIONS = (_utils._rebuild_tensor_v2, _utils._rebuild_tensor_v3, codecs.encode)


def write_torch_file(sink: Sink, folder: str, value: Any) -> None:
    """Write `value`, plain containers of plain values and `LazyTensor`s, as torch.save would.

    `folder` is that of the archive. Raises OSError, TypeError for other values, and what the tensors raise.
    """
    tensors: list[LazyTensor] = []
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as archive:
        for name, content in _records(value, tensors):
            _write_bytes(archive, f"{folder}/{name}", content)
        for number, tensor in enumerate(tensors):
            _write_tensor(archive, f"{folder}/data/{number}", tensor)
        _write_bytes(archive, f"{folder}/version", b"3\n")


def _records(value: Any, tensors: list[LazyTensor]) -> Iterator[tuple[str, bytes]]:
    """The records before the storages; `tensors` receives what the pickle refers to, in order."""
    pickled = io.BytesIO()
    _Pickler(pickled, tensors).dump(value)
    yield "data.pkl", pickled.getvalue()
    # No `.format_version`, which promises that records follow each other as miniz lays them out: zipfile's are larger
    # by some bytes where one is empty or lies beyond 2 or 4 GB, and torch would calculate offsets instead of reading.
    yield "byteorder", b"little"


@dataclass(frozen=True)
class _Storage:
    """The storage of one tensor, which the pickle names and does not hold."""

    identity: tuple[Any, ...]


class _Pickler(pickle.Pickler):
    """Pickles a `LazyTensor` as torch pickles a tensor over a storage of its own."""

    def __init__(self, file: io.BytesIO, tensors: list[LazyTensor]) -> None:
        super().__init__(file, protocol=2)
        # Without it the bytes would depend on which equal strings happen to be one object.
        self.fast = True
        self._tensors = tensors

    def persistent_id(self, value: Any) -> Any:
        return value.identity if isinstance(value, _Storage) else None

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, LazyTensor):
            return self._reduce_tensor(value)
        if isinstance(value, (type, torch.dtype, OrderedDict, complex)) or value in _FUNCTIONS:
            return NotImplemented
        raise TypeError(f"a {type(value).__name__} cannot be written into a checkpoint")

    def _reduce_tensor(self, tensor: LazyTensor) -> Any:
        key = str(len(self._tensors))
        self._tensors.append(tensor)
        kind = _STORAGES.get(tensor.dtype)
        count = tensor.numel if kind else tensor.nbytes
        storage = _Storage(("storage", kind or torch.UntypedStorage, key, "cpu", count))
        arguments: tuple[Any, ...] = (storage, 0, tensor.shape, _strides(tensor.shape), False, OrderedDict())
        if kind:
            return _utils._rebuild_tensor_v2, arguments
        return _utils._rebuild_tensor_v3, (*arguments, tensor.dtype)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * max(size, 1))
    return tuple(strides) if shape else ()


def _write_bytes(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    with archive.open(_entry(archive, name, len(content)), "w") as record:
        record.write(content)


def _write_tensor(archive: zipfile.ZipFile, name: str, tensor: LazyTensor) -> None:
    entry = _entry(archive, name, tensor.nbytes)
    with archive.open(entry, "w", force_zip64=_is_large(tensor.nbytes)) as record:
        for part in tensor.parts():
            record.write(as_bytes(part))
    assert entry.file_size == tensor.nbytes, f"{tensor.origin}: {entry.file_size} bytes instead of {tensor.nbytes}"


def _entry(archive: zipfile.ZipFile, name: str, size: int) -> zipfile.ZipInfo:
    """A record's entry whose padding puts the content at a multiple of ALIGNMENT, as torch pads."""
    entry = _Entry(name, date_time=(1980, 1, 1, 0, 0, 0))
    entry.create_system = 0  # else it would tell on which system it was written
    entry.file_size = size
    start = archive.fp.tell() + 30 + len(name.encode()) + (20 if _is_large(size) else 0) + 4  # type: ignore[union-attr]
    padding = -start % ALIGNMENT
    entry.padding = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    return entry


def _is_large(size: int) -> bool:
    """Whether a record needs the zip64 form, by zipfile's own measure."""
    return size * 1.05 > _LIMIT


class _Entry(zipfile.ZipInfo):
    """An entry whose padding stands in its local header alone, and not in the archive's directory."""

    padding = b""

    def FileHeader(self, zip64: bool | None = None) -> bytes:
        self.extra = self.padding
        header = super().FileHeader(zip64)
        self.extra = b""
        return header


_NAMES = {getattr(torch, in_torch): name for name, (in_torch, _) in DTYPES.items()}


def write_safetensors(sink: Sink, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write `tensors` under their names, with `metadata` in the header.

    Raises OSError, CheckpointError for a dtype that safetensors does not have.
    """
    header, order = _header(tensors, metadata or {})
    sink.write(len(header).to_bytes(8, "little") + header)
    for name in order:
        for part in tensors[name].parts():
            sink.write(as_bytes(part))


def _header(tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]) -> tuple[bytes, list[str]]:
    """The header, padded to a multiple of 8, and the names in the order of their bytes."""
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise CheckpointError(
                f"{tensor.origin}: safetensors has no {tensor.dtype}; give merge.format=pt for {name}"
            )
    # Wide elements first, so that each tensor starts at a multiple of its element's size.
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    begin, offsets = 0, {}
    for name in order:
        offsets[name] = [begin, begin + tensors[name].nbytes]
        begin += tensors[name].nbytes
    entries = {
        name: {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets[name]}
        for name, tensor in tensors.items()
    }
    text = json.dumps({"__metadata__": {"format": "pt", **metadata}, **entries}, separators=(",", ":")).encode()
    padded = text + b" " * (-len(text) % 8)
    if len(padded) > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{len(tensors)} tensors need a safetensors header of {len(padded)} bytes; the limit is 16 MB"
        )
    return padded, order
