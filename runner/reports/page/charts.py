"""Every chart of the page, as plain values for plotly.js without colours, which the page's theme gives.

A trace's `meta.colour` is the number of its series; a shape's `name` is the status whose colour it takes.
"""

import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from runner.comparison.comparison import Comparison, Series
from runner.comparison.jobs import Job
from runner.metrics.verdict import thresholds
from runner.results import JsonObject, is_number

# Lines that a legend and an eye can still tell apart.
_MOST_LINES = 12
# What a legend on a phone has room for.
_LONGEST_NAME = 46
# Decades that are too few for a logarithmic axis to have ticks.
_LINEAR_BELOW = 0.3
# More curves than this, and the estimates' bands would cover each other.
_MOST_BANDS = 3
# Cells that still have room for their figure, and how many series get a chart of their own.
_LABELLED_COLUMNS = 12
_SPACED_COLUMNS = 60
_MOST_ROWS = 12
_MOST_SERIES = 6
_QUANTILES = {
    "kl": ("mean", "solid"),
    "kl_p50": ("50 %", "dash"),
    "kl_p90": ("90 %", "dashdot"),
    "kl_p99": ("99 %", "longdash"),
    "kl_max": ("max", "dot"),
}


@dataclass(frozen=True, kw_only=True)
class Figure:
    """`data` and `layout` as plotly.js takes them; `note`: how to read it; `height` in CSS pixels."""

    name: str
    title: str
    note: str
    data: list[JsonObject]
    layout: JsonObject = field(default_factory=dict)
    wide: bool = False
    height: int = 320


def charts(comparison: Comparison) -> list[Figure]:
    """Every chart that the jobs have figures for, in the order of the page."""
    series = comparison.series
    curves = [draw(series) for draw in (mse, cosine, kl, agreement, progress, perplexity, magnitude)]
    found = [*curves, *layers(series), *prompts(series), ranking(comparison.ranking)]
    return [figure for figure in found if figure is not None]


def plot_text(value: object) -> str:
    """Text for plotly.js, which reads labels as a little HTML."""
    return html.escape(str(value), quote=False)


def shortened(text: str, longest: int = _LONGEST_NAME) -> str:
    """Text for a legend or an axis."""
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def line(
    series: Series, number: int, values: Sequence[object], *, name: str | None = None, **more: object
) -> JsonObject:
    """A curve of `series` over its steps; points without a value are gaps."""
    label = plot_text(shortened(name or series.label))
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": label,
        "x": series.steps,
        "y": list(values),
        "text": [plot_text(job.checkpoint) for job in series.jobs],
        "hovertemplate": f"{label}<br>%{{text}}: %{{y:.4~g}}<extra></extra>",
        "meta": {"colour": number},
        **more,
    }


def status_bands(bounds: Mapping[str, float], other: str, lowest: float, highest: float) -> list[JsonObject]:
    """Bands from `lowest` to `highest`: each name of the ascending `bounds` up to its bound, then `other`."""
    edges = [-math.inf, *bounds.values(), math.inf]
    bands = [
        (name, max(low, lowest), min(high, highest))
        for name, low, high in zip([*bounds, other], edges[:-1], edges[1:], strict=True)
    ]
    common = {"type": "rect", "xref": "paper", "x0": 0, "x1": 1, "layer": "below", "line": {"width": 0}}
    return [{**common, "y0": low, "y1": high, "name": name} for name, low, high in bands if high > low]


def band_labels(shapes: Sequence[JsonObject], *, log: bool) -> list[JsonObject]:
    """The name of each band at its right end, inside."""
    common = {"xref": "paper", "x": 1, "xanchor": "right", "yanchor": "bottom", "showarrow": False, "opacity": 0.7}
    return [
        {**common, "y": math.log10(shape["y0"]) if log else shape["y0"], "text": shape["name"], "font": {"size": 11}}
        for shape in shapes
    ]


def _titled(title: str, **more: object) -> JsonObject:
    return {"title": {"text": title}, **more}


def _over_steps(name: str, title: str, note: str, data: list[JsonObject], axis: JsonObject, **more: object) -> Figure:
    layout = {"xaxis": _titled("step", tickformat="~s"), "yaxis": axis, **more}
    return Figure(name=name, title=title, note=note, data=data, layout=layout)


def _heights(data: Sequence[JsonObject]) -> list[float | None]:
    return [value for trace in data for value in trace["y"]]


def log_axis(title: str, values: Sequence[float | None], *, include: Sequence[float] = ()) -> JsonObject:
    """A logarithmic axis that shows all positive `values` and `include`, with a margin; linear for a narrow range."""
    shown = [value for value in [*values, *include] if value is not None and value > 0] or [0.01, 1.0]
    low, high = math.log10(min(shown)), math.log10(max(shown))
    common = _titled(title, tickformat="~g")
    if high - low < _LINEAR_BELOW:
        span = max(shown) - min(shown) or max(shown)
        return {**common, "range": [min(shown) - 0.1 * span, max(shown) + 0.1 * span]}
    margin = max(0.06 * (high - low), 0.08)
    ticks = "D2" if high - low < 2.5 else max(1, round((high - low) / 8))
    spread = [low - margin, high + margin]
    return {**common, "type": "log", "range": spread, "dtick": ticks, "minor": {"showgrid": False}}


def with_values(series: Sequence[Series], metric: str) -> list[tuple[int, Series, list[float | None]]]:
    """(number, series, values) for the series that have the figure at all."""
    rows = [(number, one, one.values(metric)) for number, one in enumerate(series)]
    return [row for row in rows if any(value is not None for value in row[2])]


def positive(values: Sequence[float | None]) -> list[float | None]:
    """`values` for a logarithmic axis: what is not positive is a gap."""
    return [value if value is not None and value > 0 else None for value in values]


def tell_apart(data: list[JsonObject]) -> list[JsonObject]:
    """The traces, those dashed that would hide an equal one below them."""
    told, seen = [], set()
    for trace in data:
        points = str((trace.get("x"), trace.get("y")))
        drawn = trace["type"] == "scatter" and "dash" not in trace.get("line", {}) and "fill" not in trace
        if drawn and points in seen:
            trace = {**trace, "line": {**trace.get("line", {}), "dash": "dash"}}
        seen |= {points} if drawn else set()
        told.append(trace)
    return told


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
    data = [*bands, *(line(one, number, positive(mses), legendgroup=str(number)) for number, one, mses in rows)]
    found = _over_steps("mse", "MSE", note, data, axis, shapes=shapes, annotations=band_labels(shapes, log=True))
    return replace(found, wide=True, height=440)


def _near(bands: Sequence[JsonObject], values: Sequence[float | None]) -> list[float]:
    """What an axis should show of the estimates: a band without bounds must not flatten the points."""
    points = [value for value in values if value is not None and value > 0]
    return [y for trace in bands for y in trace["y"] if points and min(points) / 20 < y < 3 * max(points)]


def _estimate_band(series: Series, number: int) -> list[JsonObject]:
    band = series.estimate.band if series.estimate else ()
    if not band:
        return []
    steps, lower, median, upper = (list(column) for column in zip(*band, strict=True))
    common = {"type": "scatter", "mode": "lines", "x": steps, "hoverinfo": "skip", "showlegend": False}
    common |= {"legendgroup": str(number), "name": plot_text(f"{series.label}: estimate"), "meta": {"colour": number}}
    return [
        {**common, "y": lower, "line": {"width": 0}},
        {**common, "y": upper, "line": {"width": 0}, "fill": "tonexty", "meta": {"colour": number, "fill": True}},
        {**common, "y": median, "line": {"width": 1.5, "dash": "dash"}},
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
    note = "Direction of the logits, magnitude aside; 1 is the reference's own."
    data = [line(one, number, cosines) for number, one, cosines in rows]
    axis, labels = _titled("cosine", range=[low, top]), band_labels(shapes, log=False)
    return _over_steps("cosine", "Cosine", note, data, axis, shapes=shapes, annotations=labels)


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
            style = {"line": {"dash": dash, "width": 2.5 if mean else 1.3}, "mode": f"lines{'+markers' * mean}"}
            label = name if alone else f"{one.label}, {name}"
            group = {} if alone else {"legendgroup": str(number)}
            data.append(line(one, number, values, name=label, **style, **group, showlegend=alone or mean))
    note = (
        "From the reference's next-token distribution, nats a token: mean (solid), quantiles over the tokens "
        "(50 % dashed, 90 % dash-dot, 99 % long dashes) and the largest (dotted)."
    )
    return _over_steps("kl", "KL divergence", note, data, log_axis("KL, nats a token", _heights(data)))


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
    note = "Share of positions with the reference's most likely token; dashed: overlap of the five most likely."
    return _over_steps("top1", "Top-1 agreement", note, data, _titled("share", tickformat=".0%"))


def progress(series: Sequence[Series]) -> Figure | None:
    """The rule of thumb's percentage."""
    data = []
    for number, one in enumerate(series):
        values = [job.judged("progress") for job in one.jobs]
        if any(is_number(value) for value in values):
            data.append(line(one, number, values, line={"shape": "hv"}))
    if not data:
        return None
    shares = [f"{row['percent']}" for row in thresholds().progress]
    note = f"A rule of thumb from the mse alone: {', '.join(shares[:-1])} or {shares[-1]} %."
    return _over_steps("progress", "Progress", note, data, _titled("%", range=[0, 105]))


def perplexity(series: Sequence[Series]) -> Figure | None:
    """Perplexity on text beside the reference's, where text was measured."""
    data: list[JsonObject] = []
    dotted: JsonObject = {"line": {"dash": "dot", "width": 1.3}, "mode": "lines"}
    for number, one in enumerate(series):
        for key, style in (("ppl", {}), ("ppl_reference", dotted)):
            texts = [(job.metrics.get("text") or {}).get(key) for job in one.jobs]
            found = [value if is_number(value) else None for value in texts]
            if any(value is not None for value in found):
                name = f"{one.label}{', reference' if style else ''}"
                data.append(line(one, number, positive(found), name=name, **style))
    if not data:
        return None
    note = "Of the checkpoint, and of the reference (dotted)."
    return _over_steps("perplexity", "Perplexity on text", note, data, log_axis("perplexity", _heights(data)))


def layers(series: Sequence[Series]) -> list[Figure]:
    """For each series with figures by layer, its layers × steps: the isolated mse."""
    return [_heat_map(one, number) for number, one in _first(series, lambda job: job.layer_mses)]


def _heat_map(series: Series, number: int) -> Figure:
    jobs = [job for job in series.jobs if job.layer_mses]
    rows = [job.layer_mses for job in jobs]
    names = sorted({layer for row in rows for layer in row}, key=lambda layer: (isinstance(layer, str), layer))
    grid = [[row.get(layer) for row in rows] for layer in names]
    logs = [[math.log10(value) if value is not None and value > 0 else None for value in row] for row in grid]
    centre = math.log10(thresholds().layer_mse)
    reach = max([abs(value - centre) for row in logs for value in row if value is not None] + [1.0])
    ends = [centre - reach, centre, centre + reach]
    ticks = [f"{10**end:.2g}" for end in ends]
    gap = 1 if len(jobs) <= _SPACED_COLUMNS else 0
    label = {"texttemplate": "%{text}"} if len(jobs) <= _LABELLED_COLUMNS else {}
    trace = {
        "type": "heatmap",
        "x": _columns(jobs),
        "y": [plot_text(shortened(f"layer {layer}", 24)) for layer in names],
        "z": logs,
        **dict(zip(("zmin", "zmid", "zmax"), ends, strict=True)),
        "text": [["–" if value is None else f"{value:.2g}" for value in row] for row in grid],
        "hovertemplate": "%{y}, step %{x}: mse %{text}<extra></extra>",
        **dict.fromkeys(("xgap", "ygap"), gap),
        "colorbar": {"tickvals": ends, "ticktext": ticks, "thickness": 10, "outlinewidth": 0},
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
        layout={"xaxis": _titled("step", type="category", nticks=16), "yaxis": {"type": "category"}},
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
    shared: dict[str, tuple[int, list[str], list[JsonObject], str]] = {}
    for number, one in _first(series, lambda job: job.prompt_mses):
        data, note = _prompt_lines(one)
        same = str([(trace["name"], trace["x"], trace["y"]) for trace in data])
        shared.setdefault(same, (number, [], data, note))[1].append(one.label)
    return [
        _over_steps(f"prompts-{number}", f"Each prompt · {', '.join(labels)}", note, data,
                    log_axis("mse", _heights(data)), showlegend=True)
        for number, labels, data, note in shared.values()
    ]  # fmt: skip


def _prompt_lines(series: Series) -> tuple[list[JsonObject], str]:
    """A line for each prompt; of many prompts those that are furthest away at the end, and a note that says so."""
    rows = [job.prompt_mses for job in series.jobs]
    texts = list(dict.fromkeys(text for row in rows for text in row))
    last: dict[str, float] = {}
    for row in rows:
        last |= row
    shown = sorted(texts, key=lambda text: -last[text])[:_MOST_LINES]
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
    data: list[JsonObject] = []
    for number, one in enumerate(series):
        points = [(job, job.metric("cosine"), job.metric("scale"), job.metric("magnitude_share")) for job in one.jobs]
        points = [point for point in points if point[1] is not None and point[2] is not None]
        if not points:
            continue
        trace = line(one, number, [])
        trace["x"], trace["y"] = [point[1] for point in points], [point[2] for point in points]
        trace["text"] = [
            f"{plot_text(job.checkpoint)}<br>cosine {x:.4f}, scale {y:.3f}"
            + (f"<br>{share:.0%} of the mse is magnitude" if share is not None else "")
            for job, x, y, share in points
        ]
        trace["hovertemplate"] = f"{plot_text(one.label)}<br>%{{text}}<extra></extra>"
        trace["meta"] = {"colour": number, "path": True}
        data.append(trace)
    if not data:
        return None
    reference = {
        "type": "scatter", "mode": "markers+text", "x": [1], "y": [1], "text": ["reference"], "name": "reference",
        "textposition": "top left", "cliponaxis": False, "hoverinfo": "skip", "showlegend": False,
        "marker": {"symbol": "star", "size": 12}, "meta": {"ink": True},
    }  # fmt: skip
    return Figure(
        name="magnitude",
        title="Direction against magnitude",
        note="To the right the direction is right. The scale is what the logits would have to be multiplied by: "
        "above 1 they are too small, below 1 too large. The last checkpoint is the large dot.",
        data=[*data, reference],
        layout={"xaxis": _titled("cosine"), "yaxis": _titled("best scale"), "hovermode": "closest"},
    )


def ranking(rows: Sequence[Job]) -> Figure | None:
    """The mse of checkpoints that are in no curve, as bars, in their order."""
    if not rows:
        return None
    trace = {
        "type": "bar",
        "orientation": "h",
        "x": positive([job.metric("mse") for job in rows]),
        "y": [plot_text(shortened(f"{place}. {job.checkpoint}", 40)) for place, job in enumerate(rows, 1)],
        "hovertemplate": "%{y}: mse %{x:.4~g}<extra></extra>",
        "meta": {"colour": 0},
    }
    downwards = {"type": "category", "autorange": "reversed", "automargin": True}
    return Figure(
        name="ranking",
        title="Ranking",
        note="The mse of checkpoints that are in no curve: not of one run, or without a step in their names.",
        data=[trace],
        height=max(220, 120 + 24 * len(rows)),
        layout={"xaxis": _titled("mse", rangemode="tozero"), "yaxis": downwards},
    )


def _first(series: Sequence[Series], figures: Callable[[Job], object]) -> list[tuple[int, Series]]:
    having = [(number, one) for number, one in enumerate(series) if any(figures(job) for job in one.jobs)]
    return having[:_MOST_SERIES]
