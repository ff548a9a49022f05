"""`task=merge`: several checkpoints in one, verified against its sources before it gets its name.

Source → plan → writer → read back → publish. The plan is the family's; all else is the same for every format.
Nothing heavy is imported at the top: the sources' bytes are being checked while torch is imported.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from runner.checkpoints.runs import resolve
from runner.config import DiagnoseConfig, Family, Format, MergeConfig
from runner.errors import CheckpointError, ConfigError
from runner.imports import importing
from runner.merge.inputs import Inputs, reading
from runner.merge.spec import MergeSpec
from runner.reports.console import size
from runner.results import Result, versions
from runner.tasks.context import Context
from runner.training.progress import byte_bar

if TYPE_CHECKING:
    from runner.checkpoints.checkpoint import Checkpoint
    from runner.merge.plan import MergeOutput

# The files that a source is likely to consist of; what else there is, is read once it is known.
_LIKELY = ("npt_weights.pt", "npt_weights.safetensors", "training_state.pt", "multi_layer_state.pt", "config.json")
# What the measurement has in common with task=diagnose.
_SHARED = ("seed", "base", "tokenizer", "device", "dtype", "data", "tier", "verdict")

Check = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What was found of a written output: fields of the result, what was checked, and the measures of all of it."""

    found: dict[str, object]
    checks: list[Check]
    measured: Result
    said: list[str]


def run(config: MergeConfig, context: Context) -> Result:
    """Merge, or with dry_run only say what would be done.

    Raises ConfigError, CheckpointError or ModelError where the merge is refused, RunnerError where writing or
    verifying fails; then there is no output.
    """
    spec: MergeSpec = config.merge
    if spec.demo:
        from runner.merge.demo import write_demo

        with context.timed("demo"):
            spec = write_demo(context.directory / "demo", spec, seed=config.seed)
    target, paths = _target(spec), _paths(spec)
    with reading(_likely(paths)) as inputs:
        with importing():
            from runner.files.staging import check_output
            from runner.merge import verify, writer  # noqa: F401 - here an interrupt waits for the end of the import

        with context.timed("plan"):
            output = _plan(spec, paths, config.base, target)
            check_output(target, replace=spec.force, inputs=paths, expected_bytes=_expected_bytes(output))
            if spec.verify == "functional":
                _check_base(output, config.base)
        verified = None if spec.dry_run else _write(config, spec, output, target, context, inputs)
    result = _result(output, spec, context, target, verified)
    if spec.demo and verified:
        result.findings.append(
            "the demonstration's layers hold random weights: they show how a merge is verified, so the verdict on them "
            "says nothing"
        )
    return result


def _target(spec: MergeSpec) -> Path:
    if not spec.output:
        raise ConfigError("merge.output is needed: the directory to write")
    return Path(os.path.abspath(Path(spec.output).expanduser()))  # noqa: PTH100 - a link must be seen, not followed


def _paths(spec: MergeSpec) -> list[Path]:
    if not spec.sources:
        raise ConfigError("merge.sources is needed: the checkpoints to merge, as [A,B] or [{path: A, layers: [11]},B]")
    return [resolve(Path(source.path).expanduser(), by_step=False) for source in spec.sources]


def _likely(paths: Sequence[Path]) -> list[Path]:
    files = [path / name for path in paths for name in _LIKELY] + list(paths)
    return [file for file in files if file.is_file()]


def _plan(spec: MergeSpec, paths: Sequence[Path], base: str | None, target: Path) -> "MergeOutput":
    """What the family of the checkpoints at `paths` makes of them, without reading a tensor.

    Raises CheckpointError where they are of several families, and what the family raises.
    """
    from runner.checkpoints.detect import open_checkpoint

    opened = [open_checkpoint(path) for path in paths]
    plans = [_family(checkpoint) for checkpoint in opened]
    for path, checkpoint, plan in zip(paths, opened, plans, strict=True):
        if plan is not plans[0]:
            raise CheckpointError(
                f"{paths[0]} is {opened[0].format} and {path} is {checkpoint.format}: checkpoints of different "
                "families cannot be merged"
            )
    return plans[0](spec, paths, opened, base, target)


def _family(checkpoint: "Checkpoint") -> "Callable[..., MergeOutput]":
    from runner.families.gpt import merge as gpt
    from runner.families.lora_moe import merge as lora_moe
    from runner.families.npt import merge as npt

    known = {"gpt": gpt.plan_merge, "lora_moe": lora_moe.plan_merge}
    return known.get(checkpoint.family, npt.plan_merge)


def _expected_bytes(output: "MergeOutput") -> int:
    """About how many bytes the output takes, never less."""
    from runner.merge.writer import expected_bytes

    return expected_bytes(output.tensor_files, small=len(output.texts) + 2)  # the summary, the manifest


def _check_base(output: "MergeOutput", base: str | None) -> None:
    """Find the base that the models will run on, before anything is written. Raises CheckpointError without one."""
    from runner.evaluation.base_models import find_base

    if output.check_functions is not None:
        sources = [source.checkpoint for source in output.sources]
        find_base(next((each for each in sources if each.base_name), sources[0]), base)


def _write(
    config: MergeConfig, spec: MergeSpec, output: "MergeOutput", target: Path, context: Context, inputs: Inputs
) -> Verified:
    """Write, verify, publish. Raises CheckpointError or RunnerError; then there is no output."""
    from runner.merge.verify import check_structure

    with _staged(spec, output, target, context, inputs) as (partial, said):
        with context.timed("verify"):
            checkpoint = check_structure(partial, output)
        found, words = output.read_back(checkpoint)
        functional, measured = "", Result(task="diagnose")
        if spec.verify == "functional":
            with context.timed("functional"):
                functional, measured = _functional(config, output, checkpoint, context)
    checks = [
        {"name": "structure", "status": "pass", "details": words},
        {"name": "bytes", "status": "pass", "details": f"{size(output.nbytes)} equal to {output.content}"},
        {"name": "functional", "status": "pass", "details": functional}
        if functional
        else {"name": "functional", "status": "skipped", "details": "not asked for: merge.verify=functional"},
    ]
    return Verified(found=dict(found), checks=checks, measured=measured, said=said)


@contextmanager
def _staged(
    spec: MergeSpec, output: "MergeOutput", target: Path, context: Context, inputs: Inputs
) -> Iterator[tuple[Path, list[str]]]:
    """The staged directory with all that is written, and what the user should know; `target` when the block ends.

    Every byte was then read back and compared with the sources. Raises CheckpointError or RunnerError where a source
    is damaged, the disk fails or a byte differs; then there is no output.
    """
    from runner.files.staging import staged
    from runner.merge.plan import SUMMARY
    from runner.merge.verify import comparisons
    from runner.merge.writer import write_json_files, write_tensors

    read = list(dict.fromkeys(file for source in output.sources for file in source.files))
    with context.timed("check"):
        inputs.start(read)
        for file in read:
            inputs.check(file)
    manifest: dict[str, object] = {"recipe": spec.recipe()}
    hashes: dict[str, str] = {}
    before = _set_aside(target)
    with (
        context.timed("commit"),
        ExitStack() as bars,
        staged(
            target,
            manifest=manifest,
            replace=spec.force,
            inputs=[source.path for source in output.sources],
            expected_bytes=_expected_bytes(output),
            hashes=hashes,
            watchers=lambda partial: comparisons(
                partial,
                output.tensor_files,
                bars.enter_context(byte_bar(context.progress, "comparing with the sources", output.nbytes)),
            ),
        ) as partial,
    ):
        with context.timed("write"), byte_bar(context.progress, "merging", output.nbytes) as on_bytes:
            said = write_tensors(partial, output.tensor_files, on_bytes, hashes)
        with context.timed("hash"):
            manifest["inputs"] = input_hashes = {str(file): inputs.sha256(file) for file in read}
        write_json_files(partial, {**output.texts, SUMMARY: {**output.summary, "sha256": input_hashes}})
        yield partial, said
    said += [f"what stood at {target} before is kept as {path.name}" for path in sorted(_set_aside(target) - before)]


def _set_aside(target: Path) -> set[Path]:
    """What earlier swaps could not delete, because this runner had not written all of it."""
    if not target.parent.is_dir():
        return set()
    return {path for path in target.parent.iterdir() if path.name.startswith(f"{target.name}.old-")}


def _functional(
    config: MergeConfig, output: "MergeOutput", written: "Checkpoint", context: Context
) -> tuple[str, Result]:
    """Each part alone against its source; then all of it together, as task=diagnose does: words and figures."""
    from runner.evaluation.base_models import load_base
    from runner.evaluation.tokenizers import encode, load_tokenizer

    if output.check_functions is None:
        first = output.sources[0].path
        return f"it runs; compared with {first}", measure(config, written.path, context, first)
    base = load_base(written, config.base, device=config.device, dtype=config.dtype, llama=output.family == "npt")
    # The tokenizer of the first source that has one, else the base's.
    places = [source.checkpoint.directory for source in output.sources]
    tokenizer = load_tokenizer(config.tokenizer, [*places, base.path])
    prompts = {text: encode(tokenizer, text, base.model.config.vocab_size) for text in config.data.prompts}
    return output.check_functions(written, base, prompts), measure(config, written.path, context)


def measure(config: MergeConfig, partial: Path, context: Context, reference: Path | None = None) -> Result:
    """The diagnosis of the written checkpoint, against its base or against `reference`. Raises its errors."""
    from runner.tasks import diagnose

    options = {name: getattr(config, name) for name in _SHARED}
    asked = DiagnoseConfig(
        task="diagnose",
        ckpt=str(partial),
        family=Family(name="auto"),
        format=Format(name="auto"),
        reference=None if reference is None else str(reference),
        **options,
    )
    return diagnose.run(asked, replace(context, timing={}))


def _result(
    output: "MergeOutput", spec: MergeSpec, context: Context, target: Path, verified: Verified | None
) -> Result:
    """What was merged; without `verified`, what would be. A merge that fails a check leaves an error and no output."""
    skipped = {"status": "skipped", "details": "nothing was written (merge.dry_run)"}
    checks = [{"name": name, **skipped} for name in ("structure", "bytes", "functional")]
    checks = verified.checks if verified else checks
    measured = verified.measured if verified else Result(task="diagnose")
    figures = {row["layer"]: row for row in measured.layers}
    return Result(
        task="merge",
        ckpt=str(target) if verified else None,
        base=measured.base,
        reference=measured.reference,
        step=output.step,
        family=output.family,
        format=output.format,
        tier=measured.tier,
        metrics=measured.metrics,
        per_prompt=measured.per_prompt,
        layers=[{**figures.get(row["layer"], {}), **row} for row in output.layers],
        progressive=measured.progressive,
        generation=measured.generation,
        checks=checks,
        verdict=measured.verdict,
        findings=[*output.findings, *measured.findings, *(verified.said if verified else ())],
        timing=context.timing,
        versions=versions(),
        details={
            "output": str(target),
            "dry_run": spec.dry_run,
            **output.details,
            **(verified.found if verified else {}),
            "keys": len(output.weights),
            "parameters": output.parameters,
            "bytes": output.nbytes,
            "conflicts": list(output.conflicts),
            "verification": {check["name"]: check["status"] for check in checks},
        },
    )
