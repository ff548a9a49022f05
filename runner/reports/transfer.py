"""The report of `task=transfer`: what was injected, beside what the lines themselves have shown."""

from collections.abc import Sequence

from runner.reports.console import Fact, Rows, Tables, cell, known, number
from runner.results import JsonObject

_COLUMNS = ["modulation", "prompt", "mode", "space", "kl", "permuted_kl", "other_prompt_kl", "locality_kl"]


def transfer_facts(result: JsonObject) -> list[Fact]:
    """Every line of the report, in order."""
    means = result.get("means", {})
    return known(
        [
            ("Checkpoint", result["ckpt"], ""),
            ("Format", result["format"], ""),
            ("Commands", len(result["commands"]) if "commands" in result else None, ""),
            ("Experiments", len(result["experiments"]) if "experiments" in result else None, ""),
            ("Mean KL", number(means["kl"]) if "kl" in means else None, ""),
            ("Page", result.get("page"), ""),
        ]
    )


def transfer_tables(result: JsonObject, verbose: bool) -> Tables:
    """A row an injection, and a row an experiment; with `verbose` each layer of it."""
    injections = filled(result.get("per_prompt", []), _COLUMNS)
    experiments = filled(result.get("experiments", []), ["name", "mode", "positions", "kl"])
    layers = filled(
        [{"name": row["name"], **each} for row in result.get("experiments", []) for each in row.get("by_layer", [])],
        ["name", "layer", "kl"],
    )
    found: Tables = [("injections", injections), ("experiments", experiments)]
    return [(title, rows) for title, rows in [*found, *([("by layer", layers)] if verbose else [])] if rows]


def filled(rows: Sequence[JsonObject], names: Sequence[str]) -> Rows:
    """Finished cells of those of `names` that any row has; – where one has none."""
    used = [name for name in names if any(row.get(name) is not None for row in rows)]
    return [{name: cell(name, row.get(name)) for name in used} for row in rows]
