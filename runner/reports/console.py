"""What a person reads in a terminal, and what grep reads in a pipe; figures as people read them.

rich is imported where something is drawn, which a pipe does not need.
"""

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from runner.errors import printable
from runner.results import JsonObject

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

# (label, value, word that decides the colour)
Fact = tuple[str, str, str]
# Rows of finished cells, all with the same names; and titles with such rows.
Rows = Sequence[Mapping[str, object]]
Tables = list[tuple[str, Rows]]


def number(value: object, digits: int = 4) -> str:
    """A figure for reading: `–` where there is none."""
    if value is None:
        return "–"
    if isinstance(value, float):
        exponent = value != 0 and not 0.001 <= abs(value) < 10000
        return f"{value:.{digits}{'g' if exponent else 'f'}}"
    return str(value)


def cell(name: str, value: object) -> str:
    """One finished cell of the column `name`."""
    if name in ("top1", "top5", "agreement", "repetition"):
        return percent(value)
    if name in ("prompt", "text", "reference_text"):
        return printable(str(value).replace("\n", " "))
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return number(value)


def percent(value: object) -> str:
    """A share as a percentage."""
    return "–" if value is None else f"{value:.1%}"


def chosen(items: Iterable[JsonObject], names: Sequence[str]) -> Rows:
    """Rows of finished cells: those of `names` that an item has."""
    return [{name: cell(name, item[name]) for name in names if name in item} for item in items]


def known(rows: Iterable[tuple[str, object, str]]) -> list[Fact]:
    """The facts that have a value, as harmless text."""
    return [(label, printable(value), word) for label, value, word in rows if value is not None]


def size(count: float) -> str:
    """Bytes in binary units: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def many(count: int) -> str:
    """A number with thin groups: 1,234,567."""
    return f"{count:,}"


COLOURS = {
    "excellent": "bold green", "good": "green", "fair": "yellow", "moderate": "yellow", "poor": "bold red",
    "production": "bold green", "basic": "green", "continue": "yellow", "early": "red",
    "pass": "green", "fail": "bold red", "damaged": "bold red",
}  # fmt: skip
# Columns that are text: left-aligned, and folded where they do not fit.
_TEXTS = (
    "checkpoint", "prompt", "of", "text", "reference_text", "details", "component", "name", "file", "figure", "phase",
    "check",
)  # fmt: skip


def terminal() -> "Console | None":
    """The terminal that stdout is; None where it is a pipe or a file."""
    if not sys.stdout.isatty() and not os.environ.get("FORCE_COLOR"):
        return None
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else None


def print_result(result: JsonObject, *, verbose: bool, directory: Path) -> None:
    """The whole report: a panel in a terminal, plain unwrapped lines in a pipe; last, where it lies."""
    facts, tables = _report(result["task"])
    left = f"Result: {printable(directory)}/result.json"
    console = terminal()
    if console is None:
        _print_plain(result, facts(result), tables(result, verbose))
        print(left)
        return
    from rich.console import Group
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, value, word in facts(result):
        grid.add_row(label, Text(value, style=COLOURS.get(word, "")))
    parts: list[RenderableType] = [grid]
    for title, rows in tables(result, verbose):
        parts += ["", _table(title, rows)]
    if result.get("findings"):
        parts.append("")
    for finding in result.get("findings", []):
        parts.append(Text(f"! {printable(finding)}", style="yellow"))
    console.print(Panel(Group(*parts), title=f"runner · {result['task']}", title_align="left", padding=(1, 2)))
    console.print(Text(left, style="dim"), soft_wrap=True)


def print_line(result: JsonObject, console: "Console", *, number: int, job: str = "?") -> None:
    """One job of a sweep in one line, as it ends; where it has no checkpoint it is called `job`."""
    name = printable(Path(result.get("ckpt") or job).name)
    if result["status"] != "ok":
        text = f"#{number} {name}: FAILED"
    else:
        metrics, verdict = result.get("metrics", {}), result.get("verdict") or {}
        words = [f"{key} {cell(key, metrics[key])}" for key in ("mse", "cosine", "kl") if metrics.get(key) is not None]
        words += _failed_checks(result.get("checks", [])) + ([verdict["status"]] if verdict else [])
        text = f"#{number} {name}: {', '.join(words) or 'done'}"
    bad = result["status"] != "ok" or any(check["status"] == "fail" for check in result.get("checks", []))
    console.print(text, markup=False, highlight=False, soft_wrap=True, style=COLOURS["fail"] if bad else None)


def _failed_checks(checks: Sequence[JsonObject]) -> list[str]:
    """`1 check failed: model (why)`: the names, and of a single one what it says; [] where all passed."""
    failed = [check for check in checks if check["status"] == "fail"]
    if not failed:
        return []
    names = ", ".join(printable(check["name"]) for check in failed)
    why = f" ({printable(failed[0]['details'])})" if len(failed) == 1 and failed[0].get("details") else ""
    return [f"{len(failed)} check{'s' if len(failed) > 1 else ''} failed: {names}{why}"]


def print_rows(title: str, rows: Rows, console: "Console", *, gap: int = 2) -> None:
    """Finished cells as a table in a terminal, as plain columns in a pipe; nothing where there are none."""
    if not rows:
        return
    if console.is_terminal:
        console.print(_table(title, rows, gap))
    else:
        _print_columns(rows)


def _table(title: str, rows: Rows, gap: int = 2) -> "Table":
    from rich.table import Table

    table = Table(
        title=title, title_justify="left", title_style="bold", header_style="dim", box=None, padding=(0, gap, 0, 0)
    )
    for name in rows[0]:
        wide = name in _TEXTS
        table.add_column(
            name, overflow="fold" if wide else "ellipsis", no_wrap=not wide, justify="left" if wide else "right"
        )
    for row in rows:
        table.add_row(*map(_text, row.values()))
    return table


def _text(value: object) -> "Text":
    from rich.text import Text

    return value if isinstance(value, Text) else Text(str(value), style=COLOURS.get(str(value), ""))


# The tasks whose report has a module of its own.
_MODULES = {"compare": "compare", "generate": "generation", "transfer": "transfer", "finetune": "classification"}


def _report(task: str) -> tuple[Callable[..., list[Fact]], Callable[..., Tables]]:
    """The lines and the tables (if any) of a task's report, imported when it is printed."""
    module = import_module(f"runner.reports.{_MODULES.get(task, 'tasks')}")
    return getattr(module, f"{task}_facts"), getattr(module, f"{task}_tables", lambda result, verbose: [])


def _print_plain(result: JsonObject, facts: list[Fact], tables: Tables) -> None:
    for label, value, _ in facts:
        print(f"{label}: {value}")
    for title, rows in tables:
        print(f"\n{title}")
        _print_columns(rows)
    for finding in result.get("findings", []):
        print(f"Finding: {printable(finding)}")


def _print_columns(rows: Rows) -> None:
    """Aligned columns, unwrapped however wide."""
    if not rows:
        return
    lines = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
