"""The main plot of a comparison as PNG and SVG, for where a page cannot go."""

import io
import logging
import math
from typing import TYPE_CHECKING

from runner.comparison.comparison import Comparison, Series
from runner.errors import printable
from runner.metrics.verdict import thresholds
from runner.reports.page.charts import shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = ("#2563c9", "#c2570c", "#12855f", "#8a3ffc", "#b8286a", "#0b7a94", "#7a6a00", "#596273")
_BANDS = {"excellent": "#e2f0e8", "good": "#edf5e9", "fair": "#fbf4e4", "poor": "#fceeec"}
_MOST_BANDS = 3
_LONGEST_LABEL = 60


def pictures(comparison: Comparison) -> dict[str, bytes]:
    """`png` and `svg`: mse over steps, the status bands and the estimate; {} where there is no mse to draw.

    The same comparison gives the same bytes.
    """
    series = [one for one in comparison.series if any(value is not None and value > 0 for value in one.values("mse"))]
    if not series:
        return {}
    # Where the home directory cannot be written it would warn on every run.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context(
        {"svg.hashsalt": "runner", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    ):
        figure = Figure(figsize=(9, 5), layout="constrained")
        _draw(figure.add_subplot(), series)
        png, svg = io.BytesIO(), io.BytesIO()
        FigureCanvasAgg(figure).print_figure(png, format="png", dpi=160)
        FigureCanvasSVG(figure).print_figure(svg, format="svg", metadata={"Date": None})
    return {"png": png.getvalue(), "svg": svg.getvalue()}


def _draw(axes: "Axes", series: list[Series]) -> None:
    """The curves onto `axes`."""
    for number, one in enumerate(series):
        # A gap, as on the page, where there is no value that a logarithmic axis can show.
        values = [v if v is not None and v > 0 else math.nan for v in one.values("mse")]
        # Two tiers of one run have the same figures: dashes let the curve below shine through.
        style = "-" if number == 0 else (0, (4, 1 + number % 4))
        label = printable(shortened(one.label, _LONGEST_LABEL)).replace("$", r"\$")  # which begins a formula
        axes.plot(one.steps, values, marker="o", markersize=4, label=label, linestyle=style, color=_colour(number))
    values = [v for one in series for v in one.values("mse") if v is not None and v > 0]
    low, high = 0.6 * min(values), 1.5 * max(values)
    if any(one.estimate is not None for one in series):
        bounds = thresholds().mse.values()
        low, high = min(low, 0.6 * min(bounds)), max(high, 1.2 * max(bounds))
        _draw_statuses(axes, low, high)
    bands = {one.estimate.band: n for n, one in reversed(list(enumerate(series))) if one.estimate is not None}
    for band, number in bands.items() if len(series) <= _MOST_BANDS else ():
        if band:
            steps, lower, median, upper = zip(*band, strict=True)
            axes.fill_between(steps, lower, upper, color=_colour(number), alpha=0.13, linewidth=0)
            axes.plot(steps, median, color=_colour(number), linestyle="--", linewidth=1)
    axes.set(xlabel="step", ylabel="mse", yscale="log", ylim=(low, high))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.margins(x=0.02)
    axes.grid(visible=True, which="major", color="#e6e9ed", linewidth=0.8)
    if len(series) > 1:
        axes.legend(frameon=False, fontsize=8, ncols=2 if len(series) > 6 else 1)
    axes.set_title("MSE of the logits, by training step", loc="left", fontsize=11)


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]


def _draw_statuses(axes: "Axes", low: float, high: float) -> None:
    start = low
    for name, bound in [*thresholds().mse.items(), ("poor", high)]:
        if min(bound, high) > start:
            axes.axhspan(start, min(bound, high), color=_BANDS[name], zorder=0, linewidth=0)
            axes.text(0.995, start * 1.03, name, transform=axes.get_yaxis_transform(), ha="right", va="bottom",
                      color="#5c6773", fontsize=8)  # fmt: skip
            start = bound
