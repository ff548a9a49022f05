"""The header of a safetensors file, parsed strictly (the library lets the last of two equal keys win), and the index of
weights in several files: every shard inside the directory, every tensor in exactly one.

Nothing heavy is imported: the quick tier reads headers without torch.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.errors import CheckpointError
from runner.files.strict_json import parse_object, read_object

MAX_HEADER_BYTES = 16 << 20
# The format's name of a dtype → torch's, and the bytes of one element.
DTYPES = {
    "F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2),
    "I64": ("int64", 8), "I32": ("int32", 4), "I16": ("int16", 2), "I8": ("int8", 1),
    "U64": ("uint64", 8), "U32": ("uint32", 4), "U16": ("uint16", 2), "U8": ("uint8", 1), "BOOL": ("bool", 1),
    "C64": ("complex64", 8), "F8_E4M3": ("float8_e4m3fn", 1), "F8_E5M2": ("float8_e5m2", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor of the header: shape, dtype as torch calls it, and where its bytes begin and end behind the header."""

    shape: tuple[int, ...]
    dtype: str
    itemsize: int
    begin: int
    end: int


@dataclass(frozen=True, kw_only=True)
class Header:
    """A sound header: tensors in the order of the header, the file's metadata, and where in the file the data begin."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    data: int


def read_header(path: Path) -> Header:
    """Parse and check the header of the safetensors file `path`; its tensors are not read.

    The tensors must fill the file without holes, overlaps or trailing bytes. Raises CheckpointError.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{path}: a safetensors header of {length} bytes; the limit is {MAX_HEADER_BYTES >> 20} MB"
            )
        if 8 + length > size:
            raise CheckpointError(f"{path}: truncated at byte {size}: the header reaches byte {8 + length}")
        content = parse_object(file.read(length), path, "safetensors header")
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ of the safetensors header must map names to strings")
    entries = {name: _entry(path, name, value) for name, value in content.items()}
    _check_coverage(path, entries, size - 8 - length)
    return Header(entries=entries, metadata=metadata, data=8 + length)


def _entry(path: Path, name: str, value: Any) -> Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{path}: {name}: a tensor needs dtype, shape and data_offsets, and nothing else")
    dtype = DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(f"{path}: {name}: unknown dtype {value['dtype']!r}")
    shape, offsets = value["shape"], value["data_offsets"]
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2 or len(shape) > 64:
        raise CheckpointError(f"{path}: {name}: shape and data_offsets must be lists of whole numbers")
    name_in_torch, itemsize = dtype
    entry = Entry(shape=tuple(shape), dtype=name_in_torch, itemsize=itemsize, begin=offsets[0], end=offsets[1])
    needed = math.prod(shape) * itemsize
    if entry.end - entry.begin != needed:
        raise CheckpointError(
            f"{path}: {name}: shape {shape} of {value['dtype']} needs {needed} bytes, its offsets give "
            f"{entry.end - entry.begin}"
        )
    return entry


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 62 for item in value)


def _check_coverage(path: Path, entries: Mapping[str, Entry], available: int) -> None:
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin < end:
            raise CheckpointError(f"{path}: {name}: its bytes overlap those of another tensor")
        if entry.begin > end:
            raise CheckpointError(f"{path}: {name}: {entry.begin - end} bytes before it belong to no tensor")
        end = entry.end
    if end > available:
        header = path.stat().st_size - available
        raise CheckpointError(
            f"{path}: truncated at byte {header + available}: its tensors reach byte {header + end}; "
            "copy or download it again"
        )
    if end < available:
        raise CheckpointError(f"{path}: {available - end} bytes after the last tensor belong to no tensor")


MAX_INDEX_BYTES = 64 << 20


def read_index(index: Path) -> dict[str, str]:
    """Tensor name → shard name. Raises CheckpointError unless the shards are exactly the plain files beside `index`."""
    listed = read_object(index, "index", MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
        raise CheckpointError(f"{index}: the index has no weight_map from tensor names to file names")
    for name in dict.fromkeys(listed.values()):
        _check_shard(index, name)
    stem, _, extension = index.name.removesuffix(".index.json").rpartition(".")
    shard = re.compile(rf"{re.escape(stem)}-\d+-of-\d+\.{re.escape(extension)}")
    present = {path.name for path in index.parent.iterdir() if shard.fullmatch(path.name)}
    if unlisted := sorted(present - set(listed.values())):
        raise CheckpointError(f"{index}: shards that the index does not list: {', '.join(unlisted)}")
    return listed


def check_keys(index: Path, listed: Mapping[str, str], held: Mapping[str, Iterable[str]]) -> None:
    """Each tensor must be in the shard that lists it and in no other; `held`: shard → the names in it."""
    problems = []
    place: dict[str, str] = {}
    for shard, names in held.items():
        for name in names:
            if name in place:
                problems.append(f"{name} is in both {place[name]} and {shard}")
            elif name not in listed:
                problems.append(f"{name} of {shard} is not listed")
            elif listed[name] != shard:
                problems.append(f"{name} is listed in {listed[name]} and found in {shard}")
            place[name] = shard
    problems += [f"{name} is missing from {shard}" for name, shard in listed.items() if name not in place]
    if problems:
        raise CheckpointError(f"{index}: index and shards disagree: {'; '.join(sorted(problems))}")


def _check_shard(index: Path, name: str) -> None:
    """A shard must be a file in the directory of the index."""
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise CheckpointError(f"{index}: shard {name!r}: a shard must be a plain file name in the index's directory")
    path = index.parent / name
    if path.is_symlink() and not _in_hub_cache(path):
        raise CheckpointError(f"{index}: shard {name}: a symbolic link; put the file itself beside the index")
    if not path.is_file():
        raise CheckpointError(f"{index}: shard {name} is missing: copy or download it")


def _in_hub_cache(path: Path) -> bool:
    """Whether `path` is a link that the hub's cache made: snapshots/REVISION/NAME → blobs/HASH of one repository."""
    repository = path.absolute().parent.parent.parent
    return path.absolute().parent.parent.name == "snapshots" and path.resolve().parent == (
        (repository / "blobs").resolve()
    )
