"""`task=merge` of lora_moe and GPT checkpoints: written file by file, verified, and only then given its name."""

from pathlib import Path
from typing import Any

from runner.config import MergeConfig
from runner.families.lora_moe import checkpoint as lora_moe
from runner.merge.spec import MergeSpec
from runner.merging.files import Files, check_written
from runner.merging.inputs import Inputs
from runner.reports.cells import size
from runner.results import Result
from runner.tasks.context import Context
from runner.tasks.merge_output import Check, not_asked, not_written, write_summary, written
from runner.versions import versions


def planned(files: Files, spec: MergeSpec, context: Context, output: Path) -> Result:
    """What would be done, where merge.dry_run is given."""
    return _result(files, spec, context, output, not_written(), None, Result(task="diagnose"))


def merge(config: MergeConfig, spec: MergeSpec, files: Files, output: Path, context: Context, inputs: Inputs) -> Result:
    """Write, verify, publish. Raises CheckpointError or RunnerError; then there is no output."""
    with written(spec, files, output, context, inputs) as made:
        write_summary(made, files, {**files.summary, "conflicts": list(files.conflicts), "sha256": made.input_hashes})
        with context.timed("verify"):
            checkpoint = check_written(made.partial, files)
        found = _found(checkpoint, files)
        measured, functional = Result(task="diagnose"), not_asked()
        if spec.verify == "functional":
            measured, functional = _functional(config, files, made.partial, context)
    what = f"the {files.details['how']} of what the sources hold" if files.computed else "what the sources hold"
    checks = [
        {"name": "structure", "status": "pass", "details": f"reads back as planned: {checkpoint.evidence}"},
        {"name": "bytes", "status": "pass", "details": f"{size(files.nbytes)} equal to {what}"},
        functional,
    ]
    result = _result(files, spec, context, output, checks, found, measured)
    result.findings += made.said
    return result


def _found(written: Any, files: Files) -> dict[str, list[int]]:
    """What a reader of the output finds."""
    if files.format == lora_moe.NAME:
        return {"found_experts": list(range(written.details.num_experts))}
    return {"found_layers": list(range(written.details.num_layers))}


def _functional(config: MergeConfig, files: Files, partial: Path, context: Context) -> tuple[Result, Check]:
    """Each expert alone against its source; then all of it together, against its base or the first source."""
    from runner.tasks.joint import encoded_prompts, measure

    if files.format != lora_moe.NAME:
        first = files.sources[0].path
        with context.timed("functional"):
            measured = measure(config, partial, context, first)
        return measured, {"name": "functional", "status": "pass", "details": f"it runs; compared with {first}"}
    from runner.checkpoints.detect import open_checkpoint
    from runner.evaluation.base_models import load_base
    from runner.merging.moe_functional import check_experts

    with context.timed("functional"):
        base = load_base(open_checkpoint(partial), config.base, device=config.device, dtype=config.dtype)
        prompts = encoded_prompts(config, [source.checkpoint.directory for source in files.sources], base)
        checked = check_experts(partial, files, base, prompts)
        measured = measure(config, partial, context)
    words = f"experts {', '.join(map(str, checked))}, each alone: the logits of their sources, bit for bit"
    return measured, {"name": "functional", "status": "pass", "details": words}


def _result(
    files: Files,
    spec: MergeSpec,
    context: Context,
    output: Path,
    checks: list[Check],
    found: dict[str, list[int]] | None,
    measured: Result,
) -> Result:
    """What was merged; without `found`, what would be."""
    return Result(
        task="merge",
        ckpt=None if found is None else str(output),
        base=measured.base,
        reference=measured.reference,
        step=files.step,
        family=files.family,
        format=files.format,
        tier=measured.tier,
        metrics=measured.metrics,
        per_prompt=measured.per_prompt,
        generation=measured.generation,
        checks=checks,
        verdict=measured.verdict,
        findings=[*files.findings, *measured.findings],
        timing=context.timing,
        versions=versions(),
        details={
            "output": str(output),
            "dry_run": spec.dry_run,
            **files.details,
            **(found or {}),
            "keys": len(files.weights),
            "parameters": files.parameters,
            "bytes": files.nbytes,
            "conflicts": list(files.conflicts),
            "verification": {check["name"]: check["status"] for check in checks},
        },
    )
