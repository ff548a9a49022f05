"""The curves of a training as a picture, for whoever has no W&B at hand."""

import json
import math
from pathlib import Path
from typing import Any

from runner.files.atomic import write_whole
from runner.reports.picture import line_picture

# What is drawn, as the log names it: the losses, where the log has them, and those of each layer.
_LINES = ("loss", "eval_loss/total", "logits", "cross_entropy")
_MOST_LAYERS = 8


def write_curves(log: Path) -> Path | None:
    """Draw the losses of training_log.jsonl as curves.png beside it; None where there are not two points of one.

    Raises OSError where it cannot be written.
    """
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    layers = dict.fromkeys(name for row in rows for name in row if name.startswith("layer_"))
    lines = {name: _points(rows, name) for name in (*_LINES, *list(layers)[:_MOST_LAYERS])}
    lines = {name: points for name, points in lines.items() if len(points) > 1}
    if not lines:
        return None
    target = log.with_name("curves.png")
    write_whole(target, line_picture(lines, name="loss", title="Losses, by training step"))
    return target


def _points(rows: list[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    values = [(row["step"], row.get(name)) for row in rows]
    return [(step, value) for step, value in values if isinstance(value, (int, float)) and 0 < value < math.inf]
