"""`task=diff`: what differs between two checkpoints, tensor by tensor."""

import math
from pathlib import Path

from runner.checkpoints.checkpoint import Checkpoint
from runner.checkpoints.detect import open_checkpoint
from runner.checkpoints.runs import resolve
from runner.config import DiffConfig
from runner.errors import CheckpointError, ConfigError
from runner.families.family import Auto
from runner.merge.difference import Row, differences, match
from runner.results import Result, versions
from runner.tasks.context import Context
from runner.tasks.naming import check_family, checkpoint_path


def run(config: DiffConfig, context: Context) -> Result:
    """Compare every tensor of `ckpt` with that of `reference`. Raises ConfigError or CheckpointError."""
    if config.reference is None:
        raise ConfigError("reference= is needed: the checkpoint that ckpt= is compared with")
    path = Path(config.reference).expanduser()
    if not path.exists():
        raise CheckpointError(f"reference={config.reference}: no such file or directory")
    with context.timed("open"):
        first = open_checkpoint(checkpoint_path(config), config.format.name, config.format.module)
        check_family(config, first)
        second = open_checkpoint(resolve(path, by_step=False))
    names = match(*(Auto().of(each).canonical_names(each) for each in (first, second)))
    with context.timed("compare"):
        tracked = context.track(differences(first, second, names), "comparing", total=len(names.common))
        tensors = list(tracked)
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
            "equal_tensors": sum(row["equal"] for row in tensors),
            "changed_tensors": sum(not row["equal"] for row in tensors),
            "only_in_ckpt": names.only_in_first,
            "only_in_reference": names.only_in_second,
            "tensors": tensors,
            "totals": _totals(tensors),
        },
    )


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
