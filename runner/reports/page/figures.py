"""What every chart of the page is: plain values for plotly.js, without colours, which the page's theme gives.

A trace's `meta.colour` is the number of its series; a shape's `name` is the status whose colour it takes.
"""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from runner.comparison.points import checkpoint_name
from runner.comparison.series import Series

STEP_AXIS = {"title": {"text": "step"}, "tickformat": "~s"}
# Lines that a legend and an eye can still tell apart.
MOST_LINES = 12
# What a legend on a phone has room for.
_LONGEST_NAME = 46
# Decades that are too few for a logarithmic axis to have ticks.
_LINEAR_BELOW = 0.3


@dataclass(frozen=True, kw_only=True)
class Figure:
    """`data` and `layout` as plotly.js takes them; `note`: how to read it; `height` in CSS pixels."""

    name: str
    title: str
    note: str
    data: list[dict[str, Any]]
    layout: dict[str, Any] = field(default_factory=dict)
    wide: bool = False
    height: int = 320


def plot_text(value: object) -> str:
    """Text for plotly.js, which reads labels as a little HTML."""
    return html.escape(str(value), quote=False)


def shortened(text: str, longest: int = 60) -> str:
    """Text for a legend or an axis."""
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def line(
    series: Series, number: int, values: Sequence[float | None], *, name: str | None = None, **more: Any
) -> dict[str, Any]:
    """A curve of `series` over its steps; points without a value are gaps."""
    label = shortened(name or series.label, _LONGEST_NAME)
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": plot_text(label),
        "x": series.steps,
        "y": list(values),
        "text": [plot_text(checkpoint_name(job)) for job in series.jobs],
        "hovertemplate": f"{plot_text(label)}<br>%{{text}}: %{{y:.4~g}}<extra></extra>",
        "meta": {"colour": number},
        **more,
    }


def status_bands(bounds: Mapping[str, float], other: str, lowest: float, highest: float) -> list[dict[str, Any]]:
    """Bands from `lowest` to `highest`: each name of the ascending `bounds` up to its bound, then `other`."""
    edges = [-math.inf, *bounds.values(), math.inf]
    bands = [
        (name, max(low, lowest), min(high, highest))
        for name, low, high in zip([*bounds, other], edges[:-1], edges[1:], strict=True)
    ]
    common = {"type": "rect", "xref": "paper", "x0": 0, "x1": 1, "layer": "below", "line": {"width": 0}}
    return [{**common, "y0": low, "y1": high, "name": name} for name, low, high in bands if high > low]


def band_labels(shapes: Sequence[Mapping[str, Any]], *, log: bool) -> list[dict[str, Any]]:
    """The name of each band at its right end, inside."""
    return [
        {
            "xref": "paper",
            "x": 1,
            "xanchor": "right",
            "yanchor": "bottom",
            "showarrow": False,
            "y": math.log10(shape["y0"]) if log else shape["y0"],
            "text": shape["name"],
            "opacity": 0.7,
            "font": {"size": 11},
        }
        for shape in shapes
    ]


def log_axis(title: str, values: Sequence[float | None], *, include: Sequence[float] = ()) -> dict[str, Any]:
    """A logarithmic axis that shows all positive `values` and `include`, with a margin; linear for a narrow range."""
    shown = [value for value in [*values, *include] if value is not None and value > 0] or [0.01, 1.0]
    low, high = math.log10(min(shown)), math.log10(max(shown))
    if high - low < _LINEAR_BELOW:
        span = max(shown) - min(shown) or max(shown)
        return {
            "title": {"text": title},
            "tickformat": "~g",
            "range": [min(shown) - 0.1 * span, max(shown) + 0.1 * span],
        }
    margin = max(0.06 * (high - low), 0.08)
    return {
        "title": {"text": title},
        "type": "log",
        "range": [low - margin, high + margin],
        "tickformat": "~g",
        "dtick": "D2" if high - low < 2.5 else max(1, round((high - low) / 8)),
        "minor": {"showgrid": False},
    }


def with_values(series: Sequence[Series], metric: str) -> list[tuple[int, Series, list[float | None]]]:
    """(number, series, values) for the series that have the figure at all."""
    rows = [(number, one, one.values(metric)) for number, one in enumerate(series)]
    return [row for row in rows if any(value is not None for value in row[2])]


def positive(values: Sequence[float | None]) -> list[float | None]:
    """`values` for a logarithmic axis: what is not positive is a gap."""
    return [value if value is not None and value > 0 else None for value in values]


def tell_apart(data: list[dict[str, Any]]) -> list[dict[str, Any]]:
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
