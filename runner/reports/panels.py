"""The report of `task=panels`."""

from collections.abc import Mapping
from typing import Any

from runner.reports.cells import Fact, Rows, known


def facts(result: Mapping[str, Any]) -> list[Fact]:
    """Every line of the report, in order."""
    panels = ", ".join(f"{name} ({count})" for name, count in result["sections"].items())
    return known(
        [
            ("Sweep", ", ".join(result["sweep"]), ""),
            ("Workspace", result["workspace"], ""),
            ("Panels", panels, ""),
            ("File", result["file"], ""),
            ("Saved", result.get("url"), ""),
        ]
    )


def tables(result: Mapping[str, Any], verbose: bool) -> list[tuple[str, Rows]]:
    """None."""
    return []
