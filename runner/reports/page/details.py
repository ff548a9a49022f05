"""The charts beside the curves: layers over steps, each prompt, direction against magnitude, jobs without a step."""

import math
from collections.abc import Sequence
from typing import Any

from runner.comparison.jobs import Job
from runner.comparison.points import checkpoint_name, layer_mses, prompt_mses
from runner.comparison.series import Series
from runner.comparison.thresholds import thresholds
from runner.reports.page.figures import MOST_LINES, STEP_AXIS, Figure, line, log_axis, plot_text, positive, shortened

# Cells that still have room for their figure, and how many series get a chart of their own.
_LABELLED_COLUMNS = 12
_SPACED_COLUMNS = 60
_MOST_ROWS = 12
_MOST_SERIES = 6


def layers(series: Sequence[Series]) -> list[Figure]:
    """For each series with figures by layer, its layers × steps: the isolated mse."""
    return [_heat_map(one, number) for number, one in _first(series, layer_mses)]


def _heat_map(series: Series, number: int) -> Figure:
    jobs = [job for job in series.jobs if layer_mses(job)]
    rows = [layer_mses(job) for job in jobs]
    names = sorted({layer for row in rows for layer in row}, key=lambda layer: (isinstance(layer, str), layer))
    grid = [[row.get(layer) for row in rows] for layer in names]
    logs = [[math.log10(value) if value is not None and value > 0 else None for value in row] for row in grid]
    centre = math.log10(thresholds().layer_mse)
    reach = max([abs(value - centre) for row in logs for value in row if value is not None] + [1.0])
    ends = [centre - reach, centre, centre + reach]
    gap = 1 if len(jobs) <= _SPACED_COLUMNS else 0
    label = {"texttemplate": "%{text}"} if len(jobs) <= _LABELLED_COLUMNS else {}
    trace = {
        "type": "heatmap",
        "x": _columns(jobs),
        "y": [plot_text(shortened(f"layer {layer}", 24)) for layer in names],
        "z": logs,
        "zmin": ends[0],
        "zmid": centre,
        "zmax": ends[2],
        "text": [["–" if value is None else f"{value:.2g}" for value in row] for row in grid],
        "hovertemplate": "%{y}, step %{x}: mse %{text}<extra></extra>",
        "xgap": gap,
        "ygap": gap,
        "colorbar": {
            "tickvals": ends,
            "ticktext": [f"{10**end:.2g}" for end in ends],
            "thickness": 10,
            "outlinewidth": 0,
        },
        "meta": {"diverging": True},
        **label,
    }
    return Figure(
        name=f"layers-{number}",
        title=f"Each layer alone · {series.label}",
        note="Mse with only this layer in NPT mode, at each step; blue is good "
        f"(below {thresholds().layer_mse:g}), red is not.",
        data=[trace],
        height=max(280, 130 + 26 * len(names)),
        # Beside a chart of the usual height a tall one would leave a hole.
        wide=len(jobs) > _LABELLED_COLUMNS or len(names) > _MOST_ROWS,
        layout={"xaxis": {"type": "category", "title": {"text": "step"}, "nticks": 16}, "yaxis": {"type": "category"}},
    )


def _columns(jobs: Sequence[Job]) -> list[str]:
    """The steps as column names, each once: a step that was measured again is marked."""
    names: list[str] = []
    for job in jobs:
        name = f"{job.step:,}"
        while name in names:
            name += "′"
        names.append(name)
    return names


def prompts(series: Sequence[Series]) -> list[Figure]:
    """The mse of every prompt for each series; series whose prompts have the same figures share a chart."""
    charts: dict[str, tuple[int, list[str], list[dict[str, Any]], str]] = {}
    for number, one in _first(series, prompt_mses):
        data, note = _prompt_lines(one)
        same = str([(trace["name"], trace["x"], trace["y"]) for trace in data])
        charts.setdefault(same, (number, [], data, note))[1].append(one.label)
    return [
        Figure(
            name=f"prompts-{number}",
            title=f"Each prompt · {', '.join(labels)}",
            note=note,
            data=data,
            layout={
                "xaxis": STEP_AXIS,
                "yaxis": log_axis("mse", [value for trace in data for value in trace["y"]]),
                "showlegend": True,
            },
        )
        for number, labels, data, note in charts.values()
    ]


def _prompt_lines(series: Series) -> tuple[list[dict[str, Any]], str]:
    """A line for each prompt; of many prompts those that are furthest away at the end, and a note that says so."""
    rows = [prompt_mses(job) for job in series.jobs]
    texts = list(dict.fromkeys(text for row in rows for text in row))
    last: dict[str, float] = {}
    for row in rows:
        last |= row
    shown = sorted(texts, key=lambda text: -last[text])[:MOST_LINES]
    data = [
        line(series, place, positive([row.get(text) for row in rows]), name=shortened(text, 48))
        for place, text in enumerate(text for text in texts if text in shown)
    ]
    note = "The mse of each prompt by itself: how far the mean stands for all."
    if len(shown) < len(texts):
        note += f" Shown are the {len(shown)} of {len(texts)} that are furthest away at the end."
    return data, note


def magnitude(series: Sequence[Series]) -> Figure | None:
    """Cosine against the scale that fits best: where the path of training comes from, and what is missing."""
    data: list[dict[str, Any]] = []
    for number, one in enumerate(series):
        points = [(job, job.metric("cosine"), job.metric("scale"), job.metric("magnitude_share")) for job in one.jobs]
        points = [point for point in points if point[1] is not None and point[2] is not None]
        if not points:
            continue
        trace = line(one, number, [])
        trace["x"], trace["y"] = [point[1] for point in points], [point[2] for point in points]
        trace["text"] = [
            f"{plot_text(checkpoint_name(job))}<br>cosine {x:.4f}, scale {y:.3f}"
            + (f"<br>{share:.0%} of the mse is magnitude" if share is not None else "")
            for job, x, y, share in points
        ]
        trace["hovertemplate"] = f"{plot_text(one.label)}<br>%{{text}}<extra></extra>"
        trace["meta"] = {"colour": number, "path": True}
        data.append(trace)
    if not data:
        return None
    reference = {
        "type": "scatter",
        "mode": "markers+text",
        "x": [1],
        "y": [1],
        "text": ["reference"],
        "name": "reference",
        "textposition": "top left",
        "cliponaxis": False,
        "hoverinfo": "skip",
        "showlegend": False,
        "marker": {"symbol": "star", "size": 12},
        "meta": {"ink": True},
    }
    return Figure(
        name="magnitude",
        title="Direction against magnitude",
        note="To the right the direction is right. The scale is what the logits would have to be multiplied by: "
        "above 1 they are too small, below 1 too large. The last checkpoint is the large dot.",
        data=[*data, reference],
        layout={
            "xaxis": {"title": {"text": "cosine"}},
            "yaxis": {"title": {"text": "best scale"}},
            "hovermode": "closest",
        },
    )


def without_step(jobs: Sequence[Job]) -> Figure | None:
    """The mse of checkpoints that have no step, as bars."""
    rows = [job for job in jobs if job.status == "ok" and job.step is None and job.metric("mse") is not None]
    if not rows:
        return None
    trace = {
        "type": "bar",
        "orientation": "h",
        "x": positive([job.metric("mse") for job in rows]),
        "y": [plot_text(shortened(f"{job.name.partition('_')[0]} {checkpoint_name(job)}", 40)) for job in rows],
        "hovertemplate": "%{y}: mse %{x:.4~g}<extra></extra>",
        "meta": {"colour": 0},
    }
    return Figure(
        name="without-step",
        title="Checkpoints without a step",
        note="Their mse; they stand in no curve.",
        data=[trace],
        height=max(220, 120 + 24 * len(rows)),
        layout={
            "xaxis": {"title": {"text": "mse"}, "rangemode": "tozero"},
            "yaxis": {"type": "category", "autorange": "reversed", "automargin": True},
        },
    )


def _first(series: Sequence[Series], figures: Any) -> list[tuple[int, Series]]:
    having = [(number, one) for number, one in enumerate(series) if any(figures(job) for job in one.jobs)]
    return having[:_MOST_SERIES]
