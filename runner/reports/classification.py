"""The report of labelled sets: sets beside each other, classes, and the confusion matrix."""

from runner.reports.console import Fact, Rows, Tables, chosen, known, many, number, percent
from runner.results import JsonObject

_CLASS_COLUMNS = ("class", "precision", "recall", "f1", "support", "predicted")


def finetune_facts(result: JsonObject) -> list[Fact]:
    """Every line of the report, in order."""
    metrics, trained = result.get("metrics") or {}, result.get("trained") or {}
    best = f"step {metrics['best_step']} (epoch {metrics['best_epoch']:.3g})" if "best_step" in metrics else None
    backbone = trained.get("backbone_parameters", 0)
    scope = f"{result['scope']}: {many(backbone)} of {many(trained['all_parameters'])} backbone parameters"
    untrained = metrics.get("untrained_accuracy")
    return known([
        ("Checkpoint", result.get("ckpt"), ""),
        ("Format", result.get("format"), ""),
        ("Base", result.get("base"), ""),
        ("Scope", f"{scope}, {many(trained['head_parameters'])} of the head" if trained else None, ""),
        ("Best", best, ""),
        *classification_lines(result),
        ("Untrained Head", None if untrained is None else percent(untrained), ""),
        ("Stopped", result.get("stopped"), ""),
        ("Best Checkpoint", (result.get("checkpoints") or [None])[0], ""),
    ])  # fmt: skip


def finetune_tables(result: JsonObject, verbose: bool) -> Tables:
    """The sets, the classes and the confusion matrix of the first; with `verbose` the evaluations."""
    tables = classification_tables(result)
    if verbose:
        names = ("step", "epoch", "loss", "accuracy", "macro_f1")
        tables.append(("evaluations", chosen(result.get("evaluations", []), names)))
    return tables


def classification_lines(result: JsonObject) -> list[tuple[str, object, str]]:
    """Accuracy, macro F1 and majority of the first set, where there is one."""
    metrics = result.get("metrics") or {}
    if "accuracy" not in metrics or "confusion" not in result:
        return []
    interval = f"{percent(metrics['accuracy_low'])} to {percent(metrics['accuracy_high'])}"
    return [
        ("Accuracy", f"{percent(metrics['accuracy'])} ({interval}, 95 %)", ""),
        ("Macro F1", number(metrics["macro_f1"]), ""),
        ("Commonest Class", percent(metrics["majority"]), ""),
        ("Agreement", None if "agreement" not in metrics else percent(metrics["agreement"]), ""),
    ]


def classification_tables(result: JsonObject) -> Tables:
    """The sets beside each other, the classes of the first, and its confusion matrix."""
    if "confusion" not in result:
        return []
    rows = []
    for row in result["transfer"]:
        cells = {
            "set": row["set"], "rows": str(row["rows"]), "loss": number(row["loss"]),
            "accuracy": percent(row["accuracy"]),
            "95 %": f"{percent(row['accuracy_low'])} to {percent(row['accuracy_high'])}",
            "macro F1": number(row["macro_f1"]),
        }  # fmt: skip
        if any("difference" in other for other in result["transfer"]):
            cells["difference"] = f"{100 * row['difference']:+.1f}" if "difference" in row else "–"
            own = "difference" in row
            cells["95 % "] = (
                f"{100 * row['difference_low']:+.1f} to {100 * row['difference_high']:+.1f}" if own else "–"
            )
        if "agreement" in row:
            cells["agreement"] = percent(row["agreement"])
        rows.append(cells)
    return [
        ("sets", rows),
        ("classes", chosen(result["classes"], _CLASS_COLUMNS)),
        ("confusion (rows true, columns predicted)", _matrix(result["confusion"], result["labels"])),
    ]


def _matrix(matrix: list[list[int]], labels: list[str]) -> Rows:
    return [
        {"true": label, **{other: str(count) for other, count in zip(labels, row, strict=True)}}
        for label, row in zip(labels, matrix, strict=True)
    ]
