"""Holding a written merge against its sources: the same structure, every copied tensor byte for byte, and of every
computed one a sample of elements that are computed again, each by itself. All bytes are those that were written by the
hash of the writer."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.checkpoints.checkpoint import Checkpoint
from runner.checkpoints.detect import open_checkpoint
from runner.errors import CheckpointError, RunnerError
from runner.files.pickle_values import Tensor
from runner.files.safetensors_header import read_header
from runner.files.stored import all_finite, equal, place_of, places
from runner.files.tensors import file_offset, load_pickle, read_pickle
from runner.merge.lazy_tensor import LazyTensor, as_bytes, name_of
from runner.merge.plan import MergeOutput, TensorFile
from runner.merge.sink import Written

# Elements of each computed tensor that are computed again.
SAMPLE = 64


def check_structure(written: Path, output: MergeOutput) -> Checkpoint:
    """The checkpoint that a reader finds in `written`.

    Raises RunnerError unless names, dtypes, shapes and order of its tensors are as planned.
    """
    checkpoint = open_checkpoint(written, output.format)
    checkpoint.require_complete()
    wanted = [(name, tensor.dtype_name, tensor.shape) for name, tensor in output.weights.items()]
    if [(name, info.dtype_name, info.shape) for name, info in checkpoint.weights.infos.items()] != wanted:
        raise RunnerError(f"{written}: verification failed: names, shapes or order of its tensors are not as planned")
    return checkpoint


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A tensor that a reader finds in a file: dtype, shape, and where its bytes, in order, begin."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What should stand at a place of a file: the bytes of `tensor`, which `name` is the way to."""

    name: str
    offset: int
    tensor: LazyTensor


def comparisons(
    written: Path,
    files: Iterable[TensorFile],
    on_bytes: Callable[[int], None] = lambda count: None,
    runs: Mapping[str, Sequence[Written]] | None = None,
) -> dict[str, "SourceComparison"]:
    """A watcher for each of `files` in `written`: where its reader finds each tensor, the sources' bytes must stand.

    `on_bytes` hears how many bytes each comparison took. `runs`: of a file whose tensors were copied, what was written
    beside them.
    Raises RunnerError where the values beside the tensors, or names, dtypes and shapes, are not those of `files`.
    """
    found = {}
    for file in files:
        path, beside = written / file.name, (runs or {}).get(file.name, ())
        value: Any = file.value
        if file.is_safetensors:
            value = {name: file.value.get(name) for name in sorted(file.value)}
            inside: Any = _safetensors(path)
        elif all(tensor.stored is not None for tensor in file.tensors):
            inside = _records(path, read_pickle(path))
        else:
            inside = load_pickle(path, tensors="meta")
        found[file.name] = SourceComparison(
            path, expected(path, "", value, inside), on_bytes, beside, finite=file.finite
        )
    return found


def _safetensors(path: Path) -> dict[str, Placed]:
    header = read_header(path)
    entries = sorted(header.entries.items())
    return {
        name: Placed(dtype=entry.dtype, shape=entry.shape, offset=header.data + entry.begin) for name, entry in entries
    }


def _records(path: Path, value: Any) -> Any:
    """The content of a torch.save file with its top tensors placed, read without torch."""
    found = places(path)

    def placed(item: Any) -> Any:
        if not isinstance(item, Tensor):
            return item
        stored = place_of(item, found)
        return None if stored is None else Placed(dtype=item.dtype, shape=tuple(item.shape), offset=stored.offset)

    return {name: placed(item) for name, item in value.items()} if isinstance(value, dict) else value


def expected(file: Path, at: str, wanted: Any, found: Any) -> Iterator[Expected]:
    """The tensors inside `wanted`, at their places in `file`, as whose content `found` was read.

    `at` is the way to this value. Raises RunnerError where they differ in anything but the bytes of tensors.
    """
    if isinstance(wanted, LazyTensor):
        place = found if found is None or isinstance(found, Placed) else _placed(found)
        if place is None or (place.dtype, place.shape) != (wanted.dtype_name, wanted.shape):
            raise _differs(file, at)
        yield Expected(name=at, offset=place.offset, tensor=wanted)
    elif isinstance(wanted, Mapping):
        if not isinstance(found, Mapping) or list(found) != list(wanted):
            raise _differs(file, at)
        for key, value in wanted.items():
            yield from expected(file, f"{at}.{key}", value, found[key])
    elif isinstance(wanted, (list, tuple)):
        if type(found) is not type(wanted) or len(found) != len(wanted):
            raise _differs(file, at)
        for number, value in enumerate(wanted):
            yield from expected(file, f"{at}[{number}]", value, found[number])
    elif type(wanted) is not type(found) or not (wanted == found or (wanted != wanted and found != found)):
        raise _differs(file, at)


def _placed(tensor: Any) -> Placed | None:
    """None for what is no tensor of torch, and where its elements do not stand in order."""
    if not hasattr(tensor, "untyped_storage") or not tensor.is_contiguous():
        return None
    offset = file_offset(tensor) if tensor.numel() else 0
    return Placed(dtype=name_of(tensor.dtype), shape=tuple(tensor.shape), offset=offset)


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """Bytes that must stand at `start`: of the tensor `name`; `dtype` where they must be finite as well."""

    name: str
    start: int
    wanted: memoryview
    tensor: LazyTensor
    dtype: str | None = None


class SourceComparison:
    """Holds a file's content, which comes in order, against the tensors that should lie in it.

    Calling it raises RunnerError for the first tensor of which another byte, or none, is found, CheckpointError for one
    with NaN or Inf that was not looked for while it was written.
    """

    def __init__(
        self,
        file: Path,
        places: Iterable[Expected],
        on_bytes: Callable[[int], None],
        beside: Sequence[Written] = (),
        *,
        finite: bool = False,
    ) -> None:
        self._file = file
        self._on_bytes = on_bytes
        self._pieces = _pieces(file, sorted(places, key=lambda place: place.offset), finite and bool(beside))
        self._piece = next(self._pieces, None)
        self._beside = list(beside)
        self._digest = hashlib.sha256()

    def __call__(self, offset: int, content: memoryview) -> None:
        """Compare `content`, which begins at `offset`; an empty one is the end of the file."""
        self._look_beside(offset, content)
        end = offset + len(content)
        while self._piece is not None:
            piece = self._piece
            start, stop = piece.start, piece.start + len(piece.wanted)
            if content and start >= end:
                return
            low, high = max(start, offset), min(stop, end)
            if high <= low or not equal(
                content[low - offset : high - offset], piece.wanted[low - start : high - start]
            ):
                raise _differs(self._file, piece.name)
            if piece.dtype is not None:
                size = piece.tensor.itemsize
                first, last = (low - start) // size * size, -(-(high - start) // size) * size
                if not all_finite(piece.wanted[first:last], piece.dtype):
                    raise not_finite(piece.tensor)
            self._on_bytes(high - low)
            if stop > end:
                return
            self._piece = next(self._pieces, None)

    def _look_beside(self, offset: int, content: memoryview) -> None:
        """Hold what was written between the copied tensors against its hash."""
        end = offset + len(content)
        while self._beside and (self._beside[0].offset < end or not content):
            run = self._beside[0]
            stop = run.offset + run.size
            self._digest.update(content[max(run.offset - offset, 0) : stop - offset])
            if stop > end:
                if not content:
                    raise _differs(self._file, "its end")
                return
            if self._digest.hexdigest() != run.sha256:
                raise RunnerError(f"{self._file}: verification failed: what stands beside the tensors was changed")
            self._digest = hashlib.sha256()
            self._beside.pop(0)


def not_finite(tensor: LazyTensor) -> CheckpointError:
    """The error for a tensor that may not hold NaN or Inf."""
    return CheckpointError(f"{tensor.origin}: NaN or Inf; such weights are not merged")


def _pieces(file: Path, places: Iterable[Expected], finite: bool) -> Iterator[_Piece]:
    """Name, place and bytes of every part. Raises RunnerError where tensors overlap or give too few or many parts."""
    at = 0
    for place in places:
        tensor, name = place.tensor, place.name
        begin = place.offset if tensor.numel else at
        if begin < at:
            raise _differs(file, name)
        at = begin
        if tensor.stored is not None:
            if tensor.nbytes:
                dtype = tensor.dtype_name if finite else None
                yield _Piece(name=name, start=begin, wanted=tensor.stored.view, tensor=tensor, dtype=dtype)
            at = begin + tensor.stored.size
        else:
            for offset, wanted in _sample(tensor) if tensor.computed else _whole(tensor):
                yield _Piece(name=name, start=begin + offset, wanted=wanted, tensor=tensor)
                at = begin + offset + len(wanted)
            if tensor.computed:
                at = begin + tensor.nbytes
        if at != begin + tensor.nbytes:
            raise _differs(file, name)


def _whole(tensor: LazyTensor) -> Iterator[tuple[int, memoryview]]:
    """All of its bytes, each piece with its offset."""
    at = 0
    for part in tensor.parts():
        content = as_bytes(part)
        yield at, content
        at += len(content)


def _sample(tensor: LazyTensor) -> Iterator[tuple[int, memoryview]]:
    """Some of its elements, computed one by one, each with its offset; of a small tensor all."""
    assert tensor.elements is not None, f"{tensor.origin}: computed, and has no elements by index"
    import torch

    count, size = tensor.numel, tensor.itemsize
    if count <= SAMPLE:
        places = torch.arange(count)
    else:
        seed = torch.Generator().manual_seed(count)
        drawn = torch.randint(count, (SAMPLE - 2,), generator=seed)
        places = torch.unique(torch.cat([drawn, torch.tensor([0, count - 1])]))
    content = as_bytes(tensor.elements(places).contiguous()) if count else memoryview(b"")
    for number, place in enumerate(places.tolist()):
        yield place * size, content[number * size : (number + 1) * size]


def _differs(file: Path, name: str) -> RunnerError:
    return RunnerError(f"{file}: verification failed: {name.lstrip('.')} is not what its source holds")
