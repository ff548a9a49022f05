"""What a person reads in a terminal, and what grep reads in a pipe."""

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from runner.errors import printable
from runner.reports.cells import percent, short

COLOURS = {
    "excellent": "bold green", "good": "green", "fair": "yellow", "moderate": "yellow", "poor": "bold red",
    "production": "bold green", "basic": "green", "continue": "yellow", "early": "red",
    "pass": "green", "fail": "bold red",
}  # fmt: skip
# Columns that are text: left-aligned, and folded where they do not fit.
_TEXTS = (
    "checkpoint",
    "prompt",
    "text",
    "reference_text",
    "details",
    "component",
    "name",
    "file",
    "figure",
    "phase",
    "check",
)


def print_result(
    result: Mapping[str, Any], console: Console, *, verbose: bool, directory: Path, tracked: str | None = None
) -> None:
    """The whole report: a panel in a terminal, plain unwrapped lines in a pipe; last, where it lies."""
    report = import_module(f"runner.reports.{result['task']}")
    left = [f"Result: {printable(directory)}/result.json", *([f"W&B: {printable(tracked)}"] if tracked else [])]
    if not console.is_terminal:
        _print_plain(result, report, verbose)
        print("\n".join(left))
        return
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, value, word in report.facts(result):
        grid.add_row(label, Text(value, style=COLOURS.get(word, "")))
    parts: list[Any] = [grid]
    for title, rows in report.tables(result, verbose):
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
            f"mse {short(metrics.get('mse'))}, cosine {short(metrics.get('cosine'))}, kl {short(metrics.get('kl'))}"
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
            "mse": short(row["metrics"].get("mse")),
            "cosine": short(row["metrics"].get("cosine")),
            "kl": short(row["metrics"].get("kl")),
            "top1": percent(row["metrics"].get("top1")),
            "status": (row.get("verdict") or {}).get("status", "–"),
            "progress": _progress_bar(row.get("verdict"), console.is_terminal),
            "readiness": (row.get("verdict") or {}).get("readiness", "–"),
        }
        for row in done
        if "metrics" in row
    ]
    if console.is_terminal:
        if lines:
            console.print(_table(f"{len(done)} of {len(rows)} jobs", lines, gap=2 if console.width >= 100 else 1))
    else:
        _print_columns(lines)
    print(f"Sweep: {printable(directory)}")


def _progress_bar(verdict: Mapping[str, Any] | None, drawn: bool) -> str:
    if not verdict:
        return "–"
    percent = verdict["progress"]
    filled = min(5, (percent + 10) // 20)
    return f"{'█' * filled}{'░' * (5 - filled)} {percent:3}%" if drawn else f"{percent}%"


def _table(title: str, rows: Sequence[Mapping[str, Any]], gap: int = 2) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", header_style="dim", box=None, padding=(0, gap, 0, 0)
    )
    for name in rows[0]:
        wide = name in _TEXTS
        table.add_column(
            name, overflow="fold" if wide else "ellipsis", no_wrap=not wide, justify="left" if wide else "right"
        )
    for row in rows:
        table.add_row(*(Text(str(value), style=COLOURS.get(str(value), "")) for value in row.values()))
    return table


def _print_plain(result: Mapping[str, Any], report: Any, verbose: bool) -> None:
    for label, value, _ in report.facts(result):
        print(f"{label}: {value}")
    for title, rows in report.tables(result, verbose):
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
