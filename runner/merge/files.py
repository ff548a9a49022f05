"""What a merge of another format than npt_delta writes: several files, each written and read back piece by piece."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.checkpoints.checkpoint import Checkpoint
from runner.checkpoints.detect import open_checkpoint
from runner.errors import RunnerError
from runner.merge.execute import TensorFile, nbytes
from runner.merge.lazy_tensor import Piece
from runner.merge.spec import SourceSpec


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
    def parameters(self) -> int:
        """Number of weights."""
        return sum(piece.numel for piece in self.weights.values())

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors."""
        return nbytes(self.tensor_files)


def check_written(partial: Path, files: Files) -> Checkpoint:
    """The written checkpoint as a reader opens it. Raises RunnerError unless its names and shapes are as planned."""
    checkpoint = open_checkpoint(partial, files.format)
    checkpoint.require_complete()
    wanted = {name: (piece.dtype, piece.shape) for name, piece in files.weights.items()}
    found = {name: (info.dtype, info.shape) for name, info in checkpoint.weights.infos.items()}
    if found != wanted:
        raise RunnerError(f"{partial}: verification failed: names or shapes of its tensors are not as planned")
    return checkpoint
