"""The page of a transfer session: probabilities before and after, curves by strength and by layer, KL along new tokens,
and ‖ΔW‖ by layer and position.
"""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from runner.comparison.export import safe
from runner.reports.console import Rows, number
from runner.reports.page.build import render
from runner.reports.page.charts import Figure, plot_text, shortened
from runner.reports.transfer import filled
from runner.results import JsonObject

_LONGEST_TITLE = 60
_PLAIN = {"showgrid": False, "zeroline": False, "automargin": True, "rangemode": "tozero"}
_KL_AXIS = {"title": {"text": "KL, nats"}, "rangemode": "tozero"}


def page(result: JsonObject) -> str | None:
    """The page as HTML; None where nothing was injected or measured."""
    commands = result.get("commands", [])
    figures = [figure for i, command in enumerate(commands) for figure in _figures(command, i)]
    figures += [figure for i, row in enumerate(result.get("experiments", [])) for figure in _by_parts(row, f"e{i}")]
    tables = [
        {"title": title, "rows": rows}
        for title, rows in (
            ("Injections", _cells(result.get("per_prompt", []))),
            ("Experiments", _cells(_flat(result.get("experiments", [])))),
        )
        if rows
    ]
    if not figures and not tables:
        return None
    facts = [f"{name}: {result[name]}" for name in ("format", "step", "base") if result.get(name) is not None]
    title = Path(str(result["ckpt"])).name
    return render("transfer.html", figures, title=title, facts=facts, tables=tables)


def to_csv(result: JsonObject) -> str:
    """The rows of the tables, of the curves and of the map: `kind` says of which."""
    rows = [{"kind": "injection", **row} for row in result.get("per_prompt", [])]
    rows += [{"kind": "experiment", **row} for row in _flat(result.get("experiments", []))]
    for command in [*result.get("commands", []), *result.get("experiments", [])]:
        name = command.get("modulation") or command.get("name")
        for kind in ("by_strength", "by_layer", "steps"):
            found = _flat(command.get(kind, []))
            rows += [{"kind": kind, "modulation": name, "prompt": command.get("text"), **row} for row in found]
        for row in command.get("delta_map", []):
            rows += [
                {"kind": "delta_map", "prompt": command["text"], "layer": row["layer"], "position": i, "norm": norm}
                for i, norm in enumerate(row["norms"])
            ]
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: safe(value) for key, value in row.items()} for row in rows)
    return text.getvalue()


def _flat(rows: Sequence[Mapping[str, Any]]) -> list[JsonObject]:
    """Rows of texts and numbers: nested figures under joined names, lists left out."""
    return [dict(_parts(row, "")) for row in rows]


def _parts(row: Mapping[str, Any], front: str) -> Iterator[tuple[str, Any]]:
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from _parts(value, f"{front}{name}.")
        elif isinstance(value, (str, int, float)):
            yield f"{front}{name}", value


def _cells(rows: Sequence[JsonObject]) -> Rows:
    return filled(rows, list(dict.fromkeys(name for row in rows for name in row)))


def _figures(command: Mapping[str, Any], number_of: int) -> Iterator[Figure]:
    name = f"c{number_of}"
    if "top" in command and "modulation" in command:
        yield _probabilities(command, name)
    if "steps" in command:
        yield _along(command, name)
    yield from _by_parts(command, name)
    if "delta_map" in command:
        yield _map(command, name)


def _titled(command: Mapping[str, Any], what: str) -> str:
    subject = command.get("modulation") or command.get("name") or ""
    return shortened(f"{what} · {subject} → {command.get('text') or command.get('target')}", _LONGEST_TITLE)


def _probabilities(command: Mapping[str, Any], name: str) -> Figure:
    rows = [*command["top"], *command["tracked"]]
    texts = [plot_text(repr(row["text"])) for row in rows]
    data = [
        {
            "type": "bar", "orientation": "h", "name": each, "y": texts, "x": [row[each] for row in rows],
            "marker": {}, "meta": {"colour": colour},
        }
        for colour, each in enumerate(("baseline", "injected"))
    ]  # fmt: skip
    note = f"{command['mode']} in space {command['space']}: KL {number(command['kl'])} nats"
    if controls := command.get("controls"):
        note += f"; permuted {number(controls['permuted']['kl'])}"
        if "locality" in controls:
            note += f", locality {number(controls['locality']['kl'])}"
    layout = {
        "xaxis": {"title": {"text": "probability of the next token"}, "type": "log", "tickformat": "~g"},
        "yaxis": {"autorange": "reversed", "type": "category"}, "barmode": "group", "hovermode": "closest",
        "showlegend": True,
    }  # fmt: skip
    return Figure(
        name=name, title=_titled(command, "Next token"), note=note, data=data, layout=layout,
        height=120 + 34 * len(rows),
    )  # fmt: skip


def _line(label: str, colour: int, x: Sequence[object], y: Sequence[object], **more: object) -> JsonObject:
    return {
        "type": "scatter", "mode": "lines+markers", "name": plot_text(shortened(label)), "x": list(x), "y": list(y),
        "meta": {"colour": colour}, **more,
    }  # fmt: skip


def _along(command: Mapping[str, Any], name: str) -> Figure:
    steps = command["steps"]
    data = [_line("KL", 0, range(1, len(steps) + 1), [step["kl"] for step in steps])]
    data[0]["text"] = [plot_text(repr(step["text"])) for step in steps]
    layout = {
        "xaxis": {"title": {"text": "new token"}},
        "yaxis": _KL_AXIS,
    }
    note = f"KL at each new token: {command['continuation']!r}"
    return Figure(name=f"{name}-steps", title=_titled(command, "Along new tokens"), note=note, data=data, layout=layout)


def _by_parts(command: Mapping[str, Any], name: str) -> Iterator[Figure]:
    """The curves by strength and by layer."""
    if rows := command.get("by_strength"):
        x = [row["strength"] for row in rows]
        data = [_line("KL", 0, x, [row["kl"] for row in rows])]
        if "permuted_kl" in rows[0]:
            data.append(_line("KL, permuted", 1, x, [row["permuted_kl"] for row in rows], line={"dash": "dash"}))
        for i, text in enumerate(rows[0].get("probabilities", rows[0].get("tracked", {})), 2):
            y = [_probability(row, text) for row in rows]
            data.append(_line(f"p({text!r})", i, x, y, yaxis="y2"))
        layout: JsonObject = {
            "xaxis": {"title": {"text": "strength"}}, "yaxis": _KL_AXIS,
        }  # fmt: skip
        if len(data) > 2:
            layout["yaxis2"] = {"title": {"text": "probability"}, "overlaying": "y", "side": "right", **_PLAIN}
        note = "A permuted control as high as the curve says that the effect is not the fact's."
        yield Figure(
            name=f"{name}-strength", title=_titled(command, "By strength"), note=note, data=data, layout=layout
        )
    if rows := command.get("by_layer"):
        data = [_line("KL", 0, [row["layer"] for row in rows], [row["kl"] for row in rows])]
        layout = {
            "xaxis": {"title": {"text": "layer"}, "type": "category"},
            "yaxis": _KL_AXIS,
        }
        note = "Injected in one layer at a time."
        yield Figure(name=f"{name}-layer", title=_titled(command, "By layer"), note=note, data=data, layout=layout)


def _probability(row: Mapping[str, Any], text: str) -> object:
    found = row.get("probabilities", {}).get(text)
    return row["tracked"][text]["after"] if found is None else found


def _map(command: Mapping[str, Any], name: str) -> Figure:
    rows = command["delta_map"]
    top = max(max(row["norms"]) for row in rows) or 1.0
    trace = {
        "type": "heatmap",
        "x": [f"{i} {plot_text(token)}" for i, token in enumerate(command["tokens"])],
        "y": [f"layer {row['layer']}" for row in rows],
        "z": [row["norms"] for row in rows],
        "zmin": 0, "zmid": top / 2, "zmax": top,
        "text": [[f"{value:.2g}" for value in row["norms"]] for row in rows],
        "texttemplate": "%{text}",
        "hovertemplate": "%{y}, %{x}: %{text}<extra></extra>",
        "xgap": 1, "ygap": 1,
        "colorbar": {"thickness": 10, "outlinewidth": 0},
        "meta": {"diverging": True},
    }  # fmt: skip
    return Figure(
        name=f"{name}-map",
        title=shortened(f"‖ΔW‖ · {command['text']}", _LONGEST_TITLE),
        note="How much each layer changes its MLP at each token: Frobenius norm, mean over the projections.",
        data=[trace],
        layout={"xaxis": {"type": "category"}, "yaxis": {"type": "category"}},
        height=max(240, 130 + 30 * len(rows)),
        wide=len(command["tokens"]) > 8,
    )
