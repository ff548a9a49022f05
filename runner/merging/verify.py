"""Holding a written merge against its sources: the same structure, and every tensor byte for byte."""

from collections.abc import Mapping
from pathlib import Path
from threading import Event
from typing import Any

import torch

from runner.checkpoints import npt_delta
from runner.checkpoints.detect import open_checkpoint
from runner.checkpoints.pickles import load_pickle
from runner.errors import RunnerError
from runner.merging.execute import Content
from runner.merging.pieces import Piece, from_source, split


def check_structure(written: Path, content: Content) -> list[int]:
    """The layers that a reader finds in `written`. Raises RunnerError unless they are those that were planned."""
    checkpoint = open_checkpoint(written, npt_delta.NAME)
    checkpoint.require_complete()
    planned = [layer.layer.summary() for layer in content.plan.layers]
    found = [layer.summary() for layer in checkpoint.layers]
    if found != planned:
        raise RunnerError(f"{written}: verification failed: its layers read back as {found} instead of {planned}")
    wanted = {name: (piece.dtype, piece.shape) for name, piece in content.weights.items()}
    infos = {name: (info.dtype, info.shape) for name, info in checkpoint.weights.infos.items()}
    if list(infos.items()) != list(wanted.items()):
        raise RunnerError(f"{written}: verification failed: names, shapes or order of its tensors are not as planned")
    return [layer["layer"] for layer in found]


def check_bytes(written: Path, content: Content, stop: Event | None = None) -> None:
    """Compare every tensor of weights and states with what the sources give. Raises RunnerError for another byte.

    Returns early, with nothing proved, once `stop` is set.
    """
    weights = open_checkpoint(written, npt_delta.NAME).weights
    for name, piece in content.weights.items():
        if stop and stop.is_set():
            return
        check_piece(written / content.weights_file, name, piece, from_source(weights, weights.infos[name]))
    for name, state in content.states.items():
        check_value(written / name, "", state.content, load_pickle(written / name, tensors="mmap"))


def check_value(file: Path, at: str, wanted: Any, found: Any) -> None:
    """Compare a value of `file` and all within it with what was planned. Raises RunnerError, with where (`at`)."""
    if isinstance(wanted, Piece):
        if not isinstance(found, torch.Tensor) or (found.dtype, tuple(found.shape)) != (wanted.dtype, wanted.shape):
            raise _differs(file, at)
        tensor = found
        check_piece(
            file,
            at,
            wanted,
            Piece(origin=at, dtype=tensor.dtype, shape=tuple(tensor.shape), parts=lambda: split(tensor)),
        )
    elif isinstance(wanted, Mapping):
        if not isinstance(found, Mapping) or list(found) != list(wanted):
            raise _differs(file, at)
        for key, value in wanted.items():
            check_value(file, f"{at}.{key}", value, found[key])
    elif isinstance(wanted, (list, tuple)):
        if type(found) is not type(wanted) or len(found) != len(wanted):
            raise _differs(file, at)
        for number, value in enumerate(wanted):
            check_value(file, f"{at}[{number}]", value, found[number])
    elif type(wanted) is not type(found) or not (wanted == found or (wanted != wanted and found != found)):
        raise _differs(file, at)


def check_piece(file: Path, name: str, wanted: Piece, found: Piece) -> None:
    """Compare two tensors byte by byte. Raises RunnerError where they differ."""
    for ours, theirs in zip(found.parts(), wanted.parts(), strict=True):
        # As whole numbers: bytes are compared, so that NaN equals NaN and 0.0 does not equal -0.0.
        if not torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)):
            raise _differs(file, name)


def _differs(file: Path, name: str) -> RunnerError:
    return RunnerError(f"{file}: verification failed: {name.lstrip('.')} is not what its source holds")
