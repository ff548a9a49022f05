"""The report of `task=test`."""

from collections.abc import Mapping
from typing import Any

from runner.errors import printable
from runner.reports.cells import Fact, Rows, known, number, size

_COLOURS = {"READY": "excellent", "PARTIALLY_READY": "fair", "NOT_READY": "poor"}


def facts(result: Mapping[str, Any]) -> list[Fact]:
    """Every line of the report, in order."""
    checks = result["checks"]
    counts = {word: sum(row["status"] == word for row in checks) for word in ("pass", "warning", "fail", "skipped")}
    shown = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    score = result.get("metrics", {}).get("score")
    overall = result.get("overall")
    reasons = (
        ["an integrity check failed"] if any(row["integrity"] and row["status"] == "fail" for row in checks) else []
    )
    reasons += [f"mean score {number(score, 2)}"] if score is not None else []
    readiness = None if overall is None else f"{overall} ({', '.join(reasons)})"
    built = next(
        (row["data"]["path"] for row in checks if row["name"] == "built" and "path" in row.get("data", {})), None
    )
    rows: list[tuple[str, Any, str]] = [
        ("Checkpoint", result.get("ckpt"), ""),
        ("Kept", built if result.get("kept") else None, ""),
        ("Family", result.get("family"), ""),
        ("Tier", result.get("tier"), ""),
        ("Estimate", result.get("estimate"), ""),
        ("Checks", shown, "" if counts["fail"] else "pass"),
        ("Overall", readiness, _COLOURS.get(overall or "", "")),
        ("Passed", "yes" if result["passed"] else "NO", "pass" if result["passed"] else "fail"),
    ]
    rows += [
        (f"Recommendation ({row['name']})", row["recommendation"], "")
        for row in checks
        if "recommendation" in row and row["status"] in ("fail", "warning")
    ]
    return known(rows)


def tables(result: Mapping[str, Any], verbose: bool) -> list[tuple[str, Rows]]:
    """One row a check; with `verbose` what each looks at."""
    rows = [
        {
            "check": row["name"],
            "status": row["status"],
            **({"score": number(row.get("score"), 2)} if result.get("overall") else {}),
            "seconds": f"{row['seconds']:.2f}",
            "memory": size(row["peak_bytes"]),
            "details": printable(row["details"]),
            **({"text": row["title"]} if verbose else {}),
        }
        for row in result["checks"]
    ]
    return [("checks", rows)]
