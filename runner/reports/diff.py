"""The report of `task=diff`."""

from collections.abc import Mapping
from typing import Any

from runner.errors import printable
from runner.reports.cells import Fact, Rows, known, many, number

# Changed tensors that are shown without verbose=true, those that changed most first.
_SHOWN = 20


def facts(result: Mapping[str, Any]) -> list[Fact]:
    """Every line of the report, in order."""
    totals = result.get("totals") or {}
    word = "pass" if result["identical"] else ""
    same = "yes, every tensor bit for bit" if result["identical"] else "no"
    rows = [
        ("Checkpoint", result["ckpt"], ""),
        ("Reference", result["reference"], ""),
        ("Identical", same, word),
        ("Equal Tensors", many(result["equal_tensors"]), ""),
        ("Changed Tensors", many(result["changed_tensors"]), ""),
        ("Only in Checkpoint", _names(result["only_in_ckpt"]), ""),
        ("Only in Reference", _names(result["only_in_reference"]), ""),
    ]
    if totals:
        figures = f"mse {number(totals['mse'], 6)}, largest difference {number(totals['max_abs'])}"
        other = sum("reference_shape" in row for row in result["tensors"])
        left_out = f"; without {many(other)} of other shapes" if other else ""
        rows.append(("Common Weights", f"{figures} over {many(totals['elements'])} elements{left_out}", ""))
    return known(rows)


def tables(result: Mapping[str, Any], verbose: bool) -> list[tuple[str, Rows]]:
    """The tensors that changed, or with `verbose` all."""
    rows = [row for row in result["tensors"] if verbose or not row["equal"]]
    rows.sort(key=lambda row: -(row.get("relative") or 0.0))
    shown = rows if verbose else rows[:_SHOWN]
    title = "tensors" if verbose else "changed tensors"
    if len(shown) < len(rows):
        title += f" ({len(shown)} of {len(rows)}; verbose=true shows all)"
    return [(title, [_row(row) for row in shown])] if shown else []


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    shapes = [str(row[key]) for key in ("shape", "reference_shape") if key in row]
    dtypes = [row[key] for key in ("dtype", "reference_dtype") if key in row]
    figures = {key: number(row.get(key)) for key in ("mse", "cosine", "max_abs", "relative")}
    return {"name": printable(row["name"]), "shape": " ≠ ".join(shapes), "dtype": " ≠ ".join(dtypes), **figures}


def _names(names: list[str]) -> str | None:
    if not names:
        return None
    return f"{len(names)}: {', '.join(names[:6])}{', …' if len(names) > 6 else ''}"
