"""The report of `task=train`."""

from collections.abc import Mapping
from typing import Any

from runner.reports.cells import Fact, Rows, known, number


def facts(result: Mapping[str, Any]) -> list[Fact]:
    """Every line of the report, in order."""
    losses = [(name.replace("_", " ").capitalize(), number(value, 6), "") for name, value in result["metrics"].items()]
    return known(
        [
            ("Last Checkpoint", result["ckpt"], ""),
            ("Checkpoints", len(result["checkpoints"]), ""),
            ("Base", result.get("base"), ""),
            ("Step", result.get("step"), ""),
            *losses,
        ]
    )


def tables(result: Mapping[str, Any], verbose: bool) -> list[tuple[str, Rows]]:
    """The checkpoints that were written, where all is asked for."""
    return [("checkpoints", [{"checkpoint": path} for path in result["checkpoints"]])] if verbose else []
