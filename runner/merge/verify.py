"""Holding a written merge against its sources: the same structure, every copied tensor byte for byte, and of every
computed one a sample of elements that are computed again, each by itself. All bytes are those that were written by the
hash of the writer."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from runner.checkpoints.checkpoint import Checkpoint
from runner.checkpoints.detect import open_checkpoint
from runner.errors import RunnerError
from runner.files.safetensors_header import read_header
from runner.files.tensors import file_offset, load_pickle
from runner.merge.lazy_tensor import LazyTensor, as_bytes
from runner.merge.plan import MergeOutput, TensorFile

# Elements of each computed tensor that are computed again.
SAMPLE = 64


def check_structure(written: Path, output: MergeOutput) -> Checkpoint:
    """The checkpoint that a reader finds in `written`.

    Raises RunnerError unless names, dtypes, shapes and order of its tensors are as planned.
    """
    checkpoint = open_checkpoint(written, output.format)
    checkpoint.require_complete()
    wanted = [(name, tensor.dtype, tensor.shape) for name, tensor in output.weights.items()]
    if [(name, info.dtype, info.shape) for name, info in checkpoint.weights.infos.items()] != wanted:
        raise RunnerError(f"{written}: verification failed: names, shapes or order of its tensors are not as planned")
    return checkpoint


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A tensor that a reader finds in a file: dtype, shape, and where its bytes, in order, begin."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What should stand at a place of a file: the bytes of `tensor`, which `name` is the way to."""

    name: str
    offset: int
    tensor: LazyTensor


def comparisons(
    written: Path, files: Iterable[TensorFile], on_bytes: Callable[[int], None] = lambda count: None
) -> dict[str, "SourceComparison"]:
    """A watcher for each of `files` in `written`: where its reader finds each tensor, the sources' bytes must stand.

    `on_bytes` hears how many bytes each comparison took.
    Raises RunnerError where the values beside the tensors, or names, dtypes and shapes, are not those of `files`.
    """
    found = {}
    for file in files:
        path = written / file.name
        if file.is_safetensors:
            value: Any = {name: file.value.get(name) for name in sorted(file.value)}
            inside = _safetensors(path)
        else:
            value, inside = file.value, load_pickle(path, tensors="meta")
        found[file.name] = SourceComparison(path, expected(path, "", value, inside), on_bytes)
    return found


def _safetensors(path: Path) -> dict[str, Placed]:
    header = read_header(path)
    entries = sorted(header.entries.items())
    return {
        name: Placed(dtype=getattr(torch, entry.dtype), shape=entry.shape, offset=header.data + entry.begin)
        for name, entry in entries
    }


def expected(file: Path, at: str, wanted: Any, found: Any) -> Iterator[Expected]:
    """The tensors inside `wanted`, at their places in `file`, as whose content `found` was read.

    `at` is the way to this value. Raises RunnerError where they differ in anything but the bytes of tensors.
    """
    if isinstance(wanted, LazyTensor):
        place = _placed(found) if isinstance(found, torch.Tensor) else found
        if not isinstance(place, Placed) or (place.dtype, place.shape) != (wanted.dtype, wanted.shape):
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


def _placed(tensor: torch.Tensor) -> Placed | None:
    """None where its elements do not stand in order."""
    if not tensor.is_contiguous():
        return None
    return Placed(dtype=tensor.dtype, shape=tuple(tensor.shape), offset=file_offset(tensor) if tensor.numel() else 0)


class SourceComparison:
    """Holds a file's content, which comes in order, against the tensors that should lie in it.

    Calling it raises RunnerError for the first tensor of which another byte, or none, is found.
    """

    def __init__(self, file: Path, places: Iterable[Expected], on_bytes: Callable[[int], None]) -> None:
        self._file = file
        self._on_bytes = on_bytes
        self._parts = _parts(file, sorted(places, key=lambda place: place.offset))
        self._part = next(self._parts, None)

    def __call__(self, offset: int, content: memoryview) -> None:
        """Compare `content`, which begins at `offset`; an empty one is the end of the file."""
        end = offset + len(content)
        while self._part is not None:
            name, start, wanted = self._part
            if content and start >= end:
                return
            low, high = max(start, offset), min(start + len(wanted), end)
            if high <= low or not _equal(content[low - offset : high - offset], wanted[low - start : high - start]):
                raise _differs(self._file, name)
            self._on_bytes(high - low)
            if start + len(wanted) > end:
                return
            self._part = next(self._parts, None)


def _parts(file: Path, places: Iterable[Expected]) -> Iterator[tuple[str, int, memoryview]]:
    """Name, place and bytes of every part. Raises RunnerError where tensors overlap or give too few or many parts."""
    at = 0
    for place in places:
        begin = place.offset if place.tensor.numel else at
        if begin < at:
            raise _differs(file, place.name)
        at = begin
        for offset, wanted in _sample(place.tensor) if place.tensor.computed else _whole(place.tensor):
            yield place.name, begin + offset, wanted
            at = begin + offset + len(wanted)
        if place.tensor.computed:
            at = begin + place.tensor.nbytes
        if at != begin + place.tensor.nbytes:
            raise _differs(file, place.name)


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
    count, size = tensor.numel, tensor.dtype.itemsize
    if count <= SAMPLE:
        places = torch.arange(count)
    else:
        seed = torch.Generator().manual_seed(count)
        drawn = torch.randint(count, (SAMPLE - 2,), generator=seed)
        places = torch.unique(torch.cat([drawn, torch.tensor([0, count - 1])]))
    content = as_bytes(tensor.elements(places).contiguous()) if count else memoryview(b"")
    for number, place in enumerate(places.tolist()):
        yield place * size, content[number * size : (number + 1) * size]


def _equal(first: memoryview, second: memoryview) -> bool:
    """Whether the same bytes stand in both: NaN equals NaN, and 0.0 does not equal -0.0."""
    return bool(np.array_equal(np.frombuffer(first, np.uint8), np.frombuffer(second, np.uint8)))


def _differs(file: Path, name: str) -> RunnerError:
    return RunnerError(f"{file}: verification failed: {name.lstrip('.')} is not what its source holds")
