"""Weights behind one interface: names, shapes and dtypes from headers; tensors one at a time from mapped files.

Nothing in a torch.save file is executed, and what is foreign in it becomes an inert record. torch is imported when a
tensor is read: for headers nothing heavy is needed.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from runner.errors import CheckpointError
from runner.files.file_type import Kind, kind_of
from runner.files.safetensors_header import check_keys, read_header, read_index
from runner.files.stubs import FUNCTIONS, STAND_INS, Inert
from runner.installation import first_torch

if TYPE_CHECKING:
    import torch

    from runner.files.archive import Archive, Crcs
    from runner.files.pickle_values import Tensor

__all__ = ["Inert", "file_offset", "load_pickle", "map_pickle", "read_pickle"]

Key = TypeVar("Key", bound=int | str)
# torch's table of allowed names belongs to the process, not to the call.
_LOCK = threading.Lock()
_INERT_GLOBALS: list[Any] = [(stand_in, name) for name, stand_in in (STAND_INS | FUNCTIONS).items()]


@dataclass(frozen=True, kw_only=True)
class Mapped:
    """The object of a torch.save file whose tensors are views of the mapped file, and the way to their CRCs.

    `records`: the same object as the checker saw it (pickle_records). `crcs`: None in the old layout, which has none.
    """

    content: Any
    records: Any
    crcs: Crcs | None


def load_pickle(path: Path, *, tensors: Literal["meta", "mmap"] = "meta") -> Any:
    """The object that torch.save wrote to `path`, checked before it is loaded.

    With `tensors="meta"` its tensors have shape and dtype only and no tensor data is read; with "mmap" they are
    views of the mapped file (of memory, in the old layout that cannot be mapped), and the CRC of every record is
    compared first. Foreign objects are `Inert`. Raises CheckpointError.
    """
    if tensors == "mmap":
        from runner.files.archive import require_crc

        content = map_pickle(path).content
        require_crc(path)
        return content
    _check(path)
    return _load(path, {"map_location": "meta"})


def read_pickle(path: Path) -> Any:
    """As `load_pickle`, without torch: tensors are the records of the checker, with shape, dtype and size."""
    from runner.files.pickle_values import value_of

    checked = _check(path)
    try:
        return value_of(checked.value)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged, or not a dict of plain tensors ({error})") from error


def is_tensor(value: object) -> bool:
    """Whether it is a tensor of torch, or what `read_pickle` gives for one; told without torch."""
    return hasattr(value, "itemsize") and hasattr(value, "numel") and not isinstance(value, type)


def map_pickle(path: Path) -> Mapped:
    """`load_pickle(tensors="mmap")` for who compares the CRCs of the records that he reads. Raises CheckpointError."""
    from runner.files.archive import Crcs

    checked = _check(path)
    content = _load(path, {"map_location": "cpu", "mmap": checked.kind is Kind.ZIP})
    crcs = None if checked.archive is None else Crcs(checked.archive)
    return Mapped(content=content, records=checked.value, crcs=crcs)


def _load(path: Path, options: dict[str, Any]) -> Any:
    with first_torch():
        import torch

    try:
        # The old layout keeps its data in one stream, which torch would read through even for shapes alone.
        skip = torch.serialization.skip_data() if options["map_location"] == "meta" else nullcontext()
        with _LOCK, skip, torch.serialization.safe_globals(_INERT_GLOBALS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, weights_only=True, **options)
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError, OSError,
            EOFError, pickle.UnpicklingError) as error:  # fmt: skip
        # torch's own text is left out: it advises to switch the safe loading off.
        raise CheckpointError(
            f"{path}: torch cannot load this file ({type(error).__name__}): damaged, or not a dict of plain tensors"
        ) from error


def file_offset(tensor: torch.Tensor) -> int:
    """Where in its file the first byte of a tensor lies that `load_pickle(tensors="meta")` gave; not the old layout."""
    storage: Any = tensor.untyped_storage()
    return int(storage._checkpoint_offset + tensor.storage_offset() * tensor.itemsize)


@dataclass(frozen=True, kw_only=True)
class _Checked:
    path: Path
    kind: Kind
    archive: Archive | None = None
    value: Any = None


# The files that were checked last, by what changes with them: one is opened for its headers, and then for its tensors.
_CHECKED: OrderedDict[tuple[int, ...], _Checked] = OrderedDict()
_REMEMBERED = 8


def _check(path: Path) -> _Checked:
    from runner.files.archive import identity, is_settled

    file = identity(path) if path.is_file() else ()
    if file in _CHECKED and _CHECKED[file].path == path:
        return _CHECKED[file]
    checked = _checked(path)
    if is_settled(file):
        _CHECKED[file] = checked
        while len(_CHECKED) > _REMEMBERED:
            _CHECKED.popitem(last=False)
    return checked


def _checked(path: Path) -> _Checked:
    from runner.files.archive import check_archive, check_legacy
    from runner.files.pickle_check import scan

    kind = kind_of(path)
    if kind is Kind.SAFETENSORS:
        raise CheckpointError(f"{path}: not a torch.save file: its content is safetensors")
    if path.name.endswith(".safetensors"):
        raise CheckpointError(f"{path}: a torch.save file named .safetensors: rename it to .pt")
    if kind is Kind.LEGACY:
        return _Checked(path=path, kind=kind, value=check_legacy(path))
    archive = check_archive(path)
    found = scan(io.BytesIO(archive.pickle), path)
    records = archive.records
    for key, storage in found.storages.items():
        size = records.get(key)
        if size != storage.record_bytes:
            holds = "is missing" if size is None else f"holds {size}"
            raise CheckpointError(f"{path}: storage {key} needs {storage.record_bytes} bytes, its record {holds}")
    return _Checked(path=path, kind=kind, archive=archive, value=found.value)


_PREFIXES = ("_orig_mod.", "module.")


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """What a header says of a tensor; `dtype_name` as torch calls it, as float32."""

    name: str
    shape: tuple[int, ...]
    dtype_name: str
    itemsize: int

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor | Tensor) -> TensorInfo:
        """That of a tensor in memory, or of its record."""
        dtype = str(tensor.dtype).removeprefix("torch.")
        return cls(name=name, shape=tuple(tensor.shape), dtype_name=dtype, itemsize=tensor.itemsize)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype itself, for which torch is imported."""
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype_name)
        return dtype

    @property
    def is_floating(self) -> bool:
        """Whether it can be a weight."""
        return self.dtype_name.startswith(("float", "bfloat"))

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * self.itemsize


@dataclass(frozen=True, kw_only=True)
class TensorSource:
    """The tensors of one checkpoint, whatever files they lie in. Nothing but headers is read until `read`.

    `path` is what the user named, `files` the weight files, `infos` the tensors in file order, `extras` what a .pt
    holds beside its tensors (as `read_pickle` gives it) or the metadata of a safetensors file, `stripped_prefix` what
    was removed from the front of every name.
    """

    path: Path
    files: tuple[Path, ...]
    infos: Mapping[str, TensorInfo]
    extras: Mapping[str, Any] = field(default_factory=dict)
    stripped_prefix: str = ""
    reader: Callable[[str], torch.Tensor] = field(repr=False)
    stored: Callable[[str], memoryview | None] = field(default=lambda name: None, repr=False)

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(info.nbytes for info in self.infos.values())

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name`, a view of the mapped file where its layout allows. Raises CheckpointError."""
        info = self.infos.get(name)
        if info is None:
            raise CheckpointError(f"{self.path}: no tensor named {name}")
        tensor = self.reader(self.stripped_prefix + name)
        if tuple(tensor.shape) != info.shape or tensor.dtype != info.dtype:
            raise CheckpointError(f"{self.path}: {name}: changed since it was opened")
        return tensor

    def bytes_of(self, name: str) -> memoryview | None:
        """The elements of the tensor `name` in order, as they are stored, read without torch; None where they are not
        in one piece. Raises CheckpointError."""
        return self.stored(self.stripped_prefix + name)

    def numbers(self, name: str) -> list[Any]:
        """The elements of a small tensor as Python's numbers. Raises CheckpointError."""
        stored, dtype = self.bytes_of(name), self.infos[name].dtype_name
        if stored is None or dtype not in _NUMBERS:
            return self.read(name).flatten().tolist()
        return _numbers(dtype, stored)


def open_weights(path: Path, *, state_dict_key: str | None = None) -> TensorSource:
    """One weights file (torch.save, either layout, or safetensors), told by its content.

    With `state_dict_key` the tensors stand in the dict under that key of the pickle and all else goes to `extras`;
    a bare state dict is accepted too, where that key is absent. Raises CheckpointError.
    """
    return _without_prefix(_open_file(path, state_dict_key))


def open_sharded(index: Path) -> TensorSource:
    """The tensors of a sharded checkpoint, from `model.safetensors.index.json` or `pytorch_model.bin.index.json`.

    Raises CheckpointError unless every shard is a plain file beside the index, every listed tensor is in the shard
    that the index names and in no other, and no shard is left out.
    """
    listed = read_index(index)
    sources = {name: _open_file(index.parent / name, None) for name in dict.fromkeys(listed.values())}
    check_keys(index, listed, {shard: source.infos for shard, source in sources.items()})
    infos = {name: info for source in sources.values() for name, info in source.infos.items()}
    files = tuple(source.path for source in sources.values())
    return _without_prefix(
        TensorSource(
            path=index,
            files=files,
            infos=infos,
            reader=lambda name: sources[listed[name]].read(name),
            stored=lambda name: sources[listed[name]].bytes_of(name),
        )
    )


# How struct reads an element; bfloat16 is the upper half of a float32, and the others are read by torch.
_NUMBERS = {
    "float64": "d", "float32": "f", "float16": "e", "int64": "q", "int32": "i", "int16": "h", "int8": "b", "uint8": "B",
    "bool": "?", "bfloat16": "f",
}  # fmt: skip


def _numbers(dtype: str, stored: memoryview) -> list[Any]:
    data: bytes | memoryview = stored
    if dtype == "bfloat16":
        data = b"".join(b"\0\0" + bytes(stored[at : at + 2]) for at in range(0, len(stored), 2))
    return [number for (number,) in struct.iter_unpack(f"<{_NUMBERS[dtype]}", data)]


def read_number(path: Path, name: str) -> Any:
    """The one element of the tensor under `name` in the dict of the torch.save file `path`; no other is read.

    Raises CheckpointError.
    """
    tensor, stored = _PickleBytes(path, None).find(name)
    if stored is None or tensor.dtype not in _NUMBERS:
        return _PickleReader(path, None).read(name).item()
    return _numbers(tensor.dtype, stored)[0]


def _open_file(path: Path, state_dict_key: str | None) -> TensorSource:
    """One weights file with its names as they stand in it."""
    if kind_of(path) is Kind.SAFETENSORS:
        return _open_safetensors(path)
    content = _mapping(path, read_pickle(path))
    nested = state_dict_key if state_dict_key in content else None
    extras = {str(key): value for key, value in content.items() if key != nested} if nested else {}
    state = _mapping(path, content[nested]) if nested else content
    tensors = {key: value for key, value in state.items() if isinstance(key, str) and is_tensor(value)}
    at = f"{nested}." if nested else ""
    extras |= {f"{at}{key}": value for key, value in state.items() if key not in tensors}
    infos = {key: TensorInfo.of(key, t) for key, t in tensors.items()}
    return TensorSource(
        path=path,
        files=(path,),
        infos=infos,
        extras=extras,
        reader=_PickleReader(path, nested).read,
        stored=lambda name: _PickleBytes(path, nested).find(name)[1],
    )


def _open_safetensors(path: Path) -> TensorSource:
    header = read_header(path)
    infos = {
        name: TensorInfo(name=name, shape=entry.shape, dtype_name=entry.dtype, itemsize=entry.itemsize)
        for name, entry in header.entries.items()
    }

    def stored(name: str) -> memoryview:
        from runner.files.archive import mapped

        entry = header.entries[name]
        return mapped(path)[header.data + entry.begin : header.data + entry.end]

    reader = _SafetensorsReader(path).read
    return TensorSource(
        path=path, files=(path,), infos=infos, extras=dict(header.metadata), reader=reader, stored=stored
    )


def _without_prefix(source: TensorSource) -> TensorSource:
    """`source` without the wrapper prefixes (torch.compile's, DataParallel's) that all of its names have."""
    prefix = ""
    names = list(source.infos)
    while names:
        found = next((p for p in _PREFIXES if all(name.startswith(prefix + p) for name in names)), None)
        if found is None:
            break
        prefix += found
    short = {name: name.removeprefix(prefix) for name in names}
    infos = {short[name]: replace(info, name=short[name]) for name, info in source.infos.items()}
    return replace(source, infos=infos, stripped_prefix=prefix)


def _mapping(path: Path, value: Any) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{path}: holds a {type(value).__name__}, not a dict of tensors")
    return value


class _PickleReader:
    """Reads tensors of one torch.save file, mapped on the first read; the CRC of what is read is compared first."""

    def __init__(self, path: Path, nested: str | None) -> None:
        self._path = path
        self._nested = nested

    @cached_property
    def _mapped(self) -> Mapped:
        return map_pickle(self._path)

    @cached_property
    def _state(self) -> Mapping[Any, Any]:
        content = _mapping(self._path, self._mapped.content)
        return _mapping(self._path, content.get(self._nested)) if self._nested else content

    @cached_property
    def _records(self) -> Mapping[Any, Any]:
        from runner.files.pickle_values import entries

        records = entries(self._mapped.records)
        return entries(records.get(self._nested)) if self._nested else records

    def read(self, name: str) -> torch.Tensor:
        import torch

        tensor = self._state.get(name)
        if not isinstance(tensor, torch.Tensor):
            raise CheckpointError(f"{self._path}: {name}: changed since it was opened")
        if self._mapped.crcs is not None:
            from runner.files.archive import STORAGE
            from runner.files.pickle_values import Tensor

            record = self._records.get(name)
            if not isinstance(record, Tensor):
                raise CheckpointError(f"{self._path}: {name}: its record is not known")
            self._mapped.crcs.check(f"{STORAGE}{record.storage.key}")
        return tensor.detach()


class _PickleBytes:
    """The stored bytes of tensors of one torch.save file, without torch; the CRC of what is read is compared first."""

    def __init__(self, path: Path, nested: str | None) -> None:
        self._path = path
        self._nested = nested

    def find(self, name: str) -> tuple[Tensor, memoryview | None]:
        """The tensor's record, and its elements in order; None for those of the old layout, or not in one piece."""
        from runner.files.archive import STORAGE, Crcs
        from runner.files.pickle_values import Tensor, entries

        checked = _check(self._path)
        records = entries(checked.value)
        tensor = (entries(records.get(self._nested)) if self._nested else records).get(name)
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{self._path}: {name}: changed since it was opened")
        whole = tensor.storage.count * tensor.storage.item_bytes == tensor.storage.record_bytes
        if checked.archive is None or not tensor.is_contiguous or not whole:
            return tensor, None
        record = Crcs(checked.archive).read(f"{STORAGE}{tensor.storage.key}")
        start = tensor.offset * tensor.itemsize
        return tensor, record[start : start + tensor.nbytes]


class _SafetensorsReader:
    """Reads tensors of one safetensors file, mapped on the first read."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @cached_property
    def _file(self) -> Any:
        from safetensors import safe_open

        return safe_open(self._path, framework="pt", device="cpu")

    def read(self, name: str) -> torch.Tensor:
        from safetensors import SafetensorError

        try:
            return self._file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self._path}: {name}: cannot be read ({error})") from error


def owned(tensors: Mapping[Key, torch.Tensor]) -> dict[Key, torch.Tensor]:
    """Copies on the CPU, each with a storage of its own: a file of them is no larger than they are."""
    import torch

    return {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }


def non_finite(source: TensorSource, names: Iterable[str] | None = None) -> list[str]:
    """The names of the tensors (all, or those of `names`) that hold NaN or Inf, read one at a time."""
    chosen = source.infos if names is None else names
    return [name for name in chosen if not is_finite(source.read(name))]


def is_finite(tensor: torch.Tensor, chunk: int = 1 << 22) -> bool:
    """Whether no element is NaN or Inf, looked at `chunk` elements at a time; whole numbers always are."""
    import torch

    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    flat = tensor.detach().reshape(-1)
    if flat.dtype.is_complex:
        flat = torch.view_as_real(flat).reshape(-1)
    for start in range(0, flat.numel(), chunk):
        part = flat[start : start + chunk]
        part = part.float() if part.dtype.itemsize == 1 else part
        # The extremes carry any NaN or Inf, in one pass and without a mask of the tensor's size.
        if not all(math.isfinite(extreme.item()) for extreme in torch.aminmax(part)):
            return False
    return True
