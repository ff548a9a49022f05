"""From a comparison (runner/comparison) to the one run that draws its curves.

With one series the keys are `eval/mse`, `layer_mse/3`, `forecast/median`; with several each key has behind it what
tells its series from the others (`eval/mse/full`), so that every line stays one line. Keys are flat, steps ascend.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from runner.comparison.comparison import Comparison, RemainingSteps, Series
from runner.comparison.insights import headline, insights
from runner.comparison.jobs import Job
from runner.results import JsonObject, is_number
from runner.tracking.base import RunIdentity, Tracker
from runner.tracking.rows import LAYER_FIGURES, STEP, Chart, LoggedTable, Record, cell, eval_row, numbers

# Of the estimate's curve, which goes on beyond the last checkpoint.
FORECAST_STEP = "forecast/step"
AXES = {**{f"layer_{name}/*": STEP for name in LAYER_FIGURES}, "forecast/*": FORECAST_STEP}
# What is drawn with all series in one plot.
CHARTS = ("mse", "cosine", "kl", "top1", "progress")
_JOB_COLUMNS = (
    "job", "status", "series", "run", "ckpt_step", "tier", "family", "format", "verdict", "progress", "readiness",
    "overall",
)  # fmt: skip
_LAST_COLUMNS = ("seconds", "ckpt", "error")
_UNSAFE = re.compile(r"[^A-Za-z0-9._=@+-]+")


def group(comparison: Comparison) -> str:
    """The W&B group of a comparison's runs: the name of its sweep, or of all of them."""
    return " + ".join(directory.resolve().name for directory in comparison.directories)[:128]


def log_comparison(comparison: Comparison, tracker: Tracker) -> None:
    """One run of its own for `comparison`, in the group of its jobs. The same sweeps give the same id, and attempts."""
    name, record = group(comparison), comparison_record(comparison)
    identity = RunIdentity(task="compare", run_name=name, series=name)
    tracker.start(identity, {"task": "compare", "sweeps": [path.resolve().name for path in comparison.directories]})
    tracker.record({"task": "compare", "status": "ok"}, record)
    tracker.finish(0)


def comparison_record(comparison: Comparison) -> Record:
    """All points in ascending step, the table of checkpoints, one chart a figure, and what the curves say."""
    named = endings(comparison.series)
    rows = [row for series, end in named for job in series.jobs if (row := _point(job, end))]
    bands = [row for series, end in named for row in _band(series, end)]
    return Record(
        rows=[*sorted(rows, key=lambda row: row[STEP]), *sorted(bands, key=lambda row: row[FORECAST_STEP])],
        tables={"tables/checkpoints": _checkpoints(comparison)},
        charts=_charts(comparison.series),
        summary=_summary(comparison, named),
        config=_config(comparison),
        axes=AXES,
    )


def endings(series: Sequence[Series]) -> list[tuple[Series, str]]:
    """Each series with what stands behind its keys: nothing for the only one, else its label in safe characters."""
    if len(series) == 1:
        return [(series[0], "")]
    names = [_UNSAFE.sub("-", each.label).strip("-") or "series" for each in series]
    counts = Counter(names)
    return [
        (each, f"/{name}-{number}" if counts[name] > 1 else f"/{name}")
        for number, (each, name) in enumerate(zip(series, names, strict=True))
    ]


def _point(job: Job, end: str) -> dict[str, float]:
    """The figures of one checkpoint, and those of its layers, over its step."""
    row = eval_row({"metrics": job.metrics, "verdict": job.verdict}, None)
    for figure in LAYER_FIGURES:
        row |= {f"layer_{figure}/{name}": value for name, value in layer_figures(job, figure).items()}
    if not row or job.step is None:
        return {}
    return {STEP: job.step, **{f"{key}{end}": value for key, value in row.items()}}


def layer_figures(job: Job, figure: str) -> dict[str, float]:
    """Layer → its `figure`, for the layers that were measured by themselves."""
    return {
        _UNSAFE.sub("-", str(row["layer"])): value
        for row in job.layers
        if isinstance(row.get("layer"), (int, str)) and is_number(value := row.get(figure))
    }


def _band(series: Series, end: str) -> list[dict[str, float]]:
    """The estimate's curve of the mse with its lower and upper bound."""
    names = (FORECAST_STEP, *(f"forecast/{name}{end}" for name in ("lower", "median", "upper")))
    rows = [dict(zip(names, point, strict=True)) for point in (series.estimate.band if series.estimate else ())]
    return [row for row in rows if all(map(is_number, row.values()))]


def _checkpoints(comparison: Comparison) -> LoggedTable:
    """One row a job, those without a result too."""
    labels = {(job.sweep, job.name): series.label for series in comparison.series for job in series.jobs}
    metrics = [dict(numbers(job.metrics)) for job in comparison.jobs]
    columns = list(dict.fromkeys(key for row in metrics for key in row))
    rows = []
    for job, own in zip(comparison.jobs, metrics, strict=True):
        verdict = job.verdict or {}
        known = {
            **{name: getattr(job, name) for name in ("status", "run", "tier", "family", "format", "overall", "ckpt")},
            "job": job.name,
            "series": labels.get((job.sweep, job.name)),
            "ckpt_step": job.step,
            "verdict": verdict.get("status"),
            "progress": verdict.get("progress"),
            "readiness": verdict.get("readiness"),
            "seconds": job.seconds,
            "error": (job.error or {}).get("message"),
        }
        first, last = ([cell(known[name]) for name in names] for names in (_JOB_COLUMNS, _LAST_COLUMNS))
        rows.append([*first, *(own.get(column) for column in columns), *last])
    return LoggedTable(columns=[*_JOB_COLUMNS, *columns, *_LAST_COLUMNS], rows=rows)


def _charts(series: Sequence[Series]) -> dict[str, Chart]:
    """`plots/<figure>`: all series in one plot; only the figures that a series has."""
    made = {}
    for name in CHARTS:
        lines = {each.label: [(step, value) for step, value in figures(each, name)] for each in series}
        lines = {label: points for label, points in lines.items() if points}
        if lines:
            made[f"plots/{name}"] = Chart(title=f"{name} by checkpoint", x=STEP, lines=lines)
    return made


def figures(series: Series, name: str) -> list[tuple[int, float]]:
    """(step, value) of a figure under its flat name (`mse`, `text_ppl`, `progress`), where it is a number."""
    found = [(job.step, _figure(job, name)) for job in series.jobs]
    return [(step, value) for step, value in found if step is not None and is_number(value)]


def _figure(job: Job, name: str) -> Any:
    return (job.verdict or {}).get(name) if name == "progress" else dict(numbers(job.metrics)).get(name)


def _summary(comparison: Comparison, named: Sequence[tuple[Series, str]]) -> JsonObject:
    """The headline, how many jobs ended how, and for each series its four answers, its best point and the estimate."""
    said: JsonObject = {"headline": headline(comparison).words}
    said |= {f"jobs/{status}": count for status, count in Counter(job.status for job in comparison.jobs).items()}
    for series, end in named:
        found = insights(series)
        for name in ("working", "ready", "layer", "best"):
            said[f"answers/{name}{end}"] = getattr(found, name).words
        sound = replace(series, jobs=tuple(job for job in series.jobs if not job.damaged))
        if points := figures(sound, "mse"):
            said[f"best/step{end}"], said[f"best/mse{end}"] = min(points, key=lambda point: point[1])
        if series.estimate is not None:
            said[f"estimate/words{end}"] = series.estimate.words
            said |= {f"{key}{end}": value for key, value in _targets(series.estimate).items()}
    return said


def _targets(estimate: RemainingSteps) -> JsonObject:
    """`estimate/mse_0.05_status`, `…_lower`, `…_upper`: when each threshold is met, in steps since the start."""
    return {
        f"estimate/mse_{target['target']:g}_{name}": target[name]
        for target in estimate.details.get("targets") or ()
        for name in ("status", "lower", "upper")
        if target.get(name) is not None
    }


def _config(comparison: Comparison) -> JsonObject:
    """Family and format where all jobs share them, and which runs and tiers are compared."""
    config: JsonObject = {}
    for name in ("family", "format"):
        values = {getattr(job, name) for job in comparison.done}
        if len(values) == 1:
            config[name] = values.pop()
    config["jobs"] = len(comparison.jobs)
    config["runs"] = sorted({job.run for job in comparison.jobs if job.run})
    config["tiers"] = sorted({job.tier for job in comparison.jobs if job.tier})
    return config
