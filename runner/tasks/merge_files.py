"""`task=merge` of lora_moe and GPT checkpoints: written file by file, verified, and only then given its name."""

from pathlib import Path
from typing import Any

from runner.checkpoints import lora_moe
from runner.checkpoints.commit import staged
from runner.checkpoints.npt_delta import MERGE_SUMMARY
from runner.config import MergeConfig
from runner.merging.files import Files, check_files, check_written, write_files
from runner.merging.inputs import Inputs
from runner.merging.progress import byte_bar
from runner.merging.sinks import write_json_files
from runner.merging.spec import MergeSpec
from runner.reports.cells import size
from runner.results import Result
from runner.tasks.context import Context
from runner.versions import versions

Check = dict[str, str]


def planned(files: Files, spec: MergeSpec, context: Context, output: Path) -> Result:
    """What would be done, where merge.dry_run is given."""
    skipped = {"status": "skipped", "details": "nothing was written (merge.dry_run)"}
    checks = [{"name": name, **skipped} for name in ("structure", "bytes", "functional")]
    return _result(files, spec, context, output, checks, None, Result(task="diagnose"))


def merge(config: MergeConfig, spec: MergeSpec, files: Files, output: Path, context: Context, inputs: Inputs) -> Result:
    """Check the sources, write, verify, publish. Raises CheckpointError or RunnerError; then there is no output."""
    with context.timed("check"):
        inputs.start(files.inputs)
        for file in files.inputs:
            inputs.check(file)
    manifest: dict[str, Any] = {"recipe": spec.recipe()}
    hashes: dict[str, str] = {}
    with (
        context.timed("commit"),
        staged(
            output,
            manifest=manifest,
            replace=spec.force,
            inputs=[source.path for source in files.sources],
            expected_bytes=files.expected_bytes,
            hashes=hashes,
            also=lambda partial, stop: check_files(partial, files, stop),
        ) as partial,
    ):
        with context.timed("write"), byte_bar(context.progress, "merging", files.nbytes) as on_bytes:
            write_files(partial, files, on_bytes, hashes)
        with context.timed("hash"):
            manifest["inputs"] = {str(file): inputs.sha256(file) for file in files.inputs}
        summary = {**files.summary, "conflicts": list(files.conflicts), "sha256": manifest["inputs"]}
        write_json_files(partial, {**files.texts, MERGE_SUMMARY: summary})
        with context.timed("verify"):
            written = check_written(partial, files)
        found = _found(written, files)
        measured, functional = Result(task="diagnose"), _skipped()
        if spec.verify == "functional":
            measured, functional = _functional(config, files, partial, context)
    what = f"the {files.details['how']} of what the sources hold" if files.computed else "what the sources hold"
    checks = [
        {"name": "structure", "status": "pass", "details": f"reads back as planned: {written.evidence}"},
        {"name": "bytes", "status": "pass", "details": f"{size(files.nbytes)} equal to {what}"},
        functional,
    ]
    return _result(files, spec, context, output, checks, found, measured)


def _found(written: Any, files: Files) -> dict[str, list[int]]:
    """What a reader of the output finds."""
    if files.format == lora_moe.NAME:
        return {"found_experts": list(range(written.details.num_experts))}
    return {"found_layers": list(range(written.details.num_layers))}


def _skipped() -> Check:
    return {"name": "functional", "status": "skipped", "details": "not asked for: merge.verify=functional"}


def _functional(config: MergeConfig, files: Files, partial: Path, context: Context) -> tuple[Result, Check]:
    """Each expert alone against its source; then all of it together, against its base or the first source."""
    from runner.tasks.joint import encoded_prompts, measure

    if files.format != lora_moe.NAME:
        first = files.sources[0].path
        with context.timed("functional"):
            measured = measure(config, partial, context, first)
        return measured, {"name": "functional", "status": "pass", "details": f"it runs; compared with {first}"}
    from runner.bases import load_base
    from runner.checkpoints.detect import open_checkpoint
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
