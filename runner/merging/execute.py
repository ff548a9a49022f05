"""Writing a planned merge into a staged directory, one tensor at a time."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from runner.checkpoints import npt_delta
from runner.checkpoints.tensors import is_finite
from runner.errors import CheckpointError
from runner.merging.pieces import Piece, contained, replaced
from runner.merging.plan import Plan
from runner.merging.safetensors_file import write_safetensors
from runner.merging.sinks import new_file, write_json_files
from runner.merging.states import State
from runner.merging.torch_file import RECORD_BYTES, write_torch_file

# config.json, merge_summary.json and MANIFEST.json together.
SMALL_FILES = 1 << 16


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
    def states(self) -> dict[str, State]:
        """The states that there are, by the name of their file."""
        named = {npt_delta.TRAINING_STATE: self.training_state, npt_delta.MULTI_LAYER_STATE: self.multi_layer_state}
        return {name: state for name, state in named.items() if state is not None}

    @property
    def findings(self) -> tuple[str, ...]:
        """What the user should know."""
        states = (*self.states.values(), self.config)
        return (*self.plan.findings, *(finding for state in states for finding in state.findings))

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors: what takes the time."""
        return sum(piece.nbytes for piece in self._pieces())

    @property
    def expected_bytes(self) -> int:
        """About how much space the output takes, never less."""
        return sum(piece.nbytes + RECORD_BYTES for piece in self._pieces()) + SMALL_FILES

    def _pieces(self) -> Iterator[Piece]:
        yield from self.weights.values()
        for state in self.states.values():
            yield from contained(state.content)


def write_tensors(
    partial: Path,
    content: Content,
    on_bytes: Callable[[int], None] = lambda count: None,
    hashes: dict[str, str] | None = None,
) -> list[str]:
    """Write weights and states into `partial`; `on_bytes` hears how many bytes each write took.

    `hashes` receives the SHA-256 of each file by its name. Returns what the user should know of the states' tensors.
    Raises CheckpointError where a weight is NaN or Inf, OSError where the disk fails.
    """
    hashes = {} if hashes is None else hashes
    weights = {name: watched(piece, refuse) for name, piece in content.weights.items()}
    with new_file(partial / content.weights_file, on_bytes) as sink:
        if content.format == "safetensors":
            write_safetensors(sink, weights)
        else:
            write_torch_file(sink, Path(content.weights_file).stem, weights)
        hashes[content.weights_file] = sink.sha256()
    bad: dict[str, None] = {}

    def note(piece: Piece) -> None:
        bad[piece.origin] = None

    for name, state in content.states.items():
        with new_file(partial / name, on_bytes) as sink:
            write_torch_file(sink, Path(name).stem, replaced(state.content, lambda piece: watched(piece, note)))
            hashes[name] = sink.sha256()
    return [f"{origin}: NaN or Inf, written as it is" for origin in bad]


def write_texts(partial: Path, content: Content, summary: Mapping[str, Any]) -> None:
    """Write config.json and merge_summary.json into `partial`. Raises OSError where the disk fails."""
    write_json_files(partial, {npt_delta.CONFIG: content.config.content, npt_delta.MERGE_SUMMARY: summary})


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
