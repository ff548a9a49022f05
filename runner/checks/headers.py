"""Names, shapes and dtypes of a weights file. For safetensors neither torch nor anything else heavy is imported."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from runner.checkpoints.content import Kind, kind_of
from runner.checkpoints.strict_json import parse_object
from runner.errors import CheckpointError

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
_DTYPES = {
    "F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2),
    "I64": ("int64", 8), "I32": ("int32", 4), "I16": ("int16", 2), "I8": ("int8", 1),
    "U64": ("uint64", 8), "U32": ("uint32", 4), "U16": ("uint16", 2), "U8": ("uint8", 1), "BOOL": ("bool", 1),
    "C64": ("complex64", 8), "F8_E4M3": ("float8_e4m3fn", 1), "F8_E5M2": ("float8_e5m2", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
}  # fmt: skip
_HEADER_LIMIT = 16 << 20


@dataclass(frozen=True, kw_only=True)
class TensorHeader:
    """What a file says of a tensor; `dtype` as torch calls it."""

    shape: tuple[int, ...]
    dtype: str
    itemsize: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return prod(self.shape) * self.itemsize

    @property
    def is_floating(self) -> bool:
        """Whether it can be a weight."""
        return self.dtype.startswith(("float", "bfloat"))


@dataclass(frozen=True, kw_only=True)
class Header:
    """The tensors of one weights file, wrapper prefixes taken off; `extras`: names of what else a .pt holds."""

    file: Path
    tensors: Mapping[str, TensorHeader]
    extras: tuple[str, ...] = ()
    prefix: str = field(default="", compare=False)

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def read_header(path: Path, state_dict_key: str | None = None) -> Header:
    """The header of one weights file, told by its content.

    `state_dict_key`: where the tensors stand in a .pt that holds more. Raises CheckpointError that names what is wrong
    with the file: missing, empty, truncated, bytes added, or something else than weights.
    """
    if kind_of(path) is Kind.SAFETENSORS:
        return Header(file=path, tensors=_safetensors(path))
    from runner.checkpoints.tensors import open_weights

    source = open_weights(path, state_dict_key=state_dict_key)
    tensors = {
        name: TensorHeader(shape=info.shape, dtype=str(info.dtype).removeprefix("torch."), itemsize=info.dtype.itemsize)
        for name, info in source.infos.items()
    }
    return Header(file=path, tensors=tensors, extras=tuple(source.extras), prefix=source.stripped_prefix)


def _safetensors(path: Path) -> dict[str, TensorHeader]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _HEADER_LIMIT:
            raise CheckpointError(f"{path}: a safetensors header of {length} bytes; the limit is 16 MB")
        if 8 + length > size:
            raise CheckpointError(f"{path}: truncated at byte {size}: the header reaches byte {8 + length}")
        content = parse_object(file.read(length), path, "safetensors header")
    content.pop("__metadata__", None)
    tensors, end = {}, 0
    for name, entry in content.items():
        tensors[name], begin = _entry(path, name, entry)
        end = max(end, begin + tensors[name].nbytes)
    if 8 + length + end > size:
        raise CheckpointError(f"{path}: truncated at byte {size}: its tensors reach byte {8 + length + end}")
    if 8 + length + end < size:
        raise CheckpointError(f"{path}: {size - 8 - length - end} bytes after the last tensor belong to no tensor")
    return tensors


def _entry(path: Path, name: str, entry: object) -> tuple[TensorHeader, int]:
    """A tensor of the header, and where its bytes begin; whether they overlap is for the reader of the tensors."""
    if isinstance(entry, dict):
        shape, offsets = entry.get("shape"), entry.get("data_offsets")
        dtype = _DTYPES.get(str(entry.get("dtype")))
        if dtype is not None and _sizes(shape) and _sizes(offsets) and len(offsets) == 2:  # type: ignore[arg-type]
            tensor = TensorHeader(shape=tuple(shape), dtype=dtype[0], itemsize=dtype[1])  # type: ignore[arg-type]
            if offsets[0] + tensor.nbytes == offsets[1]:  # type: ignore[index]
                return tensor, offsets[0]  # type: ignore[index]
    raise CheckpointError(f"{path}: {name}: its shape, dtype and place in the header contradict each other")


def _sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 62 for item in value)
