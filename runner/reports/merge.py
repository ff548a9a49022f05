"""The report of `task=merge`."""

from collections.abc import Mapping, Sequence
from typing import Any

from runner.errors import printable
from runner.reports import tasks as diagnose
from runner.reports.cells import Fact, Rows, known, many, size

# Lines of a diagnosis that a merge has lines of its own for.
_OWN = ("Checkpoint", "Format", "Step", "Base", "NPT Layers")
_NUMBERED = (
    ("Expected Layers", "expected_layers"),
    ("Found Layers", "found_layers"),
    ("Expected Experts", "expected_experts"),
    ("Found Experts", "found_experts"),
)


def facts(result: Mapping[str, Any]) -> list[Fact]:
    """Every line of the report, in order."""
    planned = result["dry_run"]
    rows = [
        ("Would Write" if planned else "Output", result["output"], ""),
        ("Format", result.get("format"), ""),
        ("Step", result.get("step"), ""),
        ("Base", result.get("base"), ""),
        *((label, _numbers(result.get(name)), "") for label, name in _NUMBERED),
        ("Keys", f"{many(result['keys'])} of {many(result['parameters'])} parameters", ""),
        ("Size", f"{size(result['bytes'])} of tensors", ""),
    ]
    rows += [("Verified " + c["name"], f"{c['status']} ({c['details']})", c["status"]) for c in result["checks"]]
    joint = [fact for fact in diagnose.facts(result) if fact[0] not in _OWN] if result.get("metrics") else []
    return known(rows) + joint


def _numbers(numbers: Sequence[int] | None) -> str | None:
    return None if numbers is None else str(list(numbers))


def tables(result: Mapping[str, Any], verbose: bool) -> list[tuple[str, Rows]]:
    """Where each layer or expert comes from, and what the joint measurement gave."""
    rows = result.get("layers", [])
    layers = [
        {
            "layer": row["layer"],
            "modulation": row["modulation"],
            "np_rank": row["np_rank"],
            "num_ranks": row["num_ranks"],
            "parameters": many(row["parameters"]),
            "how": row["how"],
            "details": printable(" + ".join(row["sources"])),
        }
        for row in rows
    ]
    experts = [
        {
            "expert": row["expert"],
            "rank": ", ".join(map(str, row["ranks"])),
            "alpha": f"{row['lora_alpha']:g}",
            "parameters": many(row["parameters"]),
            "details": printable(f"expert {row['source_expert']} of {row['source']}"),
        }
        for row in result.get("experts", [])
    ]
    averaged = [
        {"share": f"{row['weight']:.4g}", "step": row["step"], "details": printable(row["source"])}
        for row in result.get("averaged", [])
    ]
    conflicts = [
        {"what": f"{kind} {c[kind]}", "details": printable(c["resolution"])}
        for c in result["conflicts"]
        for kind in ("layer", "expert", "skill")
        if kind in c
    ]
    found = [("layers", layers), ("experts", experts), ("averaged", averaged), ("conflicts", conflicts)]
    joint = diagnose.tables({**result, "layers": [row for row in rows if "mse" in row]}, verbose)
    return [(title, rows) for title, rows in found if rows] + [each for each in joint if each[0] != "checks"]
