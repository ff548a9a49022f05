"""`task=merge`: several checkpoints in one, verified against its sources before it gets its name.

Nothing heavy is imported at the top: the sources' bytes are being checked while torch is imported.

`task=merge` of lora_moe and GPT checkpoints: written file by file, verified, and only then given its name.

The frame of every merge: sources checked, tensors written, everything read back and compared, then its name.

What a merge measures of its output before it gets its name: all of it together, as `task=diagnose` does.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from runner.checkpoints.runs import resolve
from runner.config import DiagnoseConfig, Format, MergeConfig
from runner.errors import ConfigError
from runner.evaluation.base_models import Base
from runner.evaluation.placement import Placement
from runner.evaluation.tokenizers import encode, load_tokenizer
from runner.families.family import Auto
from runner.families.lora_moe import checkpoint as lora_moe
from runner.families.npt.checkpoint import MERGE_SUMMARY
from runner.files.staging import staged
from runner.installation import importing
from runner.merge.execute import Content, expected_bytes, write_tensors
from runner.merge.files import Files, check_written
from runner.merge.inputs import Inputs, reading
from runner.merge.spec import MergeSpec
from runner.merge.verify import comparisons
from runner.merge.writer import write_json_files
from runner.reports.console import size
from runner.results import Result, versions
from runner.tasks import diagnose
from runner.tasks.context import Context
from runner.training.progress import byte_bar

# The files that a source is likely to consist of; what else there is, is read once it is known.
_LIKELY = ("npt_weights.pt", "npt_weights.safetensors", "training_state.pt", "multi_layer_state.pt", "config.json")


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
    output, paths = _output(spec), _paths(spec)
    with reading(_likely(paths)) as inputs:
        with importing():
            from runner.files.staging import check_output
            from runner.merge.files import Files
            from runner.merge.gather import gather

        with context.timed("plan"):
            content = gather(spec, paths, config.base, output)
            check_output(output, replace=spec.force, inputs=paths, expected_bytes=size_on_disk(content))
            if spec.verify == "functional":
                check_base(content, config.base)
        if isinstance(content, Files):
            if spec.dry_run:
                return planned(content, spec, context, output)
            return merge(config, spec, content, output, context, inputs)
        if spec.dry_run:
            return _result(content, spec, context, output)
        result = _merge(config, spec, content, output, context, inputs)
    if spec.demo:
        result.findings.append(
            "the demonstration's layers hold random weights: they show how a merge is verified, so the verdict on them "
            "says nothing"
        )
    return result


def _output(spec: MergeSpec) -> Path:
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


def _merge(
    config: MergeConfig, spec: MergeSpec, content: "Content", output: Path, context: Context, inputs: Inputs
) -> Result:
    """Write, verify, publish."""
    from runner.merge.training_state import summary
    from runner.merge.verify import check_structure

    differences = content.training_state.differences if content.training_state else ()
    with written(spec, content, output, context, inputs) as made:
        write_summary(made, content, summary(content.plan, made.input_hashes, differences))
        with context.timed("verify"):
            found = check_structure(made.partial, content)
        measured = _measured(config, content, made.partial, context) if spec.verify == "functional" else None
    result = _result(content, spec, context, output, found, measured)
    result.findings += made.said
    return result


def _measured(config: MergeConfig, content: "Content", partial: Path, context: Context) -> tuple[Result, list[int]]:
    """All layers together, measured as diagnose does, and the layers that alone give the logits of their source."""
    from runner.checkpoints.detect import open_checkpoint
    from runner.evaluation.base_models import load_base
    from runner.merge.functional import check_functions

    with context.timed("functional"):
        base = load_base(
            open_checkpoint(partial), config.base, Placement(device=config.device, dtype=config.dtype), llama=True
        )
        places = [source.checkpoint.directory for source in content.plan.sources]
        prompts = encoded_prompts(config, places, base)
        checked = check_functions(partial, content.plan, base, prompts)
    return measure(config, partial, context), checked


def _result(
    content: "Content",
    spec: MergeSpec,
    context: Context,
    output: Path,
    found: Sequence[int] | None = None,
    measured: tuple[Result, list[int]] | None = None,
) -> Result:
    """What was merged; without `found` layers, what would be."""
    plan = content.plan
    joint, checked = measured or (Result(task="diagnose"), [])
    figures = {row["layer"]: row for row in joint.layers}
    expected = [planned.layer.layer for planned in plan.layers]
    checks = _checks(content, found, None if measured is None else checked)
    return Result(
        task="merge",
        ckpt=None if found is None else str(output),
        base=joint.base,
        step=_step(content),
        family="npt",
        format="npt_delta",
        tier=joint.tier,
        metrics=joint.metrics,
        per_prompt=joint.per_prompt,
        layers=[
            {
                **figures.get(planned.layer.layer, {}),
                **planned.layer.summary(),
                "how": planned.how,
                "sources": [str(source.path) for source in planned.sources],
            }
            for planned in plan.layers
        ],
        progressive=joint.progressive,
        generation=joint.generation,
        checks=checks,
        verdict=joint.verdict,
        findings=[*content.findings, *joint.findings],
        timing=context.timing,
        versions=versions(),
        details={
            "output": str(output),
            "dry_run": spec.dry_run,
            "expected_layers": expected,
            "found_layers": None if found is None else list(found),
            "keys": len(plan.tensors),
            "parameters": plan.parameters,
            "bytes": content.nbytes,
            "sources": {str(planned.layer.layer): _named(planned.sources) for planned in plan.layers},
            "conflicts": [conflict.summary() for conflict in plan.conflicts],
            "verification": {check["name"]: check["status"] for check in checks},
        },
    )


def _step(content: "Content") -> int | None:
    steps = [source.step for source in content.plan.sources if source.step is not None]
    return max(steps, default=None)


def _named(sources: Sequence[Any]) -> Any:
    """The path of the one source of a layer, or a list of several."""
    paths = [str(source.path) for source in sources]
    return paths[0] if len(paths) == 1 else paths


def _checks(content: "Content", found: Sequence[int] | None, checked: Sequence[int] | None) -> list[dict[str, str]]:
    """What was verified, row by row. A merge that fails a verification leaves an error and no output."""

    if found is None:
        return not_written()
    rows = [
        {"name": "structure", "status": "pass", "details": f"reads back with {_layers(found)}, as planned"},
        {"name": "bytes", "status": "pass", "details": f"{size(content.nbytes)} equal to what the sources hold"},
    ]
    if checked is None:
        return [*rows, not_asked()]
    computed = [layer for layer in found if layer not in checked]
    words = [f"{_layers(checked)}, each alone: the logits of their sources, bit for bit"] if checked else ["it runs"]
    words += [f"{_layers(computed)}: computed from several sources, so equal to none"] if computed else []
    return [*rows, {"name": "functional", "status": "pass", "details": "; ".join(words)}]


def _layers(numbers: Sequence[int]) -> str:
    return f"layer{'' if len(numbers) == 1 else 's'} {', '.join(map(str, numbers))}"


Check = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Written:
    """The tensors of a merge in their staged directory, the inputs' hashes by path, and what the user should know."""

    partial: Path
    input_hashes: dict[str, str]
    said: list[str]


def not_written() -> list[Check]:
    """What was verified where nothing was written."""
    skipped = {"status": "skipped", "details": "nothing was written (merge.dry_run)"}
    return [{"name": name, **skipped} for name in ("structure", "bytes", "functional")]


def not_asked() -> Check:
    """The functional check where nobody asked for it."""
    return {"name": "functional", "status": "skipped", "details": "not asked for: merge.verify=functional"}


def size_on_disk(content: Content | Files) -> int:
    """About how many bytes the output takes, never less."""
    return expected_bytes(content.tensor_files, small=len(content.texts) + 2)  # the summary, the manifest


def check_base(content: Content | Files, base: str | None) -> None:
    """Find the base that the models will run on, before anything is written. Raises CheckpointError without one."""
    from runner.evaluation.base_models import find_base
    from runner.families.gpt import checkpoint as gpt

    if isinstance(content, Files) and content.family == gpt.FAMILY:
        return
    sources = [source.checkpoint for source in content.sources]
    find_base(next((each for each in sources if each.base_name), sources[0]), base)


@contextmanager
def written(
    spec: MergeSpec, content: Content | Files, output: Path, context: Context, inputs: Inputs
) -> Iterator[Written]:
    """The block writes what else belongs to the output; when it ends, `output` is there, compared with the sources.

    Raises CheckpointError or RunnerError where a source is damaged, the disk fails or a byte differs; then there is
    no output.
    """
    read = list(dict.fromkeys(file for source in content.sources for file in source.files))
    with context.timed("check"):
        inputs.start(read)
        for file in read:
            inputs.check(file)
    manifest: dict[str, Any] = {"recipe": spec.recipe()}
    hashes: dict[str, str] = {}
    total = content.nbytes
    before = _set_aside(output)
    with (
        context.timed("commit"),
        ExitStack() as bars,
        staged(
            output,
            manifest=manifest,
            replace=spec.force,
            inputs=[source.path for source in content.sources],
            expected_bytes=size_on_disk(content),
            hashes=hashes,
            watchers=lambda partial: comparisons(
                partial,
                content.tensor_files,
                bars.enter_context(byte_bar(context.progress, "comparing with the sources", total)),
            ),
        ) as partial,
    ):
        with context.timed("write"), byte_bar(context.progress, "merging", total) as on_bytes:
            said = write_tensors(partial, content.tensor_files, on_bytes, hashes)
        with context.timed("hash"):
            manifest["inputs"] = {str(file): inputs.sha256(file) for file in read}
        yield Written(partial=partial, input_hashes=manifest["inputs"], said=said)
    said += [f"what stood at {output} before is kept as {path.name}" for path in sorted(_set_aside(output) - before)]


def _set_aside(output: Path) -> set[Path]:
    """What earlier swaps could not delete, because this runner had not written all of it."""
    if not output.parent.is_dir():
        return set()
    return {path for path in output.parent.iterdir() if path.name.startswith(f"{output.name}.old-")}


def write_summary(made: Written, content: Content | Files, summary: Mapping[str, Any]) -> None:
    """Write the JSON files of the output, merge_summary.json among them. Raises OSError where the disk fails."""
    write_json_files(made.partial, {**content.texts, MERGE_SUMMARY: summary})


def planned(files: Files, spec: MergeSpec, context: Context, output: Path) -> Result:
    """What would be done, where merge.dry_run is given."""
    return _result_merge_files(files, spec, context, output, not_written(), None, Result(task="diagnose"))


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
    result = _result_merge_files(files, spec, context, output, checks, found, measured)
    result.findings += made.said
    return result


def _found(written: Any, files: Files) -> dict[str, list[int]]:
    """What a reader of the output finds."""
    if files.format == lora_moe.NAME:
        return {"found_experts": list(range(written.details.num_experts))}
    return {"found_layers": list(range(written.details.num_layers))}


def _functional(config: MergeConfig, files: Files, partial: Path, context: Context) -> tuple[Result, Check]:
    """Each expert alone against its source; then all of it together, against its base or the first source."""

    if files.format != lora_moe.NAME:
        first = files.sources[0].path
        with context.timed("functional"):
            measured = measure(config, partial, context, first)
        return measured, {"name": "functional", "status": "pass", "details": f"it runs; compared with {first}"}
    from runner.checkpoints.detect import open_checkpoint
    from runner.evaluation.base_models import load_base
    from runner.families.lora_moe.merge import check_experts

    with context.timed("functional"):
        base = load_base(open_checkpoint(partial), config.base, Placement(device=config.device, dtype=config.dtype))
        prompts = encoded_prompts(config, [source.checkpoint.directory for source in files.sources], base)
        checked = check_experts(partial, files, base, prompts)
        measured = measure(config, partial, context)
    words = f"experts {', '.join(map(str, checked))}, each alone: the logits of their sources, bit for bit"
    return measured, {"name": "functional", "status": "pass", "details": words}


def _result_merge_files(
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


# What the measurement has in common with task=diagnose.
_SHARED = ("seed", "base", "tokenizer", "device", "dtype", "data", "tier", "verdict")


def measure(config: MergeConfig, partial: Path, context: Context, reference: Path | None = None) -> Result:
    """The diagnosis of the written checkpoint, against its base or against `reference`. Raises its errors."""
    options = {name: getattr(config, name) for name in _SHARED}
    asked = DiagnoseConfig(
        task="diagnose",
        ckpt=str(partial),
        family=Auto(),
        format=Format(name="auto"),
        reference=None if reference is None else str(reference),
        **options,
    )
    return diagnose.run(asked, replace(context, timing={}))


def encoded_prompts(config: MergeConfig, directories: list[Path], base: Base) -> dict[str, torch.Tensor]:
    """The prompts and their token ids [T], by the tokenizer of the first directory that has one, else the base's."""
    tokenizer = load_tokenizer(config.tokenizer, [*directories, base.path])
    size = base.model.config.vocab_size
    return {text: encode(tokenizer, text, size) for text in config.data.prompts}
