"""A comparison as plain values: for comparison.json, and for comparison.csv."""

import csv
import io
from typing import Any

from runner.comparison.comparison import Comparison
from runner.comparison.insights import answers, headline
from runner.comparison.jobs import Job, finite, flat
from runner.comparison.series import Series

# A spreadsheet would take a cell that begins so for a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_JOB_KEYS = (
    "name",
    "status",
    "error",
    "task",
    "ckpt",
    "step",
    "run",
    "tier",
    "family",
    "format",
    "reference",
    "metrics",
    "per_prompt",
    "layers",
    "progressive",
    "checks",
    "findings",
    "verdict",
    "overall",
    "seconds",
    "overrides",
)
_POINT_METRICS = ("mse", "cosine", "kl", "top1")


def to_dict(comparison: Comparison) -> dict[str, Any]:
    """Everything as JSON values: the headline, each job, each series with its answers and estimate, the differences."""
    said = headline(comparison)
    content = {
        "sweeps": list(map(str, comparison.directories)),
        "headline": {"level": said.level, "words": said.words},
        "jobs": [_job(job) for job in comparison.jobs],
        "series": [series_to_dict(series) for series in comparison.series],
        "differences": {key: list(values) for key, values in comparison.differences.items()},
    }
    found: dict[str, Any] = finite(content)
    return found


def _job(job: Job) -> dict[str, Any]:
    values = {key: getattr(job, key) for key in _JOB_KEYS}
    kept = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    kept |= {"sweep": str(job.sweep), "log": str(job.log) if job.log else None}
    return {key: value for key, value in kept.items() if value not in (None, [], {})}


def series_to_dict(series: Series) -> dict[str, Any]:
    """One series: its points, what they say, and the estimate."""
    return {
        "label": series.label,
        "run": series.run,
        "tier": series.tier,
        "variant": series.variant,
        "points": [_point(job) for job in series.jobs],
        "answers": {name: {"level": said.level, "words": said.text} for name, said in vars(answers(series)).items()},
        "estimate": finite(
            None
            if series.estimate is None
            else {"words": series.estimate.words, "reached": series.estimate.reached, **_plain(series.estimate.details)}
        ),
    }


def _point(job: Job) -> dict[str, Any]:
    return {"job": job.name, "step": job.step, **{metric: job.metric(metric) for metric in _POINT_METRICS}}


def _plain(value: Any) -> Any:
    """`value` with lists for tuples."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def to_csv(comparison: Comparison) -> str:
    """One row a job: what it is, every number of `metrics` (nested ones as `text.ppl`), the verdict."""
    rows = [_row(job) for job in comparison.jobs]
    columns = dict.fromkeys(key for row in rows for key in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _safe(value) for key, value in row.items()} for row in rows)
    return text.getvalue()


def _row(job: Job) -> dict[str, Any]:
    verdict = job.verdict or {}
    base = {
        "sweep": job.sweep.resolve().name,
        "job": job.name,
        "status": job.status,
        "error": (job.error or {}).get("message"),
        "task": job.task,
        "run": job.run,
        "ckpt": job.ckpt,
        "step": job.step,
        "tier": job.tier,
        "family": job.family,
        "format": job.format,
        **{f"verdict.{key}": verdict.get(key) for key in ("status", "cosine_status", "progress", "readiness")},
        "overall": job.overall,
        "seconds": job.seconds,
    }
    figures = {key: value for key, value in flat(job.metrics).items() if isinstance(value, (int, float, str))}
    return base | {f"metrics.{key}" if key in base else key: value for key, value in figures.items()}


def _safe(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value
