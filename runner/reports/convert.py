"""The report of `task=convert`."""

from collections.abc import Mapping
from typing import Any

from runner.reports.cells import Fact, Rows, chosen, known


def facts(result: Mapping[str, Any]) -> list[Fact]:
    """Every line of the report, in order."""
    return known(
        [
            ("Checkpoint", result.get("ckpt"), ""),
            ("Format", result.get("format"), ""),
            ("Step", result.get("step"), ""),
            ("Output", result["output"], ""),
            ("Files", ", ".join(result["files"]), ""),
        ]
    )


def tables(result: Mapping[str, Any], verbose: bool) -> list[tuple[str, Rows]]:
    """The checks that the output passed before it was published."""
    return [("checks", chosen(result["checks"], ["name", "status", "details"]))]
