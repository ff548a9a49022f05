"""`task=test`: the checks of a tier, one after the other; what they say together.

Nothing heavy is imported at the top: the quick tier has no use for torch.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runner.checkpoints.runs import step_in_name
from runner.checks.check import PARTS, checks_for, run_checks
from runner.checks.context import BUILT, FAIL, STATUSES, WARNING, Check, CheckContext, check_base, check_buildable
from runner.config import TestConfig
from runner.errors import ConfigError
from runner.metrics.verdict import thresholds
from runner.results import Result, versions
from runner.tasks.context import Context

NOT_READY = "NOT_READY"
# The check that puts a model into memory: a tier with it is asked for room first.
MODEL = "model"


def run(config: TestConfig, context: Context) -> Result:
    """Run the tier's checks. Exit code 1 where an integrity check failed, or with `strict` where one warned.

    Raises ConfigError or CheckpointError where there is nothing that could be checked.
    """
    if config.base is not None:
        check_base(config.base)
    scratch = context.directory / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    checked = CheckContext(config=config, shows=context, path=_path(config), scratch=scratch)
    try:
        return _tested(config, context, checked)
    finally:
        checked.free_all()
        _clean(scratch, config.keep)


def _tested(config: TestConfig, context: Context, checked: CheckContext) -> Result:
    checks = _checks(config, checked)
    estimate = None
    if MODEL in (check.name for check in checks):
        from runner.checks.memory import require_room

        estimate = require_room(checked)
        if estimate is not None and context.progress.is_terminal:
            context.progress.print(f"Estimate: {estimate.words()}")
    with context.timed("checks"):
        rows = run_checks(checks, checked)
    integrity = [row["status"] for row in rows if row["integrity"]]
    every = [row["status"] for row in rows]
    bad = FAIL in integrity or (config.strict and (FAIL in every or WARNING in every))
    result = Result(
        task="test",
        ckpt=_shown_path(config, checked),
        step=_step(rows, checked),
        family=checked.family_name,
        format=checked.format.name if checked.has_checkpoint and checked.format else None,
        tier=config.tier.name,
        metrics=_metrics(rows),
        checks=rows,
        overall=overall(rows),
        timing=context.timing,
        versions=versions(),
        details={
            "passed": not bad,
            "strict": config.strict,
            "kept": checked.path is None and config.keep,
            **(estimate.fields() if estimate else {}),
        },
        exit_code=int(bad),
    )
    if config.junit:
        from runner.reports.junit import junit_path, write_junit

        name = result.ckpt or f"runner/{checked.family_name or 'machine'}"
        job = context.directory.name.partition("_")[0] if context.in_sweep else None
        path = junit_path(config.junit, name, config.tier.name, job)
        write_junit(path, result.to_dict(), strict=config.strict)
    return result


def _path(config: TestConfig) -> Path | None:
    if config.ckpt is None:
        if config.step is not None:
            raise ConfigError(f"step={config.step} needs a run directory as ckpt=")
        return None
    from runner.tasks.context import checkpoint_path

    return checkpoint_path(config)


def _shown_path(config: TestConfig, checked: CheckContext) -> str | None:
    """The checkpoint that was named, or one that was built and is kept."""
    if checked.path is not None:
        return str(checked.path)
    kept = config.keep and "built" in checked.__dict__
    return str(checked.built) if kept else None


def _step(rows: Sequence[Mapping[str, Any]], checked: CheckContext) -> int | None:
    """The step that the checkpoint's own state reports, where it was opened, else that of its name."""
    if checked.path is None:
        return None
    own = next((row["data"].get("step") for row in rows if row["name"] == "loading" and "data" in row), None)
    return step_in_name(checked.path.name) if own is None else own


def _checks(config: TestConfig, checked: CheckContext) -> list[Check]:
    """Those of the tier that apply. Raises ConfigError for what cannot be built, before anything is."""
    tier = config.tier
    if config.experts != TestConfig.experts and (checked.path is not None or config.family.name == "auto"):
        # A sweep over families is no reason to refuse: there the others say by their name that they have none.
        raise ConfigError(f"experts={config.experts} is how many are built: with family=lora_moe, and without ckpt=")
    if checked.path is None and BUILT in tier.checks:
        check_buildable(checked)
    names = [name for name in tier.checks if name != BUILT or checked.path is None]
    if config.format.module:
        # The parts of a format that is not our own are not known here; its module opens it as a whole.
        names = [name for name in names if name == "files" or name not in PARTS]
    checks = checks_for(checked, names)
    if checks:
        return checks
    if not tier.checks:
        raise ConfigError(f"tier={tier.name} checks nothing: it is for task=diagnose; take tier=quick, minimal or full")
    if checked.path is not None:
        raise ConfigError(
            f"tier={tier.name}: none of its checks ({', '.join(names)}) applies to family {checked.family_name}"
        )
    raise ConfigError(f"tier={tier.name}: its checks are of a checkpoint; give one as ckpt=, or name {BUILT!r} first")


def overall(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """READY, PARTIALLY_READY or NOT_READY by the mean score of the quality checks; None where none gave one.

    A checkpoint that fails an integrity check is NOT_READY, whatever its scores.
    """
    if all(row["integrity"] for row in rows):
        return None
    if any(row["integrity"] and row["status"] == FAIL for row in rows):
        return NOT_READY
    scores = [row["score"] for row in rows if "score" in row]
    if not scores:
        return None
    mean = sum(scores) / len(scores)
    return next((word for word, least in thresholds().overall.items() if mean > least), NOT_READY)


def _metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How many checks ended how, the mean score, and the figures of the checks that compare with the base."""
    counts = {f"checks_{status}": sum(row["status"] == status for row in rows) for status in STATUSES}
    scores = [row["score"] for row in rows if "score" in row]
    figures = {
        name: row["data"][name]
        for row in rows
        if row["name"] == "fidelity"
        for name in ("mse", "cosine", "kl", "top1")
        if name in row.get("data", {})
    }
    return {**figures, **counts, **({"score": sum(scores) / len(scores)} if scores else {})}


def _clean(scratch: Path, keep: bool) -> None:
    """Remove what the checks wrote, but with `keep` for the checkpoint that was built, and its base."""
    for entry in scratch.iterdir():
        if keep and entry.name == "built":
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    if not any(scratch.iterdir()):
        scratch.rmdir()
