"""A comparison as plain values: for comparison.json, and for comparison.csv."""

import csv
import io

from runner.comparison.comparison import Comparison, Series
from runner.comparison.insights import headline, insights
from runner.comparison.jobs import Job, flat
from runner.results import JsonObject, finite

# A spreadsheet would take a cell that begins so for a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_JOB_KEYS = (
    "name", "status", "error", "task", "ckpt", "step", "run", "tier", "family", "format", "reference", "metrics",
    "per_prompt", "layers", "progressive", "checks", "findings", "verdict",
    "overall", "passed", "outcome", "damaged", "seconds", "overrides",
)  # fmt: skip


def to_dict(comparison: Comparison) -> JsonObject:
    """Everything as JSON values: the headline, each job, each series with its answers and estimate, what differs."""
    said = headline(comparison)
    return {
        "sweeps": list(map(str, comparison.directories)),
        "headline": {"level": said.level, "words": said.words},
        "jobs": [_job(job) for job in comparison.jobs],
        "series": [series_to_dict(series) for series in comparison.series],
        "ranking": [
            {"job": job.name, "checkpoint": job.checkpoint, "mse": job.metric("mse")} for job in comparison.ranking
        ],
        "differences": finite(comparison.differences),
    }


def _job(job: Job) -> JsonObject:
    values = {key: finite(getattr(job, key)) for key in _JOB_KEYS}
    values |= {"sweep": str(job.sweep), "log": str(job.log) if job.log else None}
    return {key: value for key, value in values.items() if value not in (None, [], {})}


def series_to_dict(series: Series) -> JsonObject:
    """One series: its points, what they say, and the estimate."""
    found = series.estimate
    return {
        "label": series.label,
        "run": series.run,
        "tier": series.tier,
        "variant": series.variant,
        "points": [
            {"job": job.name, "step": job.step, **{name: job.metric(name) for name in ("mse", "cosine", "kl", "top1")}}
            for job in series.jobs
        ],
        "answers": {name: {"level": said.level, "words": said.text} for name, said in vars(insights(series)).items()},
        "estimate": found and finite({"words": found.words, "reached": found.reached, **found.details}),
    }


def to_csv(comparison: Comparison) -> str:
    """One row a job: what it is, every number of `metrics` (nested ones as `text.ppl`), the verdict."""
    rows = [_row(job) for job in comparison.jobs]
    columns = dict.fromkeys(key for row in rows for key in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: safe(value) for key, value in row.items()} for row in rows)
    return text.getvalue()


def _row(job: Job) -> JsonObject:
    base = {
        "sweep": job.sweep.resolve().name,
        "job": job.name,
        "status": job.status,
        "error": job.message or None,
        **{key: getattr(job, key) for key in ("task", "run", "ckpt", "step", "tier", "family", "format")},
        **{f"verdict.{key}": job.judged(key) for key in ("status", "cosine_status", "progress", "readiness")},
        "overall": job.overall,
        "failed_checks": ", ".join(job.failed_checks) or None,
        "seconds": job.seconds,
    }
    figures = {key: value for key, value in flat(job.metrics).items() if isinstance(value, (int, float, str))}
    return base | {f"metrics.{key}" if key in base else key: value for key, value in figures.items()}


def safe(value: object) -> object:
    """`value` as a cell of a spreadsheet, which would take some texts for formulas."""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value
