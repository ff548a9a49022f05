"""What a person reads in a terminal, and what grep reads in a pipe."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from runner.errors import printable

COLOURS = {
    "excellent": "bold green", "good": "green", "fair": "yellow", "moderate": "yellow", "poor": "bold red",
    "production": "bold green", "basic": "green", "continue": "yellow", "early": "red",
    "pass": "green", "fail": "bold red",
}  # fmt: skip
_DETAILS = (
    "kl_reverse",
    "top5",
    "dp_rms",
    "scale",
    "magnitude_share",
    "control_mse",
    "additivity",
    "progressive_trend",
)


def number(value: Any, digits: int = 4) -> str:
    """A figure for reading: `–` where there is none."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return (
            f"{value:.{digits}g}"
            if value != 0 and (abs(value) < 0.001 or abs(value) >= 10000)
            else f"{value:.{digits}f}"
        )
    return str(value)


def facts(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(label, value, word that decides the colour) for every line of the report, in order."""
    metrics, verdict = result.get("metrics", {}), result.get("verdict") or {}
    rows = [("Checkpoint", result.get("ckpt"), ""), ("Format", result.get("format"), "")]
    rows += [("Step", result.get("step"), ""), ("Base", result.get("base"), "")]
    if result.get("reference") != result.get("base"):
        rows.append(("Reference", result.get("reference"), ""))
    rows.append(("NPT Layers", "; ".join(map(describe_layer, result.get("layers", []))) or None, ""))
    if "mse" in metrics:
        rows += [
            ("MSE Loss", number(metrics["mse"], 6), verdict.get("status", "")),
            ("Cosine Similarity", number(metrics["cosine"]), verdict.get("cosine_status", "")),
            ("KL Divergence", f"{number(metrics['kl'])} nats/token", ""),
            ("Top-1 Agreement", _percent(metrics.get("top1")), ""),
        ]
    if text := metrics.get("text"):
        perplexity = f"{number(text.get('ppl'), 2)} (reference {number(text.get('ppl_reference'), 2)})"
        figures = f"mse {number(text['mse'])}, kl {number(text['kl'])}, perplexity {perplexity}"
        rows.append(("Text", f"{figures} on {text['tokens']} tokens", ""))
    if floor := metrics.get("floor"):
        rows.append(
            ("Floor", f"mse {number(floor['mse'], 6)}, kl {number(floor['kl'])} (reference in the other precision)", "")
        )
    if "greedy_agreement" in metrics:
        rows.append(("Greedy Agreement", _percent(metrics["greedy_agreement"]), ""))
    if verdict:
        rows += [
            ("Loss Status", verdict["status"].upper(), verdict["status"]),
            ("Cosine Status", verdict["cosine_status"].upper(), verdict["cosine_status"]),
            ("Estimated Progress", f"{verdict['progress']:.1f}% (rule of thumb)", ""),
            ("Remaining Work", verdict["remaining"], ""),
            ("Readiness", f"{verdict['readiness']} ({verdict['reason']})", verdict["readiness"]),
            ("Recommendation", verdict["recommendation"], ""),
        ]
    return [(label, printable(value), word) for label, value, word in rows if value is not None]


def describe_layer(layer: Mapping[str, Any]) -> str:
    """One NPT layer in a few characters: `11: triple, r 16, k 4`."""
    return f"{layer['layer']}: {layer['modulation']}, r {layer['np_rank']}, k {layer['num_ranks']}"


def print_result(
    result: Mapping[str, Any], console: Console, *, verbose: bool, directory: Path, tracked: str | None = None
) -> None:
    """The whole report: a panel in a terminal, plain unwrapped lines in a pipe; last, where it lies."""
    left = [f"Result: {printable(directory)}/result.json", *([f"W&B: {printable(tracked)}"] if tracked else [])]
    if not console.is_terminal:
        _print_plain(result, verbose)
        print("\n".join(left))
        return
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, value, word in facts(result):
        grid.add_row(label, Text(value, style=COLOURS.get(word, "")))
    parts: list[Any] = [grid]
    for title, rows in _tables(result, verbose):
        parts += ["", _table(title, rows)]
    if result.get("findings"):
        parts.append("")
    for finding in result.get("findings", []):
        parts.append(Text(f"! {printable(finding)}", style="yellow"))
    console.print(Panel(Group(*parts), title=f"runner · {result['task']}", title_align="left", padding=(1, 2)))
    console.print(Text("\n".join(left), style="dim"), soft_wrap=True)


def print_line(result: Mapping[str, Any], console: Console, *, number: int) -> None:
    """One job of a sweep in one line, as it ends."""
    name = printable(Path(result.get("ckpt") or "?").name)
    if result["status"] != "ok":
        text = f"#{number} {name}: FAILED"
    else:
        metrics, verdict = result.get("metrics", {}), result.get("verdict") or {}
        figures = (
            f"mse {_short(metrics.get('mse'))}, cosine {_short(metrics.get('cosine'))}, kl {_short(metrics.get('kl'))}"
        )
        text = f"#{number} {name}: {figures}" + (f", {verdict['status']}" if verdict else "")
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def print_sweep(rows: Sequence[Mapping[str, Any]], directory: Path) -> None:
    """The learning curve of a sweep as a table in the order of its jobs, failures first."""
    failed = [row for row in rows if row["status"] != "ok"]
    done = [row for row in rows if row["status"] == "ok"]
    console = Console()
    for row in failed:
        print(f"{row['status'].upper()} {row['job']}: {printable(row['error']['message'])}", file=sys.stderr)
    lines = [
        {
            "checkpoint": printable(Path(row["ckpt"]).name),
            "step": row.get("step"),
            "mse": _short(row["metrics"].get("mse")),
            "cosine": _short(row["metrics"].get("cosine")),
            "kl": _short(row["metrics"].get("kl")),
            "top1": _percent(row["metrics"].get("top1")),
            "status": (row.get("verdict") or {}).get("status", "–"),
            "progress": _progress_bar(row.get("verdict"), console.is_terminal),
            "readiness": (row.get("verdict") or {}).get("readiness", "–"),
        }
        for row in done
        if "metrics" in row
    ]
    if console.is_terminal:
        if lines:
            console.print(_table(f"{len(done)} of {len(rows)} jobs", lines))
    else:
        _print_columns(lines)
    print(f"Sweep: {printable(directory)}")


def _tables(result: Mapping[str, Any], verbose: bool) -> list[tuple[str, list[dict[str, Any]]]]:
    """The tables of the report as rows of finished cells."""

    def rows(items: Iterable[Mapping[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
        return [{name: _cell(name, item[name]) for name in names if name in item} for item in items]

    figures = ["mse", "cosine", "kl", "top1"] + (["kl_reverse", "top5", "dp_rms", "scale"] if verbose else [])
    tables = [("per prompt", rows(result.get("per_prompt", []), ["prompt", "tokens", *figures]))]
    if any("mse" in layer for layer in result.get("layers", [])):
        kinds = ["modulation", "np_rank", "num_ranks"] if verbose else []
        tables.append(("each layer alone", rows(result["layers"], ["layer", *kinds, "mse", "cosine", "kl"])))
    tables.append(("layers together", rows(result.get("progressive", []), ["layers", "mse", "cosine", "kl"])))
    names = ["prompt", "temperature", "agreement", "first_divergence", "repetition"] + (
        ["text", "reference_text"] if verbose else []
    )
    tables.append(("continuations", rows(result.get("generation", []), names)))
    if verbose:
        metrics = result.get("metrics", {})
        tables.append(
            ("more figures", [{"figure": n, "value": _cell(n, metrics[n])} for n in _DETAILS if n in metrics])
        )
        tables.append(("checks", rows(result.get("checks", []), ["name", "status", "details"])))
        tables.append(("seconds", [{"phase": k, "seconds": f"{v:.2f}"} for k, v in result.get("timing", {}).items()]))
    return [(title, content) for title, content in tables if content]


def _cell(name: str, value: Any) -> str:
    if name in ("top1", "top5", "agreement", "repetition"):
        return _percent(value)
    if name in ("prompt", "text", "reference_text"):
        return printable(str(value).replace("\n", " "))
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return _short(value)


def _short(value: Any) -> str:
    return number(value, 4)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _progress_bar(verdict: Mapping[str, Any] | None, drawn: bool) -> str:
    if not verdict:
        return "–"
    percent = verdict["progress"]
    return f"{'█' * (percent // 10)}{'░' * (10 - percent // 10)} {percent}%" if drawn else f"{percent}%"


def _table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", header_style="dim", box=None, padding=(0, 2, 0, 0)
    )
    for name in rows[0]:
        wide = name in ("checkpoint", "prompt", "text", "reference_text", "details")
        table.add_column(
            name, overflow="fold" if wide else "ellipsis", no_wrap=not wide, justify="left" if wide else "right"
        )
    for row in rows:
        table.add_row(*(Text(str(value), style=COLOURS.get(str(value), "")) for value in row.values()))
    return table


def _print_plain(result: Mapping[str, Any], verbose: bool) -> None:
    for label, value, _ in facts(result):
        print(f"{label}: {value}")
    for title, rows in _tables(result, verbose):
        print(f"\n{title}")
        _print_columns(rows)
    for finding in result.get("findings", []):
        print(f"Finding: {printable(finding)}")


def _print_columns(rows: Sequence[Mapping[str, Any]]) -> None:
    """Aligned columns, unwrapped however wide."""
    if not rows:
        return
    lines = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
