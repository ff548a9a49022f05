"""Writing a planned merge into a staged directory, one tensor at a time."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from runner.errors import CheckpointError
from runner.families.npt import checkpoint as npt_delta
from runner.files.tensors import is_finite
from runner.merge.lazy_tensor import Piece, contained, replaced
from runner.merge.plan import Plan
from runner.merge.sources import Source
from runner.merge.training_state import State
from runner.merge.writer import RECORD_BYTES, new_file, write_safetensors, write_torch_file

# Bytes allowed for config.json, merge_summary.json, MANIFEST.json and the like, each.
SMALL_FILE = 1 << 16


@dataclass(frozen=True, kw_only=True)
class TensorFile:
    """One file with tensors, `name` relative to the output. `value`: plain containers with `Piece`s in them.

    A name that ends in .safetensors chooses that layout, with `metadata` in its header; any other is torch.save's.
    `finite`: NaN or Inf is refused; else it is written as it is, and said.
    """

    name: str
    value: Mapping[Any, Any]
    metadata: Mapping[str, str] = field(default_factory=dict)
    finite: bool = True

    @property
    def is_safetensors(self) -> bool:
        """Whether it is written as safetensors, where `value` is `Piece`s by name."""
        return self.name.endswith(".safetensors")

    @property
    def pieces(self) -> list[Piece]:
        """Its tensors."""
        return contained(self.value)


@dataclass(frozen=True, kw_only=True)
class Content:
    """Everything that a merge writes. `format` is pt or safetensors, that of the weights."""

    plan: Plan
    format: str
    training_state: State | None
    multi_layer_state: State | None
    config: State

    @property
    def weights_file(self) -> str:
        """The name of the weights file."""
        return f"npt_weights.{self.format}"

    @property
    def weights(self) -> dict[str, Piece]:
        """The weights by name, in their order."""
        return {tensor.name: tensor.piece for tensor in self.plan.tensors}

    @property
    def tensor_files(self) -> tuple[TensorFile, ...]:
        """The files with tensors: the weights, then the states that there are."""
        named = {npt_delta.TRAINING_STATE: self.training_state, npt_delta.MULTI_LAYER_STATE: self.multi_layer_state}
        states = {name: state.content for name, state in named.items() if state is not None}
        return (
            TensorFile(name=self.weights_file, value=self.weights),
            *(TensorFile(name=name, value=content, finite=False) for name, content in states.items()),
        )

    @property
    def findings(self) -> tuple[str, ...]:
        """What the user should know."""
        states = (self.training_state, self.multi_layer_state, self.config)
        return (*self.plan.findings, *(finding for state in states if state for finding in state.findings))

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors: what takes the time."""
        return nbytes(self.tensor_files)

    @property
    def sources(self) -> tuple[Source, ...]:
        """What is merged."""
        return self.plan.sources

    @property
    def texts(self) -> dict[str, Mapping[str, Any]]:
        """The content of JSON files by name."""
        return {npt_delta.CONFIG: self.config.content}


def nbytes(files: Iterable[TensorFile]) -> int:
    """The bytes of all tensors of `files`: what takes the time."""
    return sum(piece.nbytes for file in files for piece in file.pieces)


def expected_bytes(files: Iterable[TensorFile], small: int) -> int:
    """About how much space `files` and a number of small ones take, never less."""
    return sum(piece.nbytes + RECORD_BYTES for file in files for piece in file.pieces) + SMALL_FILE * small


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

    def note(piece: Piece) -> None:
        bad[piece.origin] = None

    for file in files:
        value = replaced(dict(file.value), partial(watched, on_bad=refuse if file.finite else note))
        path = directory / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path, on_bytes) as sink:
            if file.is_safetensors:
                write_safetensors(sink, value, file.metadata)
            else:
                write_torch_file(sink, path.stem, value)
            hashes[file.name] = sink.sha256()
    return [f"{origin}: NaN or Inf, written as it is" for origin in bad]


def refuse(piece: Piece) -> None:
    """What `watched` calls for a weight that is not finite. Raises CheckpointError."""
    raise CheckpointError(f"{piece.origin}: NaN or Inf; such weights are not merged")


def watched(piece: Piece, on_bad: Callable[[Piece], None]) -> Piece:
    """The same piece, which calls `on_bad` for a part with NaN or Inf."""

    def parts() -> Iterator[torch.Tensor]:
        for part in piece.parts():
            if not is_finite(part):
                on_bad(piece)
            yield part

    return replace(piece, parts=parts)
