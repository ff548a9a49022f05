"""The report of each task: its lines (facts) and its tables. `task=compare` has its own in compare.py."""

from collections.abc import Mapping, Sequence
from typing import Any

from runner.errors import printable
from runner.reports.console import Fact, Rows, cell, chosen, known, many, number, percent, size

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


def diagnose_facts(result: Mapping[str, Any]) -> list[Fact]:
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


def diagnose_tables(result: Mapping[str, Any], verbose: bool) -> list[tuple[str, Rows]]:
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


def convert_facts(result: Mapping[str, Any]) -> list[Fact]:
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


def convert_tables(result: Mapping[str, Any], verbose: bool) -> list[tuple[str, Rows]]:
    """The checks that the output passed before it was published."""
    return [("checks", chosen(result["checks"], ["name", "status", "details"]))]


# Changed tensors that are shown without verbose=true, those that changed most first.
_SHOWN = 20


def diff_facts(result: Mapping[str, Any]) -> list[Fact]:
    """Every line of the report, in order."""
    totals = result.get("totals") or {}
    word = "pass" if result["identical"] else ""
    same = "yes, every tensor bit for bit" if result["identical"] else "no"
    rows = [
        ("Checkpoint", result["ckpt"], ""),
        ("Reference", result["reference"], ""),
        ("Identical", same, word),
        ("Equal Tensors", many(result["equal_tensors"]), ""),
        ("Changed Tensors", many(result["changed_tensors"]), ""),
        ("Only in Checkpoint", _names(result["only_in_ckpt"]), ""),
        ("Only in Reference", _names(result["only_in_reference"]), ""),
    ]
    if totals:
        figures = f"mse {number(totals['mse'], 6)}, largest difference {number(totals['max_abs'])}"
        other = sum("reference_shape" in row for row in result["tensors"])
        left_out = f"; without {many(other)} of other shapes" if other else ""
        rows.append(("Common Weights", f"{figures} over {many(totals['elements'])} elements{left_out}", ""))
    return known(rows)


def diff_tables(result: Mapping[str, Any], verbose: bool) -> list[tuple[str, Rows]]:
    """The tensors that changed, or with `verbose` all."""
    rows = [row for row in result["tensors"] if verbose or not row["equal"]]
    rows.sort(key=lambda row: -(row.get("relative") or 0.0))
    shown = rows if verbose else rows[:_SHOWN]
    title = "tensors" if verbose else "changed tensors"
    if len(shown) < len(rows):
        title += f" ({len(shown)} of {len(rows)}; verbose=true shows all)"
    return [(title, [_row(row) for row in shown])] if shown else []


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    shapes = [str(row[key]) for key in ("shape", "reference_shape") if key in row]
    dtypes = [row[key] for key in ("dtype", "reference_dtype") if key in row]
    figures = {key: number(row.get(key)) for key in ("mse", "cosine", "max_abs", "relative")}
    return {"name": printable(row["name"]), "shape": " ≠ ".join(shapes), "dtype": " ≠ ".join(dtypes), **figures}


def _names(names: list[str]) -> str | None:
    if not names:
        return None
    return f"{len(names)}: {', '.join(names[:6])}{', …' if len(names) > 6 else ''}"


# Fields of the result that have lines or tables of their own, or are for machines only.
_OWN = {
    "task", "status", "ckpt", "base", "step", "family", "format", "layers", "findings", "timing", "versions",
    "evidence", "keys", "parameters", "bytes", "dtypes", "files", "stripped_prefix", "missing_keys", "unknown_keys",
    "components",    "tensors", "checkpoints", "ignored", "steps",
}  # fmt: skip


def inspect_facts(result: Mapping[str, Any]) -> list[Fact]:
    """Every line of the report, in order."""
    rows: list[tuple[str, Any, str]] = [("Run" if "checkpoints" in result else "Checkpoint", result.get("ckpt"), "")]
    if "checkpoints" in result:
        rows.append(("Steps", ", ".join(map(str, result["steps"])), ""))
        rows.append(("Ignored", ", ".join(result["ignored"]) or None, ""))
        return known(rows)
    rows += [
        ("Format", f"{result['format']} ({result['evidence']})", ""),
        ("Step", result.get("step"), ""),
        ("Base", result.get("base"), ""),
        ("Parameters", f"{many(result['parameters'])} in {many(result['keys'])} tensors, {size(result['bytes'])}", ""),
        ("Dtypes", ", ".join(f"{dtype} × {count}" for dtype, count in result["dtypes"].items()), ""),
        ("Prefix", f"{result['stripped_prefix']} (taken off all names)" if result["stripped_prefix"] else None, ""),
    ]
    for name, value in result.items():
        if name not in _OWN:
            rows += _lines(name.replace("_", " ").capitalize(), value)
    return known(rows)


def inspect_tables(result: Mapping[str, Any], verbose: bool) -> list[tuple[str, Rows]]:
    """The tables of the report as rows of finished cells."""
    if "checkpoints" in result:
        rows = [
            {
                "checkpoint": row["path"].rpartition("/")[2],
                "format": row.get("format", "–"),
                "layers": ", ".join(map(str, row.get("layers", []))) or "–",
                "parameters": many(row["parameters"]) if "parameters" in row else "–",
                "size": size(row["bytes"]) if "bytes" in row else "–",
                "details": row.get("error") or "; ".join(row.get("findings", [])),
            }
            for row in result["checkpoints"]
        ]
        return [("checkpoints", rows)]
    layers = chosen(result.get("layers", []), ["layer", "modulation", "np_rank", "num_ranks", "parameters"])
    parts = [
        {**part, "parameters": many(part["parameters"]), "bytes": size(part["bytes"])} for part in result["components"]
    ]
    found = [("NPT layers", layers), ("components", parts)]
    if verbose:
        found.append(("tensors", chosen(result.get("tensors", []), ["name", "shape", "dtype", "bytes"])))
        found.append(("files", [{"file": f["file"], "size": size(f["bytes"])} for f in result["files"]]))
    return [(title, rows) for title, rows in found if rows]


def _lines(label: str, value: Any, depth: int = 2) -> list[tuple[str, Any, str]]:
    """A described value as lines: a nested one a line an entry, deeper ones in short."""
    if isinstance(value, Mapping) and depth:
        return [line for name, item in value.items() for line in _lines(f"{label} · {name}", item, depth - 1)]
    return [(label, _brief(value), "")] if value not in (None, [], {}) else []


def _brief(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_brief(item)}" for name, item in value.items() if item is not None)
    if isinstance(value, list):
        return ", ".join(map(_brief, value[:12])) + (f", … ({len(value)})" if len(value) > 12 else "")
    return str(value)


# Lines of a diagnosis that a merge has lines of its own for.
_OWN_IN_MERGE = ("Checkpoint", "Format", "Step", "Base", "NPT Layers")
_NUMBERED = (
    ("Expected Layers", "expected_layers"),
    ("Found Layers", "found_layers"),
    ("Expected Experts", "expected_experts"),
    ("Found Experts", "found_experts"),
)


def merge_facts(result: Mapping[str, Any]) -> list[Fact]:
    """Every line of the report, in order."""
    planned = result["dry_run"]
    rows = [
        ("Would Write" if planned else "Output", result["output"], ""),
        ("Format", result.get("format"), ""),
        ("Step", result.get("step"), ""),
        ("Base", result.get("base"), ""),
        *((label, _numbers(result.get(name)), "") for label, name in _NUMBERED),
        ("Keys", f"{many(result['keys'])} of {many(result['parameters'])} parameters", ""),
        ("Size", f"{size(result['bytes'])} of tensors", ""),
    ]
    rows += [("Verified " + c["name"], f"{c['status']} ({c['details']})", c["status"]) for c in result["checks"]]
    joint = [fact for fact in diagnose_facts(result) if fact[0] not in _OWN_IN_MERGE] if result.get("metrics") else []
    return known(rows) + joint


def _numbers(numbers: Sequence[int] | None) -> str | None:
    return None if numbers is None else str(list(numbers))


def merge_tables(result: Mapping[str, Any], verbose: bool) -> list[tuple[str, Rows]]:
    """Where each layer or expert comes from, and what the joint measurement gave."""
    rows = result.get("layers", [])
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
        for row in rows
    ]
    experts = [
        {
            "expert": row["expert"],
            "rank": ", ".join(map(str, row["ranks"])),
            "alpha": f"{row['lora_alpha']:g}",
            "parameters": many(row["parameters"]),
            "details": printable(f"expert {row['source_expert']} of {row['source']}"),
        }
        for row in result.get("experts", [])
    ]
    averaged = [
        {"share": f"{row['weight']:.4g}", "step": row["step"], "details": printable(row["source"])}
        for row in result.get("averaged", [])
    ]
    conflicts = [
        {"what": f"{kind} {c[kind]}", "details": printable(c["resolution"])}
        for c in result["conflicts"]
        for kind in ("layer", "expert", "skill")
        if kind in c
    ]
    found = [("layers", layers), ("experts", experts), ("averaged", averaged), ("conflicts", conflicts)]
    joint = diagnose_tables({**result, "layers": [row for row in rows if "mse" in row]}, verbose)
    return [(title, rows) for title, rows in found if rows] + [each for each in joint if each[0] != "checks"]


def panels_facts(result: Mapping[str, Any]) -> list[Fact]:
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


def panels_tables(result: Mapping[str, Any], verbose: bool) -> list[tuple[str, Rows]]:
    """None."""
    return []


_COLOURS = {"READY": "excellent", "PARTIALLY_READY": "fair", "NOT_READY": "poor"}


def test_facts(result: Mapping[str, Any]) -> list[Fact]:
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


def test_tables(result: Mapping[str, Any], verbose: bool) -> list[tuple[str, Rows]]:
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


def train_facts(result: Mapping[str, Any]) -> list[Fact]:
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


def train_tables(result: Mapping[str, Any], verbose: bool) -> list[tuple[str, Rows]]:
    """The checkpoints that were written, where all is asked for."""
    return [("checkpoints", [{"checkpoint": path} for path in result["checkpoints"]])] if verbose else []


def verify_facts(result: Mapping[str, Any]) -> list[Fact]:
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
    words = {True: ("yes", "pass"), False: ("NO", "fail"), None: ("NOT PROVED: there is no MANIFEST.json", "moderate")}
    rows.append(("Verified", *words[result["verified"]]))
    return known(rows)


def verify_tables(result: Mapping[str, Any], verbose: bool) -> list[tuple[str, Rows]]:
    """None: every check is a line of the report."""
    return []
