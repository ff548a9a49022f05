"""The report of `task=inspect`."""

from collections.abc import Mapping
from typing import Any

from runner.reports.cells import Fact, Rows, chosen, known, many, size

# Fields of the result that have lines or tables of their own, or are for machines only.
_OWN = {
    "task", "status", "ckpt", "base", "step", "family", "format", "layers", "findings", "timing", "versions",
    "evidence", "keys", "parameters", "bytes", "dtypes", "files", "stripped_prefix", "missing_keys", "unknown_keys",
    "components",    "tensors", "checkpoints", "ignored", "steps",
}  # fmt: skip


def facts(result: Mapping[str, Any]) -> list[Fact]:
    """Every line of the report, in order."""
    rows: list[tuple[str, Any, str]] = [("Run" if "checkpoints" in result else "Checkpoint", result.get("ckpt"), "")]
    if "checkpoints" in result:
        rows.append(("Steps", ", ".join(map(str, result["steps"])), ""))
        rows.append(("Ignored", ", ".join(result["ignored"]) or None, ""))
        return known(rows)
    rows += [
        ("Format", f"{result['format']} ({result['evidence']})", ""),
        ("Step", result.get("step"), ""),
        ("Base", result.get("base"), ""),
        ("Parameters", f"{many(result['parameters'])} in {many(result['keys'])} tensors, {size(result['bytes'])}", ""),
        ("Dtypes", ", ".join(f"{dtype} × {count}" for dtype, count in result["dtypes"].items()), ""),
        ("Prefix", f"{result['stripped_prefix']} (taken off all names)" if result["stripped_prefix"] else None, ""),
    ]
    for name, value in result.items():
        if name not in _OWN:
            rows += _lines(name.replace("_", " ").capitalize(), value)
    return known(rows)


def tables(result: Mapping[str, Any], verbose: bool) -> list[tuple[str, Rows]]:
    """The tables of the report as rows of finished cells."""
    if "checkpoints" in result:
        rows = [
            {
                "checkpoint": row["path"].rpartition("/")[2],
                "format": row.get("format", "–"),
                "layers": ", ".join(map(str, row.get("layers", []))) or "–",
                "parameters": many(row["parameters"]) if "parameters" in row else "–",
                "size": size(row["bytes"]) if "bytes" in row else "–",
                "details": row.get("error") or "; ".join(row.get("findings", [])),
            }
            for row in result["checkpoints"]
        ]
        return [("checkpoints", rows)]
    layers = chosen(result.get("layers", []), ["layer", "modulation", "np_rank", "num_ranks", "parameters"])
    parts = [
        {**part, "parameters": many(part["parameters"]), "bytes": size(part["bytes"])} for part in result["components"]
    ]
    found = [("NPT layers", layers), ("components", parts)]
    if verbose:
        found.append(("tensors", chosen(result.get("tensors", []), ["name", "shape", "dtype", "bytes"])))
        found.append(("files", [{"file": f["file"], "size": size(f["bytes"])} for f in result["files"]]))
    return [(title, rows) for title, rows in found if rows]


def _lines(label: str, value: Any, depth: int = 2) -> list[tuple[str, Any, str]]:
    """A described value as lines: a nested one a line an entry, deeper ones in short."""
    if isinstance(value, Mapping) and depth:
        return [line for name, item in value.items() for line in _lines(f"{label} · {name}", item, depth - 1)]
    return [(label, _brief(value), "")] if value not in (None, [], {}) else []


def _brief(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_brief(item)}" for name, item in value.items() if item is not None)
    if isinstance(value, list):
        return ", ".join(map(_brief, value[:12])) + (f", … ({len(value)})" if len(value) > 12 else "")
    return str(value)
