"""What a merge of another format than npt_delta writes: several files, each written and read back piece by piece."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

from runner.checkpoints.checkpoint import Checkpoint
from runner.checkpoints.detect import open_checkpoint
from runner.checkpoints.pickles import load_pickle
from runner.checkpoints.tensors import open_weights
from runner.errors import RunnerError
from runner.merging.execute import SMALL_FILES, refuse, watched
from runner.merging.pieces import Piece, contained, from_source, replaced
from runner.merging.safetensors_file import write_safetensors
from runner.merging.sinks import new_file
from runner.merging.spec import SourceSpec
from runner.merging.torch_file import RECORD_BYTES, write_torch_file
from runner.merging.verify import check_piece, check_value


@dataclass(frozen=True, kw_only=True)
class OpenedSource:
    """One source: what the user asked of it, its path as the user names it, and the checkpoint there."""

    spec: SourceSpec
    path: Path
    checkpoint: Checkpoint
    files: tuple[Path, ...]  # all that the merge reads

    @property
    def step(self) -> int | None:
        """The step that its own state reports, else that of its name."""
        return self.checkpoint.step


@dataclass(frozen=True, kw_only=True)
class TensorFile:
    """One file with tensors, `name` relative to the output. `value`: plain containers with `Piece`s in them.

    A name that ends in .safetensors chooses that layout, with `metadata` in its header; any other is torch.save's.
    """

    name: str
    value: Mapping[Any, Any]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_safetensors(self) -> bool:
        """Whether it is written as safetensors, where `value` is `Piece`s by name."""
        return self.name.endswith(".safetensors")


@dataclass(frozen=True, kw_only=True)
class Files:
    """Everything that such a merge writes.

    `weights`: the tensors as the format names them when the output is read; they are those of `tensor_files`.
    `texts`: the content of JSON files by name. `summary`: that of merge_summary.json, without the hashes of inputs.
    `details`: fields of the result. `computed`: whether weights are computed, rather than copied.
    """

    format: str
    family: str
    sources: tuple[OpenedSource, ...]
    weights: Mapping[str, Piece]
    tensor_files: tuple[TensorFile, ...]
    texts: Mapping[str, Mapping[str, Any]]
    summary: Mapping[str, Any]
    details: Mapping[str, Any]
    step: int | None
    findings: tuple[str, ...] = ()
    conflicts: tuple[Mapping[str, Any], ...] = ()
    computed: bool = False

    @property
    def inputs(self) -> tuple[Path, ...]:
        """The files that are read, each once."""
        return tuple(dict.fromkeys(file for source in self.sources for file in source.files))

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(piece.numel for piece in self.weights.values())

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors."""
        return sum(piece.nbytes for file in self.tensor_files for piece in contained(dict(file.value)))

    @property
    def expected_bytes(self) -> int:
        """About how much space the output takes, never less."""
        pieces = [piece for file in self.tensor_files for piece in contained(dict(file.value))]
        return sum(piece.nbytes + RECORD_BYTES for piece in pieces) + SMALL_FILES * (1 + len(self.texts))


def write_files(partial: Path, files: Files, on_bytes: Callable[[int], None], hashes: dict[str, str]) -> None:
    """Write the files with tensors into `partial`; `hashes` receives the SHA-256 of each by its name.

    Raises CheckpointError where a weight is NaN or Inf, OSError where the disk fails.
    """
    for file in files.tensor_files:
        path = partial / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        value = replaced(dict(file.value), lambda piece: watched(piece, refuse))
        with new_file(path, on_bytes) as sink:
            if file.is_safetensors:
                write_safetensors(sink, value, file.metadata)
            else:
                write_torch_file(sink, path.stem, value)
            hashes[file.name] = sink.sha256()


def check_written(partial: Path, files: Files) -> Checkpoint:
    """The written checkpoint as a reader opens it. Raises RunnerError unless its names and shapes are as planned."""
    checkpoint = open_checkpoint(partial, files.format)
    checkpoint.require_complete()
    wanted = {name: (piece.dtype, piece.shape) for name, piece in files.weights.items()}
    found = {name: (info.dtype, info.shape) for name, info in checkpoint.weights.infos.items()}
    if found != wanted:
        raise RunnerError(f"{partial}: verification failed: names or shapes of its tensors are not as planned")
    return checkpoint


def check_files(partial: Path, files: Files, stop: Event | None = None) -> None:
    """Compare every tensor, byte by byte, with what the sources give. Raises RunnerError for another byte.

    Returns early, with nothing proved, once `stop` is set.
    """
    for file in files.tensor_files:
        path = partial / file.name
        if not file.is_safetensors:
            check_value(path, "", file.value, load_pickle(path, tensors="mmap"))
            continue
        written = open_weights(path)
        check_value(path, "", sorted(file.value), sorted(written.infos))
        for name, piece in file.value.items():
            if stop and stop.is_set():
                return
            check_piece(path, name, piece, from_source(written, written.infos[name]))
