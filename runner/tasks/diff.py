"""`task=diff`: what differs between two checkpoints, tensor by tensor, in parts: no two tensors are in memory whole."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from runner.checkpoints.checkpoint import Checkpoint, dtype_name
from runner.checkpoints.detect import open_checkpoint
from runner.checkpoints.runs import resolve
from runner.config import DiffConfig
from runner.errors import CheckpointError, ConfigError
from runner.families.family import Auto
from runner.files.tensors import TensorInfo
from runner.merge.lazy_tensor import from_source
from runner.results import Result, versions
from runner.tasks.context import Context, check_family, checkpoint_path

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Names:
    """The tensors of two checkpoints by what they have in common: `common[name]` are the names in each file."""

    only_in_first: list[str]
    only_in_second: list[str]
    common: Mapping[str, tuple[str, str]]


def match(first: Mapping[str, str], second: Mapping[str, str]) -> Names:
    """Pair the tensors of one name; both by the name that they are compared by → the name in the file."""
    return Names(
        only_in_first=[name for name in first if name not in second],
        only_in_second=[name for name in second if name not in first],
        common={name: (first[name], second[name]) for name in first if name in second},
    )


def differences(first: Checkpoint, second: Checkpoint, names: Names) -> Iterator[Row]:
    """One row a common tensor: shapes and dtypes where they differ, else mse, cosine and the largest difference.

    `equal`: bit for bit. Figures in float64: `relative` is the norm of the difference over that of the second; NaN or
    Inf where a tensor holds such.
    """
    for name, (ours, theirs) in names.common.items():
        a, b = first.weights.infos[ours], second.weights.infos[theirs]
        row: Row = {"name": name, "shape": list(a.shape), "dtype": dtype_name(a.dtype)}
        if a.dtype != b.dtype:
            row["reference_dtype"] = dtype_name(b.dtype)
        if a.shape != b.shape:
            yield {**row, "reference_shape": list(b.shape), "equal": False}
        else:
            yield {**row, **_figures(first, a, second, b)}


def _figures(first: Checkpoint, a: TensorInfo, second: Checkpoint, b: TensorInfo) -> Row:
    squares = dot = length_a = length_b = largest = 0.0
    equal = a.dtype == b.dtype
    for ours, theirs in zip(from_source(first.weights, a).parts(), from_source(second.weights, b).parts(), strict=True):
        equal = equal and torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
        x, y = ours.double(), theirs.double()
        change = x - y
        squares, largest = squares + float(change @ change), max(largest, float(change.abs().max()))
        dot, length_a, length_b = dot + float(x @ y), length_a + float(x @ x), length_b + float(y @ y)
    norm = math.sqrt(length_a) * math.sqrt(length_b)
    return {
        "equal": equal,
        "mse": squares / max(a.numel, 1),
        "cosine": dot / norm if norm else (1.0 if length_a == length_b else 0.0),
        "max_abs": largest if math.isfinite(squares) else math.nan,  # max() passes over NaN
        "relative": math.sqrt(squares / length_b) if length_b else (0.0 if not squares else math.inf),
    }


def run(config: DiffConfig, context: Context) -> Result:
    """Compare every tensor of `ckpt` with that of `reference`. Raises ConfigError or CheckpointError."""
    if config.reference is None:
        raise ConfigError("reference= is needed: the checkpoint that ckpt= is compared with")
    path = Path(config.reference).expanduser()
    if not path.exists():
        raise CheckpointError(f"reference={config.reference}: no such file or directory")
    with context.timed("open"):
        first = open_checkpoint(checkpoint_path(config), config.format.name, config.format.module, config.family)
        check_family(config, first)
        second = open_checkpoint(resolve(path, by_step=False))
    names = match(*(Auto().of(each).canonical_names(each) for each in (first, second)))
    with context.timed("compare"):
        tracked = context.track(differences(first, second, names), "comparing", total=len(names.common))
        tensors = list(tracked)
    relation = _relation(tensors, names)
    return Result(
        task="diff",
        ckpt=str(first.path),
        reference=str(second.path),
        step=first.step,
        family=first.family,
        format=first.format,
        findings=[*_findings(tensors), *_notes(first), *_notes(second)],
        timing=context.timing,
        versions=versions(),
        details={
            "identical": not names.only_in_first and not names.only_in_second and all(row["equal"] for row in tensors),
            "relation": relation,
            "equal_tensors": sum(row["equal"] for row in tensors),
            "changed_tensors": sum(not row["equal"] for row in tensors),
            "only_in_ckpt": names.only_in_first,
            "only_in_reference": names.only_in_second,
            "tensors": tensors,
            "totals": _totals(tensors),
        },
    )


# Weights of one origin: training moves them by less than this share of their norm, and hardly turns them.
_RELATIVE, _COSINE = 0.5, 0.9


def _relation(tensors: list[Row], names: Names) -> str:
    """What the first is to the second, in words: identical, a fine-tune of it (or it of the first), or unrelated.

    By the tensors of one name and shape: models of one origin stay close, direction by direction; of those trained
    apart the matrices stand at right angles, however alike their norms are.
    """
    rows = [row for row in tensors if "mse" in row]
    if tensors and all(row["equal"] for row in tensors) and not names.only_in_first and not names.only_in_second:
        return "identical"
    # A vector of ones, as a norm begins with, is alike in all models.
    matrices = [row for row in rows if len(row["shape"]) > 1 and math.isfinite(row["mse"])]
    if not matrices:
        return "no matrix in common, so nothing is told"
    sizes = [math.prod(row["shape"]) for row in matrices]
    near = [
        size
        for row, size in zip(matrices, sizes, strict=True)
        if row["equal"] or (row["cosine"] >= _COSINE and row["relative"] <= _RELATIVE)
    ]
    share = sum(near) / sum(sizes)
    if share >= 0.9:
        return f"a fine-tune of one another: {share:.0%} of the common matrices' elements are near"
    if share <= 0.1:
        return f"unrelated: {share:.0%} of the common matrices' elements are near"
    return f"partly related: {share:.0%} of the common matrices' elements are near"


def _totals(tensors: list[Row]) -> Row:
    """Over all elements of the tensors that have one shape in both."""
    rows = [row for row in tensors if "mse" in row]
    counts = [math.prod(row["shape"]) for row in rows]
    if not sum(counts):
        return {}
    mse = sum(row["mse"] * count for row, count in zip(rows, counts, strict=True)) / sum(counts)
    return {"elements": sum(counts), "mse": mse, "max_abs": max(row["max_abs"] for row in rows)}


def _findings(tensors: list[Row]) -> list[str]:
    bad = [row["name"] for row in tensors if "mse" in row and not math.isfinite(row["mse"])]
    shown = f"{', '.join(bad[:5])}{' …' if len(bad) > 5 else ''}"
    return [f"NaN or Inf in one of the two: no figures for {shown}"] if bad else []


def _notes(checkpoint: Checkpoint) -> list[str]:
    return [f"{checkpoint.path}: {finding}" for finding in checkpoint.findings]
