"""`task=merge`: several checkpoints in one, verified against its sources before it gets its name.

Nothing heavy is imported at the top: the sources' bytes are being checked while torch is imported.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.checkpoints.runs import resolve
from runner.config import MergeConfig
from runner.errors import ConfigError
from runner.imports import importing
from runner.merge.spec import MergeSpec
from runner.merging.inputs import Inputs, reading
from runner.reports.cells import size
from runner.results import Result
from runner.tasks.context import Context
from runner.versions import versions

if TYPE_CHECKING:
    from runner.merge.execute import Content

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
            from runner.checkpoints.outputs import check_output
            from runner.merging.files import Files
            from runner.merging.gather import gather
            from runner.tasks.merge_output import check_base, size_on_disk

        with context.timed("plan"):
            content = gather(spec, paths, config.base, output)
            check_output(output, replace=spec.force, inputs=paths, expected_bytes=size_on_disk(content))
            if spec.verify == "functional":
                check_base(content, config.base)
        if isinstance(content, Files):
            from runner.tasks import merge_files

            if spec.dry_run:
                return merge_files.planned(content, spec, context, output)
            return merge_files.merge(config, spec, content, output, context, inputs)
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
    from runner.tasks.merge_output import write_summary, written

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
    from runner.tasks.joint import encoded_prompts, measure

    with context.timed("functional"):
        base = load_base(open_checkpoint(partial), config.base, device=config.device, dtype=config.dtype, llama=True)
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
    from runner.tasks.merge_output import not_asked, not_written

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
