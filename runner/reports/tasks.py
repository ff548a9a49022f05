"""The report of each task: its lines (facts) and its tables. `task=compare` has its own in compare.py."""

from collections.abc import Mapping

from runner.errors import printable
from runner.reports.classification import classification_lines, classification_tables
from runner.reports.console import Fact, Rows, Tables, cell, chosen, known, many, number, percent, size
from runner.results import JsonObject

_DETAILS = (
    "kl_reverse", "top5", "dp_rms", "scale", "magnitude_share", "control_mse", "additivity", "progressive_trend",
)  # fmt: skip
_OVERALL = {"READY": "excellent", "PARTIALLY_READY": "fair", "NOT_READY": "poor"}
_CHECK_COLUMNS = ("name", "status", "details")
# Changed tensors that are shown without verbose=true, those that changed most first.
_TENSORS_SHOWN = 20
# Lines of a diagnosis that a merge has lines of its own for.
_OWN_IN_MERGE = ("Checkpoint", "Format", "Step", "Base", "NPT Layers")
_NUMBERED = ("expected_layers", "found_layers", "expected_experts", "found_experts")
# Fields of an inspection that have lines or tables of their own, or are for machines only.
_OWN_IN_INSPECT = {
    "task", "status", "ckpt", "base", "step", "family", "format", "layers", "findings", "timing", "versions",
    "evidence", "keys", "parameters", "bytes", "dtypes", "files", "stripped_prefix", "missing_keys", "unknown_keys",
    "components", "tensors", "checkpoints", "ignored", "steps",
}  # fmt: skip
# A line before it is made harmless: label, value (None: no line), and the word that decides the colour.
Line = tuple[str, object, str]


def _fields(result: JsonObject, *names: str) -> list[Line]:
    """A line for each of the fields: `format` as Format."""
    return [("Checkpoint" if name == "ckpt" else _title(name), result.get(name), "") for name in names]


def _title(name: str) -> str:
    return name.replace("_", " ").title()


def _some(*tables: tuple[str, Rows]) -> Tables:
    """The tables that have rows."""
    return [(title, rows) for title, rows in tables if rows]


def diagnose_facts(result: JsonObject) -> list[Fact]:
    """Every line of the report, in order."""
    metrics, verdict = result.get("metrics", {}), result.get("verdict") or {}
    rows = _fields(result, "ckpt", "format", "step", "base")
    if result.get("reference") != result.get("base"):
        rows += _fields(result, "reference")
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
        figures = f"mse {number(floor['mse'], 6)}, kl {number(floor['kl'])} (reference in the other precision)"
        rows.append(("Floor", figures, ""))
    rows += classification_lines(result)
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


def describe_layer(layer: JsonObject) -> str:
    """One NPT layer in a few characters: `11: triple, r 16, k 4`."""
    return f"{layer['layer']}: {layer['modulation']}, r {layer['np_rank']}, k {layer['num_ranks']}"


def diagnose_tables(result: JsonObject, verbose: bool) -> Tables:
    """The tables of the report as rows of finished cells; with `verbose` all figures, the checks and the times."""
    metrics, layers = result.get("metrics", {}), result.get("layers", [])
    figures = ["mse", "cosine", "kl", "top1", *(["kl_reverse", "top5", "dp_rms", "scale"] if verbose else [])]
    kinds = ["modulation", "np_rank", "num_ranks"] if verbose else []
    alone = chosen(layers, ["layer", *kinds, "mse", "cosine", "kl"]) if any("mse" in row for row in layers) else []
    texts = ["text", "reference_text"] if verbose else []
    names = ["prompt", "temperature", "agreement", "first_divergence", "repetition", *texts]
    tables = _some(
        ("per prompt", chosen(result.get("per_prompt", []), ["prompt", "tokens", *figures])),
        ("each layer alone", alone),
        ("layers together", chosen(result.get("progressive", []), ["layers", "mse", "cosine", "kl"])),
        ("continuations", chosen(result.get("generation", []), names)),
    )
    tables += classification_tables(result)
    return tables if not verbose else tables + _some(
        ("more figures", [{"figure": n, "value": cell(n, metrics[n])} for n in _DETAILS if n in metrics]),
        ("checks", chosen(result.get("checks", []), _CHECK_COLUMNS)),
        ("computed by", [{"part": k, "package": v} for k, v in result.get("computed_by", {}).items()]),
        ("seconds", [{"phase": k, "seconds": f"{v:.2f}"} for k, v in result.get("timing", {}).items()]),
    )  # fmt: skip


def convert_facts(result: JsonObject) -> list[Fact]:
    """Every line of the report, in order."""
    return known([*_fields(result, "ckpt", "format", "step", "output"), ("Files", ", ".join(result["files"]), "")])


def convert_tables(result: JsonObject, verbose: bool) -> Tables:
    """The checks that the output passed before it was published."""
    return [("checks", chosen(result["checks"], _CHECK_COLUMNS))]


def diff_facts(result: JsonObject) -> list[Fact]:
    """Every line of the report, in order."""
    totals = result.get("totals") or {}
    same = "yes, every tensor bit for bit" if result["identical"] else "no"
    rows: list[Line] = [
        *_fields(result, "ckpt", "reference"),
        ("Identical", same, "pass" if result["identical"] else ""),
        ("Relation", None if result["identical"] else result.get("relation"), ""),
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


def diff_tables(result: JsonObject, verbose: bool) -> Tables:
    """The tensors that changed, or with `verbose` all."""
    rows = [row for row in result["tensors"] if verbose or not row["equal"]]
    rows.sort(key=lambda row: -(row.get("relative") or 0.0))
    shown = rows if verbose else rows[:_TENSORS_SHOWN]
    title = "tensors" if verbose else "changed tensors"
    if len(shown) < len(rows):
        title += f" ({len(shown)} of {len(rows)}; verbose=true shows all)"
    return _some((title, [_tensor_cells(row) for row in shown]))


def _tensor_cells(row: JsonObject) -> JsonObject:
    shapes = [str(row[key]) for key in ("shape", "reference_shape") if key in row]
    dtypes = [row[key] for key in ("dtype", "reference_dtype") if key in row]
    figures = {key: number(row.get(key)) for key in ("mse", "cosine", "max_abs", "relative")}
    return {"name": printable(row["name"]), "shape": " ≠ ".join(shapes), "dtype": " ≠ ".join(dtypes), **figures}


def _names(names: list[str]) -> str | None:
    return f"{len(names)}: {', '.join(names[:6])}{', …' if len(names) > 6 else ''}" if names else None


def inspect_facts(result: JsonObject) -> list[Fact]:
    """Every line of the report, in order."""
    if "checkpoints" in result:
        steps, ignored = (", ".join(map(str, result[name])) for name in ("steps", "ignored"))
        return known([("Run", result.get("ckpt"), ""), ("Steps", steps, ""), ("Ignored", ignored or None, "")])
    prefix = result["stripped_prefix"]
    rows = [
        *_fields(result, "ckpt"),
        ("Format", f"{result['format']} ({result['evidence']})", ""),
        *_fields(result, "step", "base"),
        ("Parameters", f"{many(result['parameters'])} in {many(result['keys'])} tensors, {size(result['bytes'])}", ""),
        ("Dtypes", ", ".join(f"{dtype} × {count}" for dtype, count in result["dtypes"].items()), ""),
        ("Prefix", f"{prefix} (taken off all names)" if prefix else None, ""),
    ]
    for name, value in result.items():
        if name not in _OWN_IN_INSPECT:
            rows += _lines(name.replace("_", " ").capitalize(), value)
    return known(rows)


def inspect_tables(result: JsonObject, verbose: bool) -> Tables:
    """The tables of the report as rows of finished cells."""
    if "checkpoints" in result:
        return [("checkpoints", [_checkpoint_cells(row) for row in result["checkpoints"]])]
    layers = chosen(result.get("layers", []), ["layer", "modulation", "np_rank", "num_ranks", "parameters"])
    components = [
        {**part, "parameters": many(part["parameters"]), "bytes": size(part["bytes"])} for part in result["components"]
    ]
    tables = _some(("NPT layers", layers), ("components", components))
    return tables if not verbose else tables + _some(
        ("tensors", chosen(result.get("tensors", []), ["name", "shape", "dtype", "bytes"])),
        ("files", [{"file": file["file"], "size": size(file["bytes"])} for file in result["files"]]),
    )  # fmt: skip


def _checkpoint_cells(row: JsonObject) -> JsonObject:
    return {
        "checkpoint": row["path"].rpartition("/")[2],
        "format": row.get("format", "–"),
        "layers": ", ".join(map(str, row.get("layers", []))) or "–",
        "parameters": many(row["parameters"]) if "parameters" in row else "–",
        "size": size(row["bytes"]) if "bytes" in row else "–",
        "details": row.get("error") or "; ".join(row.get("findings", [])),
    }


def _lines(label: str, value: object, depth: int = 2) -> list[Line]:
    """A described value as lines: a nested one a line an entry, deeper ones in short."""
    if isinstance(value, Mapping) and depth:
        return [line for name, item in value.items() for line in _lines(f"{label} · {name}", item, depth - 1)]
    return [(label, _brief(value), "")] if value not in (None, [], {}) else []


def _brief(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_brief(item)}" for name, item in value.items() if item is not None)
    if isinstance(value, list):
        return ", ".join(map(_brief, value[:12])) + (f", … ({len(value)})" if len(value) > 12 else "")
    return str(value)


def merge_facts(result: JsonObject) -> list[Fact]:
    """Every line of the report, in order."""
    numbers = [(_title(name), str(list(result[name])), "") for name in _NUMBERED if result.get(name) is not None]
    rows = [
        ("Would Write" if result["dry_run"] else "Output", result["output"], ""),
        *_fields(result, "format", "step", "base"),
        *numbers,
        ("Keys", f"{many(result['keys'])} of {many(result['parameters'])} parameters", ""),
        ("Size", f"{size(result['bytes'])} of tensors", ""),
    ]
    rows += [("Verified " + c["name"], f"{c['status']} ({c['details']})", c["status"]) for c in result["checks"]]
    joint = [fact for fact in diagnose_facts(result) if fact[0] not in _OWN_IN_MERGE] if result.get("metrics") else []
    return known(rows) + joint


def merge_tables(result: JsonObject, verbose: bool) -> Tables:
    """Where each layer or expert comes from, and what the joint measurement gave."""
    rows = result.get("layers", [])
    layers = [
        {
            **{name: row[name] for name in ("layer", "modulation", "np_rank", "num_ranks")},
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
    merged = [
        {
            "parameters": ", ".join(f"{name} {value}" for name, value in _own(row).items()) or "–",
            "details": printable(row["source"]),
        }
        for row in result.get("merged", [])
    ]
    fidelity = [
        {**{name: number(row[name]) for name in ("kl", "mse", "cosine")}, "details": printable(row["source"])}
        for row in result.get("fidelity", [])
    ]
    found = _some(
        ("layers", layers), ("experts", experts), ("averaged", averaged), ("merged", merged),
        ("logits against", fidelity), ("conflicts", conflicts),
    )  # fmt: skip
    joint = diagnose_tables({**result, "layers": [row for row in rows if "mse" in row]}, verbose)
    return found + [each for each in joint if each[0] != "checks"]


def _own(row: JsonObject) -> JsonObject:
    """What a merge takes of one model or adapter, without what is not given."""
    given = {**row.get("parameters", {}), **{name: row.get(name) for name in ("layer_range", "weight", "rank")}}
    return {name: value for name, value in given.items() if value is not None}


def panels_facts(result: JsonObject) -> list[Fact]:
    """Every line of the report, in order."""
    panels = ", ".join(f"{name} ({count})" for name, count in result["sections"].items())
    sweeps = ", ".join(result["sweep"])
    rows = [("Sweep", sweeps, ""), *_fields(result, "workspace"), ("Panels", panels, ""), *_fields(result, "file")]
    return known([*rows, ("Saved", result.get("url"), "")])


def test_facts(result: JsonObject) -> list[Fact]:
    """Every line of the report, in order."""
    checks = result["checks"]
    counts = {word: sum(row["status"] == word for row in checks) for word in ("pass", "warning", "fail", "skipped")}
    shown = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    score = result.get("metrics", {}).get("score")
    overall = result.get("overall")
    broken = any(row["integrity"] and row["status"] == "fail" for row in checks)
    reasons = ["an integrity check failed"] * broken + ([] if score is None else [f"mean score {number(score, 2)}"])
    paths = [row["data"]["path"] for row in checks if row["name"] == "built" and "path" in row.get("data", {})]
    rows = [
        *_fields(result, "ckpt"),
        ("Kept", paths[0] if paths and result.get("kept") else None, ""),
        *_fields(result, "family", "tier", "estimate"),
        ("Checks", shown, "fail" if counts["fail"] else "moderate" if counts["warning"] else "pass"),
        ("Overall", overall and f"{overall} ({', '.join(reasons)})", _OVERALL.get(overall or "", "")),
        ("Passed", "yes" if result["passed"] else "NO", "pass" if result["passed"] else "fail"),
    ]
    rows += [
        (f"Recommendation ({row['name']})", row["recommendation"], "")
        for row in checks
        if "recommendation" in row and row["status"] in ("fail", "warning")
    ]
    return known(rows)


def test_tables(result: JsonObject, verbose: bool) -> Tables:
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


def train_facts(result: JsonObject) -> list[Fact]:
    """Every line of the report, in order."""
    metrics = result.get("metrics") or {}
    losses = [(name.replace("_", " ").capitalize(), number(value, 6), "") for name, value in metrics.items()]
    written = [
        ("Last Checkpoint", result.get("ckpt"), ""),
        ("Best Checkpoint", result.get("best"), ""),
        ("Checkpoints", len(result["checkpoints"]) or None, ""),
    ]
    plan = [
        (name.replace("_", " ").capitalize(), _planned(value), "") for name, value in result.get("plan", {}).items()
    ]
    return known([*written, *_fields(result, "base", "step"), *losses, *plan])


def _planned(value: object) -> object:
    """A line of a plan: its stages as they are written on the command line."""
    if isinstance(value, list):
        return ", ".join(_stage(each) if isinstance(each, dict) else str(each) for each in value)
    return f"{value:,}" if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def _stage(stage: JsonObject) -> str:
    return f"{stage['name']} {stage['first_step']:,} to {stage['last_step']:,}"


def train_tables(result: JsonObject, verbose: bool) -> Tables:
    """The checkpoints that were written, where all is asked for."""
    return [("checkpoints", [{"checkpoint": path} for path in result["checkpoints"]])] if verbose else []


def verify_facts(result: JsonObject) -> list[Fact]:
    """Every line of the report, in order."""
    rows = _fields(result, "ckpt", "format", "step")
    rows += [
        (check["name"].capitalize(), f"{check['status']} ({check['details']})", check["status"])
        for check in result["checks"]
    ]
    words = {True: ("yes", "pass"), False: ("NO", "fail"), None: ("NOT PROVED: there is no MANIFEST.json", "moderate")}
    return known([*rows, ("Verified", *words[result["verified"]])])
