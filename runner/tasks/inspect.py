"""`task=inspect`: what is in a checkpoint, from names, shapes and small files; time and memory do not grow with it."""

import re
from pathlib import Path
from typing import Any

from runner.checkpoints.checkpoint import Checkpoint, components, totals
from runner.checkpoints.detect import format_of, open_checkpoint
from runner.checkpoints.runs import Run, find_run
from runner.config import InspectConfig
from runner.errors import RunnerError
from runner.results import Result, versions
from runner.tasks.context import DEMO, Context, checkpoint_path

# The part of a name that says which component a tensor belongs to: up to the first number, or the first two words.
_GROUP = re.compile(r"^((?:[^.]*\.)??[^.]*?\d+[^.]*|[^.]+(?:\.[^.\d]+)?)")


def run(config: InspectConfig, context: Context) -> Result:
    """Describe the checkpoint, or list the run directory. Raises CheckpointError or ConfigError."""
    with context.timed("open"):
        run_directory = (
            None if config.ckpt == DEMO or config.step is not None else find_run(Path(config.ckpt).expanduser())
        )
        if run_directory is not None and len(run_directory.checkpoints) > 1:
            return _run_table(run_directory, config, context)
        checkpoint = open_checkpoint(checkpoint_path(config), config.format.name, config.format.module, config.family)
    config.family.of(checkpoint)
    return context.result(
        "inspect",
        checkpoint,
        base=checkpoint.base_name,
        layers=[layer.summary() for layer in checkpoint.layers],
        findings=_findings(checkpoint),
        details=describe(checkpoint, config.format.module, tensors=config.verbose),
    )


def describe(checkpoint: Checkpoint, module: str | None = None, *, tensors: bool) -> dict[str, Any]:
    """The fields of inspect: evidence, sizes, components, what the format adds; all `tensors` where asked."""
    weights = checkpoint.weights
    described = {
        "evidence": checkpoint.evidence,
        **totals(weights.infos),
        "files": [{"file": str(file), "bytes": file.stat().st_size} for file in weights.files],
        "stripped_prefix": weights.stripped_prefix,
        "missing_keys": list(checkpoint.missing),
        "unknown_keys": list(checkpoint.unknown),
        "components": components(checkpoint, _group),
        **format_of(checkpoint, module).describe(checkpoint),
    }
    if tensors:
        described["tensors"] = [
            {"name": info.name, "shape": list(info.shape), "dtype": info.dtype_name, "bytes": info.nbytes}
            for info in weights.infos.values()
        ]
    return described


def _group(name: str) -> str:
    match = _GROUP.match(name)
    return match[1] if match else name


def _findings(checkpoint: Checkpoint) -> list[str]:
    findings = list(checkpoint.findings)
    if checkpoint.missing:
        findings.append(f"missing keys: {', '.join(checkpoint.missing)}")
    if checkpoint.unknown:
        findings.append(f"unknown keys: {', '.join(checkpoint.unknown)}")
    return findings


def _run_table(found: Run, config: InspectConfig, context: Context) -> Result:
    """One row a checkpoint of a run; one that cannot be opened says why in its row."""
    rows = []
    for step, path in context.track(found.checkpoints, "reading headers"):
        row: dict[str, Any] = {"step": step, "path": str(path)}
        try:
            checkpoint = open_checkpoint(path, config.format.name, config.format.module, config.family)
        except RunnerError as error:
            row["error"] = str(error)
        else:
            sizes = totals(checkpoint.weights.infos)
            row |= {"format": checkpoint.format, "layers": [layer.layer for layer in checkpoint.layers]}
            row |= {name: sizes[name] for name in ("keys", "parameters", "bytes")}
            row["findings"] = list(checkpoint.findings)
        rows.append(row)
    return Result(
        task="inspect",
        ckpt=str(found.path),
        timing=context.timing,
        versions=versions(),
        details={"steps": found.steps, "checkpoints": rows, "ignored": list(found.ignored)},
    )
