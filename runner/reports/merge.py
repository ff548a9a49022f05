"""The report of `task=merge`."""

from collections.abc import Mapping
from typing import Any

from runner.errors import printable
from runner.reports import diagnose
from runner.reports.cells import Fact, Rows, chosen, known, many, size

# Lines of a diagnosis that a merge has lines of its own for.
_OWN = ("Checkpoint", "Format", "Step", "Base", "NPT Layers")


def facts(result: Mapping[str, Any]) -> list[Fact]:
    """Every line of the report, in order."""
    planned = result["dry_run"]
    rows = [
        ("Would Write" if planned else "Output", result["output"], ""),
        ("Format", result.get("format"), ""),
        ("Step", result.get("step"), ""),
        ("Base", result.get("base"), ""),
        ("Expected Layers", str(result["expected_layers"]), ""),
        ("Found Layers", str(result["found_layers"]) if result["found_layers"] is not None else None, ""),
        ("Keys", f"{many(result['keys'])} of {many(result['parameters'])} parameters", ""),
        ("Size", f"{size(result['bytes'])} of tensors", ""),
    ]
    rows += [("Verified " + c["name"], f"{c['status']} ({c['details']})", c["status"]) for c in result["checks"]]
    joint = [fact for fact in diagnose.facts(result) if fact[0] not in _OWN] if result.get("metrics") else []
    return known(rows) + joint


def tables(result: Mapping[str, Any], verbose: bool) -> list[tuple[str, Rows]]:
    """Where each layer comes from, and what the joint measurement gave."""
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
        for row in result["layers"]
    ]
    names = ["layer", "details"]
    conflicts = [{"layer": c["layer"], "details": c["resolution"]} for c in result["conflicts"]]
    found = [("layers", layers), ("conflicts", chosen(conflicts, names))]
    joint = diagnose.tables({**result, "layers": [row for row in result["layers"] if "mse" in row]}, verbose)
    return [(title, rows) for title, rows in found if rows] + [each for each in joint if each[0] != "checks"]
