"""From a result (runner/results.py) to what is plotted: rows, tables and a summary, as plain values.

Keys are flat and the step of the checkpoint is a metric of its own, so that steps may come in any order.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from runner.results import JsonObject, is_number

STEP = "checkpoint/step"
# Every metric that matches a pattern is drawn over this one; the x axes themselves come first.
AXES = {"eval/*": STEP, "merge/*": STEP, "layer/*": "layer/index", "train/*": "train/step"}
# What a training logs beside `train/…`, under the names that the original's guide promises.
TRAINING_AXES = {
    f"{group}/*": "train/step"
    for group in (
        "loss", "mlp_direct_loss", "regularization", "v_a_norm", "v_b_norm", "v_a_attention_similarity", "curriculum",
        "training", "eval_loss", "eval_mlp_direct_loss", "eval_regularization",
    )
}  # fmt: skip

LAYER_FIGURES = ("mse", "cosine", "kl")
_CHECK_COLUMNS = ("name", "status", "integrity", "score", "seconds", "peak_bytes", "details", "recommendation")


@dataclass(frozen=True, kw_only=True)
class LoggedTable:
    """A table of scalars and text, `rows[i][j]` under `columns[j]`."""

    columns: list[str]
    rows: list[list[Any]]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Lines in one plot: label → its points (x, y); `x` names the axis."""

    title: str
    x: str
    lines: Mapping[str, Sequence[tuple[float, float]]]


@dataclass(frozen=True, kw_only=True)
class Record:
    """All that is logged at the end of a run: `rows` in their order, then tables, charts and the summary.

    `config`: keys that the run's config gains; `axes`: pattern → axis, beside AXES.
    """

    rows: Sequence[Mapping[str, float]] = ()
    tables: Mapping[str, LoggedTable] = field(default_factory=dict)
    charts: Mapping[str, Chart] = field(default_factory=dict)
    summary: JsonObject = field(default_factory=dict)
    config: JsonObject = field(default_factory=dict)
    axes: Mapping[str, str] = field(default_factory=dict)


def job_record(result: JsonObject, step: int | None) -> Record:
    """The point of this checkpoint, one row a layer, the tables, and the keys that detection has found out."""
    found = {"ckpt_step": step, "family": result.get("family"), "format": result.get("format")}
    return Record(
        rows=[row for row in (eval_row(result, step), *layer_rows(result)) if row],
        tables=tables(result, step),
        summary=summary(result),
        config={key: value for key, value in found.items() if value is not None},
    )


def eval_row(result: JsonObject, step: int | None) -> dict[str, float]:
    """One point: every number of `metrics` as `eval/<name>` (nested ones as `eval/<group>_<name>`) and the progress."""
    row: dict[str, float] = {f"eval/{name}": value for name, value in numbers(result.get("metrics") or {})}
    progress = (result.get("verdict") or {}).get("progress")
    if is_number(progress):
        row["eval/progress"] = progress
    if row and step is not None:
        row[STEP] = step
    return row


def layer_rows(result: JsonObject) -> list[dict[str, float]]:
    """One row for each layer that was measured by itself."""
    rows = []
    for layer in result.get("layers") or []:
        figures = {f"layer/{name}": layer[name] for name in LAYER_FIGURES if is_number(layer.get(name))}
        if figures:
            rows.append({"layer/index": layer["layer"], **figures})
    return rows


def tables(result: JsonObject, step: int | None) -> dict[str, LoggedTable]:
    """`tables/per_layer` and `tables/per_prompt`, of a test `tables/checks`, of a training `tables/samples`, of a
    classifier `tables/transfer` and `tables/confusion`.

    Only those that have rows.

    Each has a `ckpt_step` column.
    """
    records = {"tables/per_layer": result.get("layers"), "tables/per_prompt": result.get("per_prompt")}
    if result.get("task") == "test":
        records["tables/checks"] = [{name: row.get(name) for name in _CHECK_COLUMNS} for row in result["checks"]]
    if result.get("task") == "train":
        records["tables/samples"] = result.get("samples")
    if result.get("confusion"):
        records["tables/transfer"] = result["transfer"]
        records["tables/confusion"] = [
            {"true": true, "predicted": predicted, "rows": count}
            for true, row in zip(result["labels"], result["confusion"], strict=True)
            for predicted, count in zip(result["labels"], row, strict=True)
        ]
    return {name: _table(rows, step) for name, rows in records.items() if rows}


def summary(result: JsonObject) -> JsonObject:
    """What a table of runs shows beside the figures: the verdict in words, and what a merge made."""
    verdict = result.get("verdict") or {}
    words = {
        "status": result.get("status"),
        "error": (result.get("error") or {}).get("message"),
        "verdict": verdict.get("status"),
        "readiness": verdict.get("readiness"),
        "overall": result.get("overall"),
    }
    return {key: value for key, value in {**words, **_merge_summary(result)}.items() if value is not None}


def _merge_summary(result: JsonObject) -> JsonObject:
    """The merge's layers or experts, its numbers of keys and parameters, its sources; {} where nothing was merged."""
    sources = result.get("sources")
    if not isinstance(sources, Mapping):
        return {}
    keys = result.get("keys")
    return {
        "merge/layers": result.get("found_layers", result.get("expected_layers")),
        "merge/experts": result.get("found_experts", result.get("expected_experts")),
        "merge/keys": len(keys) if isinstance(keys, Sequence) else keys,
        "merge/parameters": result.get("parameters"),
        "merge/sources": sorted({str(path) for found in sources.values() for path in _listed(found)}),
    }


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else [value]


def _table(records: Sequence[JsonObject], step: int | None) -> LoggedTable:
    columns = list(dict.fromkeys(key for record in records for key in record))
    rows = [[step, *(cell(record.get(column)) for column in columns)] for record in records]
    return LoggedTable(columns=["ckpt_step", *columns], rows=rows)


def cell(value: Any) -> Any:
    """`value` as a table holds it: lists and objects as JSON."""
    return value if value is None or isinstance(value, (str, int, float)) else json.dumps(value, ensure_ascii=False)


def numbers(metrics: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every finite number of `metrics`, a nested one under `<group>_<name>`."""
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield from numbers(value, f"{prefix}{name}_")
        elif is_number(value):
            yield f"{prefix}{name}", value
