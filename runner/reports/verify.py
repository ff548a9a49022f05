"""The report of `task=verify`."""

from collections.abc import Mapping
from typing import Any

from runner.reports.cells import Fact, Rows, known


def facts(result: Mapping[str, Any]) -> list[Fact]:
    """Every line of the report, in order."""
    rows = [
        ("Checkpoint", result["ckpt"], ""),
        ("Format", result.get("format"), ""),
        ("Step", result.get("step"), ""),
    ]
    rows += [
        (check["name"].capitalize(), f"{check['status']} ({check['details']})", check["status"])
        for check in result["checks"]
    ]
    word = "pass" if result["verified"] else "fail"
    rows.append(("Verified", "yes" if result["verified"] else "NO", word))
    return known(rows)


def tables(result: Mapping[str, Any], verbose: bool) -> list[tuple[str, Rows]]:
    """None: every check is a line of the report."""
    return []
