"""The curves over the training steps: mse with its bands and estimate, cosine, KL, agreement, progress, perplexity."""

import math
from collections.abc import Sequence
from typing import Any

from runner.comparison.series import Series
from runner.comparison.thresholds import thresholds
from runner.reports.page.figures import (
    STEP_AXIS,
    Figure,
    band_labels,
    line,
    log_axis,
    plot_text,
    positive,
    status_bands,
    with_values,
)

# More curves than this, and the estimates' bands would cover each other.
_MOST_BANDS = 3
_QUANTILES = {
    "kl": ("mean", "solid"),
    "kl_p50": ("50 %", "dash"),
    "kl_p90": ("90 %", "dashdot"),
    "kl_p99": ("99 %", "longdash"),
    "kl_max": ("max", "dot"),
}


def mse(series: Sequence[Series]) -> Figure | None:
    """MSE on a logarithmic scale over the status bands, with the estimate's band."""
    rows = with_values(series, "mse")
    if not any(value for _, _, mses in rows for value in mses):  # none, or all of them 0
        return None
    # The closest curve first; two tiers of one run may give the same estimate, and one band is enough.
    closest = sorted(rows, key=lambda row: next((mse for mse in reversed(row[2]) if mse is not None), math.inf))
    shown = closest if len(rows) <= _MOST_BANDS else closest[:1]
    distinct = {one.estimate.band: (number, one) for number, one, _ in reversed(shown) if one.estimate is not None}
    bands = [trace for number, one in distinct.values() for trace in _estimate_band(one, number)]
    values = [value for _, _, mses in rows for value in mses]
    judged = any(one.estimate is not None for _, one, _ in rows)
    bounds = thresholds().mse if judged else {}
    axis = log_axis("mse", [*values, *_near(bands, values)], include=[0.8 * bound for bound in bounds.values()])
    shapes = status_bands(bounds, "poor", *(10**end for end in axis["range"])) if bounds else []
    note = "Mean squared difference of the logits, over the prompts; lower is closer."
    if any(value == 0 for value in values):
        note += " Where it is 0, which this scale does not reach, the curve has a gap."
    if bands:
        whose = "the estimate" if len(rows) <= _MOST_BANDS else "the estimate of the closest curve"
        note += f" Shaded: {whose}, 90 % for the true curve at each step; dashed: its best fit."
    return Figure(
        name="mse",
        title="MSE",
        note=note,
        wide=True,
        height=440,
        data=[*bands, *(line(one, number, positive(mses), legendgroup=str(number)) for number, one, mses in rows)],
        layout={"xaxis": STEP_AXIS, "yaxis": axis, "shapes": shapes, "annotations": band_labels(shapes, log=True)},
    )


def _near(bands: Sequence[dict[str, Any]], values: Sequence[float | None]) -> list[float]:
    """What an axis should show of the estimates: a band without bounds must not flatten the points."""
    points = [value for value in values if value is not None and value > 0]
    return [y for trace in bands for y in trace["y"] if points and min(points) / 20 < y < 3 * max(points)]


def _estimate_band(series: Series, number: int) -> list[dict[str, Any]]:
    band = series.estimate.band if series.estimate else ()
    if not band:
        return []
    steps, lower, median, upper = (list(column) for column in zip(*band, strict=True))
    common = {
        "type": "scatter",
        "mode": "lines",
        "x": steps,
        "hoverinfo": "skip",
        "showlegend": False,
        "legendgroup": str(number),
        "name": plot_text(f"{series.label}: estimate"),
    }
    return [
        {**common, "y": lower, "line": {"width": 0}, "meta": {"colour": number}},
        {**common, "y": upper, "line": {"width": 0}, "fill": "tonexty", "meta": {"colour": number, "fill": True}},
        {**common, "y": median, "line": {"width": 1.5, "dash": "dash"}, "meta": {"colour": number}},
    ]


def cosine(series: Sequence[Series]) -> Figure | None:
    """Cosine of the logits, over its status bands."""
    rows = with_values(series, "cosine")
    if not rows:
        return None
    values = [value for _, _, cosines in rows for value in cosines if value is not None]
    low = min([*values, 0.94])
    low -= 0.06 * (1 - low)
    top = 1 + 0.03 * (1 - low)
    judged = any(one.estimate is not None for _, one, _ in rows)
    # From below: each band is named after its lower end, so the first ends where the lowest status begins.
    statuses = sorted(thresholds().cosine.items(), key=lambda item: item[1])
    names = ["poor", *(name for name, _ in statuses)]
    bounds = dict(zip(names[:-1], (bound for _, bound in statuses), strict=True))
    shapes = status_bands(bounds, names[-1], low, top) if judged else []
    return Figure(
        name="cosine",
        title="Cosine",
        note="Direction of the logits, magnitude aside; 1 is the reference's own.",
        data=[line(one, number, cosines) for number, one, cosines in rows],
        layout={
            "xaxis": STEP_AXIS,
            "yaxis": {"title": {"text": "cosine"}, "range": [low, top]},
            "shapes": shapes,
            "annotations": band_labels(shapes, log=False),
        },
    )


def kl(series: Sequence[Series]) -> Figure | None:
    """The mean KL and its quantiles over the tokens."""
    rows = with_values(series, "kl")
    if not any(value for _, one, _ in rows for metric in _QUANTILES for value in one.values(metric)):
        return None
    data, alone = [], len(rows) == 1
    for number, one, _ in rows:
        for metric, (name, dash) in _QUANTILES.items():
            values = positive(one.values(metric))
            if all(value is None for value in values):
                continue
            mean = metric == "kl"
            style = {
                "line": {"dash": dash, "width": 2.5 if mean else 1.3},
                "mode": "lines+markers" if mean else "lines",
            }
            label = name if alone else f"{one.label}, {name}"
            group = {} if alone else {"legendgroup": str(number)}
            data.append(line(one, number, values, name=label, **style, **group, showlegend=alone or mean))
    values = [value for trace in data for value in trace["y"]]
    return Figure(
        name="kl",
        title="KL divergence",
        note="From the reference's next-token distribution, nats a token: mean (solid), quantiles over the tokens "
        "(50 % dashed, 90 % dash-dot, 99 % long dashes) and the largest (dotted).",
        data=data,
        layout={"xaxis": STEP_AXIS, "yaxis": log_axis("KL, nats a token", values)},
    )


def agreement(series: Sequence[Series]) -> Figure | None:
    """The share of positions with the same most likely token, and the overlap of the five most likely."""
    rows = with_values(series, "top1")
    if not rows:
        return None
    data = [line(one, number, shares, name=f"{one.label}, top-1") for number, one, shares in rows]
    for number, one, _ in with_values(series, "top5"):
        style = {"line": {"dash": "dash", "width": 1.3}, "mode": "lines", "showlegend": len(rows) == 1}
        data.append(line(one, number, one.values("top5"), name=f"{one.label}, top-5", **style))
    if len(rows) == 1:
        data = [{**trace, "name": trace["name"].rpartition(", ")[2]} for trace in data]
    return Figure(
        name="top1",
        title="Top-1 agreement",
        note="Share of positions with the reference's most likely token; dashed: overlap of the five most likely.",
        data=data,
        layout={"xaxis": STEP_AXIS, "yaxis": {"title": {"text": "share"}, "tickformat": ".0%"}},
    )


def progress(series: Sequence[Series]) -> Figure | None:
    """The rule of thumb's percentage."""
    data = []
    for number, one in enumerate(series):
        values = [(job.verdict or {}).get("progress") for job in one.jobs]
        if any(isinstance(value, (int, float)) for value in values):
            data.append(line(one, number, values, line={"shape": "hv"}))
    if not data:
        return None
    return Figure(
        name="progress",
        title="Progress",
        note="A rule of thumb from the mse alone: 10, 30, 70, 90 or 100 %.",
        data=data,
        layout={"xaxis": STEP_AXIS, "yaxis": {"title": {"text": "%"}, "range": [0, 105]}},
    )


def perplexity(series: Sequence[Series]) -> Figure | None:
    """Perplexity on text beside the reference's, where text was measured."""
    data, values = [], []
    for number, one in enumerate(series):
        for key, style in {
            "ppl": {},
            "ppl_reference": {"line": {"dash": "dot", "width": 1.3}, "mode": "lines"},
        }.items():
            found = [_number((job.metrics.get("text") or {}).get(key)) for job in one.jobs]
            if any(value is not None for value in found):
                name = f"{one.label}{', reference' if style else ''}"
                data.append(line(one, number, positive(found), name=name, **style))
                values += found
    if not data:
        return None
    return Figure(
        name="perplexity",
        title="Perplexity on text",
        note="Of the checkpoint, and of the reference (dotted).",
        data=data,
        layout={"xaxis": STEP_AXIS, "yaxis": log_axis("perplexity", values)},
    )


def _number(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None
