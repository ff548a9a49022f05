"""The curves of a training as a picture, for whoever has no W&B at hand."""

import io
import json
import logging
import math
from pathlib import Path
from typing import Any

from runner.files.atomic import write_whole

# What is drawn, each in a panel of its own where the log has it: the names of its lines in the log, and its title.
_PANELS = (
    (("loss", "eval_loss/total"), "loss"),
    (("logits", "eval_loss/fidelity"), "logits"),
    (("gradient_norm", "grad_norm"), "gradient norm"),
    (("learning_rate",), "learning rate"),
)


def write_curves(log: Path) -> Path | None:
    """Draw training_log.jsonl as curves.png beside it; None where there are not two points of anything.

    Raises OSError where it cannot be written.
    """
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    panels = [(title, lines) for names, title in _PANELS if (lines := {n: p for n in names if (p := _points(rows, n))})]
    if not any(len(points) > 1 for _, lines in panels for points in lines.values()):
        return None
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.4 * len(panels)), layout="constrained")
    for number, (title, lines) in enumerate(panels, 1):
        axes = figure.add_subplot(len(panels), 1, number)
        for name, points in lines.items():
            axes.plot(*zip(*points, strict=True), marker="." if len(points) < 50 else None, label=name, linewidth=1)
        positive = all(value > 0 for points in lines.values() for _, value in points)
        axes.set(ylabel=title, yscale="log" if positive and title != "learning rate" else "linear")
        axes.grid(visible=True, color="#e6e9ed", linewidth=0.8)
        if len(lines) > 1:
            axes.legend(frameon=False, fontsize=8)
    figure.axes[-1].set_xlabel("step")
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(picture, format="png", dpi=120)
    target = log.with_name("curves.png")
    write_whole(target, picture.getvalue())
    return target


def _points(rows: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    values = [(row["step"], row.get(name)) for row in rows]
    return [(step, value) for step, value in values if isinstance(value, (int, float)) and math.isfinite(value)]
