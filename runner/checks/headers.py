"""Names, shapes and dtypes of a weights file. For safetensors neither torch nor anything else heavy is imported."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from runner.files import safetensors_header as safetensors_files
from runner.files.file_type import Kind, kind_of


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
        entries = safetensors_files.read_header(path).entries
        found = {name: TensorHeader(shape=e.shape, dtype=e.dtype, itemsize=e.itemsize) for name, e in entries.items()}
        return Header(file=path, tensors=found)
    from runner.files.tensors import open_weights

    source = open_weights(path, state_dict_key=state_dict_key)
    tensors = {
        name: TensorHeader(shape=info.shape, dtype=str(info.dtype).removeprefix("torch."), itemsize=info.dtype.itemsize)
        for name, info in source.infos.items()
    }
    return Header(file=path, tensors=tensors, extras=tuple(source.extras), prefix=source.stripped_prefix)
