"""The report of `task=diagnose`."""

from collections.abc import Mapping
from typing import Any

from runner.reports.cells import Fact, Rows, cell, chosen, known, number, percent

_DETAILS = (
    "kl_reverse",
    "top5",
    "dp_rms",
    "scale",
    "magnitude_share",
    "control_mse",
    "additivity",
    "progressive_trend",
)


def facts(result: Mapping[str, Any]) -> list[Fact]:
    """Every line of the report, in order."""
    metrics, verdict = result.get("metrics", {}), result.get("verdict") or {}
    rows = [("Checkpoint", result.get("ckpt"), ""), ("Format", result.get("format"), "")]
    rows += [("Step", result.get("step"), ""), ("Base", result.get("base"), "")]
    if result.get("reference") != result.get("base"):
        rows.append(("Reference", result.get("reference"), ""))
    rows.append(("NPT Layers", "; ".join(map(describe_layer, result.get("layers", []))) or None, ""))
    if "mse" in metrics:
        rows += [
            ("MSE Loss", number(metrics["mse"], 6), verdict.get("status", "")),
            ("Cosine Similarity", number(metrics["cosine"]), verdict.get("cosine_status", "")),
            ("KL Divergence", f"{number(metrics['kl'])} nats/token", ""),
            ("Top-1 Agreement", percent(metrics.get("top1")), ""),
        ]
    rows += [("Forward", check["details"], check["status"]) for check in result["checks"] if check["name"] == "forward"]
    if text := metrics.get("text"):
        figures = f"perplexity {number(text.get('ppl'), 2)}"
        if "mse" in text:
            figures += f" (reference {number(text.get('ppl_reference'), 2)})"
            figures += f", mse {number(text['mse'])}, kl {number(text['kl'])}"
        rows.append(("Text", f"{figures} on {text['tokens']} tokens", ""))
    if floor := metrics.get("floor"):
        rows.append(
            ("Floor", f"mse {number(floor['mse'], 6)}, kl {number(floor['kl'])} (reference in the other precision)", "")
        )
    if "greedy_agreement" in metrics:
        rows.append(("Greedy Agreement", percent(metrics["greedy_agreement"]), ""))
    if verdict:
        rows += [
            ("Loss Status", verdict["status"].upper(), verdict["status"]),
            ("Cosine Status", verdict["cosine_status"].upper(), verdict["cosine_status"]),
            ("Estimated Progress", f"{verdict['progress']:.1f}% (rule of thumb)", ""),
            ("Remaining Work", verdict["remaining"], ""),
            ("Readiness", f"{verdict['readiness']} ({verdict['reason']})", verdict["readiness"]),
            ("Recommendation", verdict["recommendation"], ""),
        ]
    return known(rows)


def describe_layer(layer: Mapping[str, Any]) -> str:
    """One NPT layer in a few characters: `11: triple, r 16, k 4`."""
    return f"{layer['layer']}: {layer['modulation']}, r {layer['np_rank']}, k {layer['num_ranks']}"


def tables(result: Mapping[str, Any], verbose: bool) -> list[tuple[str, Rows]]:
    """The tables of the report as rows of finished cells."""
    figures = ["mse", "cosine", "kl", "top1"] + (["kl_reverse", "top5", "dp_rms", "scale"] if verbose else [])
    tables = [("per prompt", chosen(result.get("per_prompt", []), ["prompt", "tokens", *figures]))]
    if any("mse" in layer for layer in result.get("layers", [])):
        kinds = ["modulation", "np_rank", "num_ranks"] if verbose else []
        tables.append(("each layer alone", chosen(result["layers"], ["layer", *kinds, "mse", "cosine", "kl"])))
    tables.append(("layers together", chosen(result.get("progressive", []), ["layers", "mse", "cosine", "kl"])))
    names = ["prompt", "temperature", "agreement", "first_divergence", "repetition"] + (
        ["text", "reference_text"] if verbose else []
    )
    tables.append(("continuations", chosen(result.get("generation", []), names)))
    if verbose:
        metrics = result.get("metrics", {})
        tables.append(("more figures", [{"figure": n, "value": cell(n, metrics[n])} for n in _DETAILS if n in metrics]))
        tables.append(("checks", chosen(result.get("checks", []), ["name", "status", "details"])))
        tables.append(("seconds", [{"phase": k, "seconds": f"{v:.2f}"} for k, v in result.get("timing", {}).items()]))
    return [(title, content) for title, content in tables if content]
