"""The main plot of a comparison as PNG and SVG, for where a page cannot go.

Both are made of the same few shapes; PNG by Pillow, drawn larger than it is and then reduced.
"""

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby, pairwise

from runner.comparison.comparison import Comparison, Series
from runner.errors import printable
from runner.metrics.verdict import thresholds
from runner.reports.page.charts import shortened

_COLOURS = ("#2563c9", "#c2570c", "#12855f", "#8a3ffc", "#b8286a", "#0b7a94", "#7a6a00", "#596273")
_BANDS = {"excellent": "#e2f0e8", "good": "#edf5e9", "fair": "#fbf4e4", "poor": "#fceeec"}
_TEXT, _LINES, _FRAME = "#1f2933", "#e6e9ed", "#8a94a0"
_MOST_BANDS = 3
_LONGEST_LABEL = 60
_MOST_LABELS = 24
# The picture and the part of it that is plotted in, in points; the PNG has _SCALE pixels for each.
_WIDTH, _HEIGHT = 900, 500
_LEFT, _RIGHT, _TOP, _BOTTOM = 80, 885, 45, 445
_SCALE, _LARGER = 1.6, 2

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A line through `points`, the area inside them, or a text at the first; sizes in points, y from the top.

    `anchor`: where the text's point lies, as Pillow says it: l, m or r, then m (middle) or s (baseline).
    """

    points: Sequence[Point]
    colour: str = _TEXT
    width: float = 0.8
    dash: tuple[float, float] | None = None
    opacity: float = 1.0
    filled: bool = False
    text: str | None = None
    anchor: str = "ls"
    size: float = 12


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Where a step and a value lie in the picture; the values' axis is logarithmic."""

    steps: tuple[float, float]
    values: tuple[float, float]

    def x(self, step: float) -> float:
        """Points from the left."""
        first, last = self.steps
        return _LEFT + (_RIGHT - _LEFT) * (step - first) / (last - first)

    def y(self, value: float) -> float:
        """Points from the top; what lies outside is on the edge."""
        low, high = map(math.log, self.values)
        share = (math.log(min(max(value, self.values[0]), self.values[1])) - low) / (high - low)
        return _BOTTOM - (_BOTTOM - _TOP) * share


def pictures(comparison: Comparison) -> dict[str, bytes]:
    """`png` and `svg`: mse over steps, the status bands and the estimate; {} where there is no mse to draw.

    The same comparison gives the same bytes.
    """
    series = [one for one in comparison.series if any(value is not None and value > 0 for value in one.values("mse"))]
    if not series:
        return {}
    shapes = list(_drawn(series))
    return {"png": _png(shapes), "svg": _svg(shapes)}


def line_picture(lines: Mapping[str, Sequence[Point]], *, name: str, title: str) -> bytes:
    """A PNG of `lines`, each (step, value) with values above 0; `name` stands at the axis of values."""
    values = [value for points in lines.values() for _, value in points]
    steps = [step for points in lines.values() for step, _ in points]
    margin = 0.02 * (max(steps) - min(steps)) or 1
    scale = Scale(steps=(min(steps) - margin, max(steps) + margin), values=(0.6 * min(values), 1.5 * max(values)))
    shapes = list(_axes(scale, name, title))
    for number, points in enumerate(lines.values()):
        drawn = [(scale.x(step), scale.y(value)) for step, value in points]
        shapes.append(Shape(points=drawn, colour=_colour(number), width=1.5))
    return _png([*shapes, *_legend(list(lines))])


def _drawn(series: Sequence[Series]) -> Iterator[Shape]:
    """The whole picture, what is below first."""
    values = [v for one in series for v in one.values("mse") if v is not None and v > 0]
    low, high = 0.6 * min(values), 1.5 * max(values)
    judged = any(one.estimate is not None for one in series)
    if judged:
        bounds = thresholds().mse.values()
        low, high = min(low, 0.6 * min(bounds)), max(high, 1.2 * max(bounds))
    bands = {one.estimate.band: n for n, one in reversed(list(enumerate(series))) if one.estimate is not None}
    shown = {band: n for band, n in bands.items() if band} if len(series) <= _MOST_BANDS else {}
    steps = [step for one in series for step in one.steps] + [point[0] for band in shown for point in band]
    margin = 0.02 * (max(steps) - min(steps)) or 1
    scale = Scale(steps=(min(steps) - margin, max(steps) + margin), values=(low, high))
    yield from _statuses(scale) if judged else ()
    yield from _axes(scale, "mse", "MSE of the logits, by training step")
    for band, number in shown.items():
        upper = [(scale.x(step), scale.y(top)) for step, _, _, top in band]
        lower = [(scale.x(step), scale.y(bottom)) for step, bottom, _, _ in band]
        yield Shape(points=[*upper, *reversed(lower)], colour=_colour(number), opacity=0.13, filled=True)
        middle = [(scale.x(step), scale.y(median)) for step, _, median, _ in band]
        yield Shape(points=middle, colour=_colour(number), width=1, dash=(5, 3))
    for number, one in enumerate(series):
        yield from _curve(one, number, scale)
    if len(series) > 1:
        yield from _legend([one.label for one in series])


def _curve(one: Series, number: int, scale: Scale) -> Iterator[Shape]:
    """A gap, as on the page, where there is no value that a logarithmic axis can show."""
    # Two tiers of one run have the same figures: dashes let the curve below shine through.
    dash = None if number == 0 else (6.0, 1.5 + 1.5 * (number % 4))
    pairs = zip(one.steps, one.values("mse"), strict=True)
    for there, group in groupby(pairs, lambda pair: pair[1] is not None and pair[1] > 0):
        if there:
            points = [(scale.x(step), scale.y(value or 0)) for step, value in group]
            yield Shape(points=points, colour=_colour(number), width=1.8, dash=dash)
            for x, y in points:
                around = [(x + 2.6 * math.cos(a * math.pi / 8), y + 2.6 * math.sin(a * math.pi / 8)) for a in range(16)]
                yield Shape(points=around, colour=_colour(number), filled=True)


def _statuses(scale: Scale) -> Iterator[Shape]:
    low, high = scale.values
    start = low
    for name, bound in [*thresholds().mse.items(), ("poor", high)]:
        if (end := min(bound, high)) > start:
            bottom, top = scale.y(start), scale.y(end)
            corners = [(_LEFT, top), (_RIGHT, top), (_RIGHT, bottom), (_LEFT, bottom)]
            yield Shape(points=corners, colour=_BANDS[name], filled=True)
            yield Shape(points=[(_RIGHT - 4, bottom - 4)], text=name, anchor="rs", size=10, colour="#5c6773")
            start = end


def _axes(scale: Scale, name: str, title: str) -> Iterator[Shape]:
    for value in _log_ticks(*scale.values):
        y = scale.y(value)
        yield Shape(points=[(_LEFT, y), (_RIGHT, y)], colour=_LINES)
        yield Shape(points=[(_LEFT - 6, y)], text=f"{value:g}", anchor="rm")
    for step in _ticks(*scale.steps):
        x = scale.x(step)
        yield Shape(points=[(x, _TOP), (x, _BOTTOM)], colour=_LINES)
        yield Shape(points=[(x, _BOTTOM + 12)], text=str(round(step)), anchor="mm")
    yield Shape(points=[(_LEFT, _TOP), (_LEFT, _BOTTOM), (_RIGHT, _BOTTOM)], colour=_FRAME, width=1)
    yield Shape(points=[((_LEFT + _RIGHT) / 2, _BOTTOM + 36)], text="step", anchor="ms")
    yield Shape(points=[(12, _TOP - 8)], text=name)
    yield Shape(points=[(_LEFT, 22)], text=title, size=14)


def _legend(labels: Sequence[str]) -> Iterator[Shape]:
    shown = labels[:_MOST_LABELS]
    columns = 2 if len(shown) > 6 else 1
    rows = -(-len(shown) // columns)
    for number, label in enumerate(shown):
        x, y = _RIGHT - 260 * (columns - number // rows), _TOP + 12 + 15 * (number % rows)
        yield Shape(points=[(x, y), (x + 22, y)], colour=_colour(number), width=2)
        yield Shape(points=[(x + 28, y)], text=_label(label), anchor="lm", size=10)
    if len(labels) > len(shown):
        at = (_RIGHT - 260, _TOP + 12 + 15 * rows)
        yield Shape(points=[at], text=f"… and {len(labels) - len(shown)} more", anchor="lm", size=10)


def _ticks(first: float, last: float) -> list[float]:
    """About six round whole numbers from `first` to `last`."""
    rough = (last - first) / 6
    power = 10 ** math.floor(math.log10(rough))
    distance = max(1, next(power * n for n in (1, 2, 5, 10) if power * n >= rough))
    start = math.ceil(first / distance)
    return [distance * n for n in range(start, math.floor(last / distance) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, with 2 and 5 times them where there are few."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for parts in ((1,), (1, 2, 5), range(1, 10)):
        found = [float(f"{n}e{exponent}") for exponent in exponents for n in parts]
        if len(inside := [value for value in found if low <= value <= high]) >= 3:
            break
    return inside


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]


def _label(text: str) -> str:
    return printable(shortened(text, _LONGEST_LABEL))


def _svg(shapes: Sequence[Shape]) -> bytes:
    size = f'width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        *map(_element, shapes),
        "</svg>\n",
    ]
    return "\n".join(lines).encode()


def _element(shape: Shape) -> str:
    points = " ".join(f"{x:.2f},{y:.2f}" for x, y in shape.points)
    if shape.text is not None:
        x, y = shape.points[0]
        place = {"l": "start", "m": "middle", "r": "end"}[shape.anchor[0]]
        y += 0.35 * shape.size if shape.anchor[1] == "m" else 0
        words = f'text-anchor="{place}" font-size="{shape.size:g}" fill="{shape.colour}"'
        return f'<text x="{x:.2f}" y="{y:.2f}" {words}>{escape(shape.text)}</text>'
    if shape.filled:
        return f'<polygon points="{points}" fill="{shape.colour}" fill-opacity="{shape.opacity:g}"/>'
    dash = f' stroke-dasharray="{shape.dash[0]:g} {shape.dash[1]:g}"' if shape.dash else ""
    return f'<polyline points="{points}" fill="none" stroke="{shape.colour}" stroke-width="{shape.width:g}"{dash}/>'


def _png(shapes: Sequence[Shape]) -> bytes:
    from PIL import Image, ImageColor, ImageDraw, ImageFont

    scale = _SCALE * _LARGER
    image = Image.new("RGB", (round(_WIDTH * scale), round(_HEIGHT * scale)), "white")
    draw = ImageDraw.Draw(image, "RGBA")
    for shape in shapes:
        points = [(x * scale, y * scale) for x, y in shape.points]
        red, green, blue = ImageColor.getrgb(shape.colour)[:3]
        fill = (red, green, blue, round(255 * shape.opacity))
        if shape.text is not None:
            draw.text(points[0], shape.text, fill, ImageFont.load_default(shape.size * scale), shape.anchor)
        elif shape.filled:
            draw.polygon(points, fill)
        else:
            for part in _dashes(points, [length * scale for length in shape.dash or ()]):
                draw.line(part, fill, max(1, round(shape.width * scale)), joint="curve")
    made = io.BytesIO()
    image.reduce(_LARGER).save(made, format="png")
    return made.getvalue()


def _dashes(points: Sequence[Point], lengths: Sequence[float]) -> Iterator[list[Point]]:
    """The line cut into dashes of the first of `lengths`, the second apart; whole where there are none."""
    if not lengths:
        yield list(points)
        return
    on, off = lengths
    before = 0.0
    for (x, y), (to_x, to_y) in pairwise(points):
        length = math.hypot(to_x - x, to_y - y)
        start = -(before % (on + off))
        while start < length:
            ends = [max(0.0, start) / length, min(length, start + on) / length] if length else [0.0, 0.0]
            if ends[0] < ends[1]:
                yield [(x + (to_x - x) * share, y + (to_y - y) * share) for share in ends]
            start += on + off
        before += length
