"""Figures as people read them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from runner.errors import printable

# (label, value, word that decides the colour)
Fact = tuple[str, str, str]
# A title and rows of finished cells, all with the same names.
Rows = list[dict[str, Any]]


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


def cell(name: str, value: Any) -> str:
    """One finished cell of the column `name`."""
    if name in ("top1", "top5", "agreement", "repetition"):
        return percent(value)
    if name in ("prompt", "text", "reference_text"):
        return printable(str(value).replace("\n", " "))
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return short(value)


def short(value: Any) -> str:
    """A figure with four digits."""
    return number(value, 4)


def percent(value: float | None) -> str:
    """A share as a percentage."""
    return "–" if value is None else f"{value:.1%}"


def chosen(items: Iterable[Mapping[str, Any]], names: Sequence[str]) -> Rows:
    """Rows of finished cells: those of `names` that an item has."""
    return [{name: cell(name, item[name]) for name in names if name in item} for item in items]


def known(rows: Iterable[tuple[str, Any, str]]) -> list[Fact]:
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
