"""`task=merge`: several checkpoints in one, verified against its sources before it gets its name.

Source → plan → writer → read back → publish. The plan is the family's; all else is the same for every format.
Nothing heavy is imported at the top: the sources' bytes are being checked while torch is imported.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.checkpoints.runs import resolve
from runner.config import DiagnoseConfig, Format, MergeConfig
from runner.errors import CheckpointError, ConfigError
from runner.families.family import Auto, Family
from runner.families.hf import Hf
from runner.families.npt import Npt
from runner.installation import importing
from runner.merge.inputs import Inputs, reading
from runner.merge.spec import FAMILY_RULES, MergeSpec
from runner.progress import byte_bar
from runner.reports.console import size
from runner.results import Result, versions
from runner.tasks.context import Context

if TYPE_CHECKING:
    from runner.checkpoints.checkpoint import Checkpoint
    from runner.merge.plan import JsonObject, MergeOutput
    from runner.merge.sink import Written

# The files that a source is likely to consist of; what else there is, is read once it is known.
_LIKELY = ("npt_weights.pt", "npt_weights.safetensors", "training_state.pt", "multi_layer_state.pt", "config.json")
# What the measurement has in common with task=diagnose.
_SHARED = ("seed", "base", "tokenizer", "device", "dtype", "data", "tier", "verdict")
_CHECKS = ("structure", "bytes", "functional")


@dataclass(kw_only=True)
class Verified:
    """What was found of a written output: fields of the result, each check in words, and the measures of all of it."""

    found: "JsonObject" = field(default_factory=dict)
    words: list[str] = field(default_factory=list)
    measured: Result = field(default_factory=lambda: Result(task="diagnose"))
    said: list[str] = field(default_factory=list)


def run(config: MergeConfig, context: Context) -> Result:
    """Merge, or with dry_run only say what would be done.

    Raises ConfigError, CheckpointError or ModelError where it is refused, RunnerError where writing or verifying fails.
    """
    if config.merge.demo:
        from runner.families.npt.demo import write_demo

        with context.timed("demo"):
            made = write_demo(context.directory / "demo", config.merge, seed=config.seed)
        config = replace(config, merge=made)
    spec: MergeSpec = config.merge.read_file()
    config = replace(config, merge=spec)
    if not spec.output:
        raise ConfigError("merge.output is needed: the directory to write")
    if not spec.sources:
        raise ConfigError("merge.sources is needed: the checkpoints to merge, as [A,B] or [{path: A, layers: [11]},B]")
    target = Path(os.path.abspath(Path(spec.output).expanduser()))  # noqa: PTH100 - a link must be seen, not followed
    paths = [_place(source.path) for source in spec.sources]
    likely = [*(path / name for path in paths for name in _LIKELY), *paths]
    with reading(file for file in likely if file.is_file()) as inputs:
        with importing():
            from runner.files.staging import check_output
            from runner.merge.verify import check_structure
            from runner.merge.writer import expected_bytes

        with context.timed("plan"):
            family, output = plan(spec, paths, config.base, target)
            check_output(target, replace=spec.force, inputs=paths, expected_bytes=expected_bytes(output))
            if spec.verify == "functional":
                _check_base(output, config.base)
        if spec.dry_run:
            return _result(config, output, target, context, Verified())
        with _staged(config, output, target, context, inputs) as (partial, said):
            with context.timed("verify"):
                written = check_structure(partial, output)
            found, words = output.read_back(written)
            verified = Verified(found=found, words=[words, _proved(output)], said=said)
            if spec.verify == "functional":
                with context.timed("functional"):
                    words, verified.measured = _functional(config, family, output, written, context)
                verified.words.append(words)
    result = _result(config, output, target, context, verified)
    if spec.demo:
        result.findings.append(
            "the demonstration's layers hold random weights: they show how a merge is verified, so the verdict on them "
            "says nothing"
        )
    return result


def _place(name: str) -> Path:
    """Where a source lies; of a hub name that is no path here, in the hub's cache. Raises a RunnerError."""
    path = Path(name).expanduser()
    if not path.exists() and name.count("/") == 1:
        from runner.evaluation.base_models import is_hub_name, snapshot

        if is_hub_name(name):
            return snapshot("merge.sources", name, download=False)
    return resolve(path, by_step=False)


def plan(spec: MergeSpec, paths: Sequence[Path], base: str | None, target: Path) -> "tuple[Family, MergeOutput]":
    """The family of the checkpoints at `paths`, and what it makes of them in `target`; no tensor is read."""
    from runner.checkpoints.detect import open_checkpoint

    opened = [open_checkpoint(path) for path in paths]
    known = [Auto().of(checkpoint) for checkpoint in opened]
    # What cannot be merged counts as npt, which says so.
    found = [each if type(each).plan_merge is not Family.plan_merge else Npt() for each in known]
    for path, checkpoint, family in zip(paths, opened, found, strict=True):
        if family.name != found[0].name:
            raise CheckpointError(
                f"{paths[0]} is {opened[0].format} and {path} is {checkpoint.format}: checkpoints of different "
                "families cannot be merged"
            )
    if spec.rule not in FAMILY_RULES and found[0].name != Hf.name:
        raise ConfigError(
            f"merge={spec.rule} is for whole models and adapters; {paths[0]} is {opened[0].format}: choose "
            f"{', '.join(FAMILY_RULES)}"
        )
    return found[0], found[0].plan_merge(spec, paths, opened, base, target)


def _proved(output: "MergeOutput") -> str:
    """What the comparison with the sources has shown, in words."""
    tensors = [tensor for file in output.tensor_files for tensor in file.tensors]
    computed = [tensor for tensor in tensors if tensor.computed]
    copied = sum(tensor.nbytes for tensor in tensors if not tensor.computed)
    said = [f"{size(copied)} equal to {output.content}"] if copied or not computed else []
    if computed:
        of = size(sum(tensor.nbytes for tensor in computed))
        said.append(f"{of} in {len(computed)} tensors read back as written, a sample of each computed again")
    return "; ".join(said)


def _check_base(output: "MergeOutput", base: str | None) -> None:
    """Find the base that the models will run on, before anything is written. Raises CheckpointError without one."""
    from runner.evaluation.base_models import find_base

    if output.check_functions is not None:
        sources = [source.checkpoint for source in output.sources]
        find_base(next((each for each in sources if each.base_name), sources[0]), base)


@contextmanager
def _staged(
    config: MergeConfig, output: "MergeOutput", target: Path, context: Context, inputs: Inputs
) -> Iterator[tuple[Path, list[str]]]:
    """The staged directory with all that is written, and what the user should know; `target` when the block ends.

    By then every byte was read back and compared with the sources. Raises CheckpointError or RunnerError where a
    source is damaged, the disk fails or a byte differs; then there is no output.
    """
    from runner.files.staging import staged
    from runner.merge.plan import SUMMARY
    from runner.merge.verify import comparisons
    from runner.merge.writer import expected_bytes, write_files, write_json_files, write_tensors

    read = list(dict.fromkeys(file for source in output.sources for file in source.files))
    inputs.start(read)
    manifest: dict[str, object] = {"recipe": config.merge.recipe()}
    hashes: dict[str, str | None] = {}
    runs: dict[str, list[Written]] = {}
    before = _set_aside(target)
    with (
        context.timed("commit"),
        ExitStack() as bars,
        staged(
            target,
            manifest=manifest,
            replace=config.merge.force,
            inputs=[source.path for source in output.sources],
            expected_bytes=expected_bytes(output),
            hashes=hashes,
            watchers=lambda partial: comparisons(
                partial,
                output.tensor_files,
                bars.enter_context(byte_bar(context.progress, "comparing with the sources", output.nbytes)),
                runs,
            ),
        ) as partial,
    ):
        with context.timed("write"), byte_bar(context.progress, "merging", output.nbytes) as on_bytes:
            said = write_tensors(partial, output.tensor_files, on_bytes, hashes, runs)
        with context.timed("hash"):
            inputs_of = {str(file): inputs.sha256(file) for file in read}
            manifest["inputs"] = inputs_of
        write_json_files(partial, {**output.texts, SUMMARY: {**output.summary, "sha256": inputs_of}})
        write_files(partial, {**output.copies, **output.card(inputs_of)})
        yield partial, said
    said += [f"what stood at {target} before is kept as {path.name}" for path in sorted(_set_aside(target) - before)]


def _set_aside(target: Path) -> set[Path]:
    """What earlier swaps could not delete, because this runner had not written all of it."""
    return set(target.parent.glob(f"{escape(target.name)}.old-*"))


def _functional(
    config: MergeConfig, family: Family, output: "MergeOutput", written: "Checkpoint", context: Context
) -> tuple[str, Result]:
    """Each part alone against its source, in words; then all of it together, as task=diagnose measures it."""
    from runner.evaluation.placement import Placement
    from runner.evaluation.tokenizers import encode, load_tokenizer

    base = family.load_base(written, config.base, Placement(device=config.device, dtype=config.dtype))
    if output.check_functions is None or base is None:
        first, *others = [source.path for source in output.sources]
        measured = measure(config, written.path, context, first)
        if family.name != Hf.name or written.format != Hf.name:
            return f"it runs; compared with {first}", measured
        rows = [_fidelity(first, measured), *(_fidelity(o, measure(config, written.path, context, o)) for o in others)]
        measured.details["fidelity"] = rows
        return f"it runs; compared with {', '.join(row['source'] for row in rows)}", measured
    places = [*(source.checkpoint.directory for source in output.sources), base.path]
    tokenizer = load_tokenizer(config.tokenizer, places)
    prompts = {text: encode(tokenizer, text, base.model.config.vocab_size) for text in config.data.prompts}
    return output.check_functions(written, base, prompts), measure(config, written.path, context)


def _fidelity(source: Path, measured: Result) -> dict[str, Any]:
    """How far the logits of the output are from those of a source, in the figures of task=diagnose."""
    return {"source": str(source), **{name: measured.metrics.get(name) for name in ("mse", "cosine", "kl")}}


def measure(config: MergeConfig, partial: Path, context: Context, reference: Path | None = None) -> Result:
    """The diagnosis of the written checkpoint, against its base or against `reference`. Raises its errors."""
    from runner.tasks import diagnose

    shared = {name: getattr(config, name) for name in _SHARED}
    asked = DiagnoseConfig(
        **shared, task="diagnose", ckpt=str(partial), family=Auto(), format=Format(name="auto"),
        reference=None if reference is None else str(reference),
    )  # fmt: skip
    return diagnose.run(asked, replace(context, timing={}))


def _result(config: MergeConfig, output: "MergeOutput", target: Path, context: Context, verified: Verified) -> Result:
    """What was merged, or would be. A merge that fails a check leaves an error and no output."""
    measured, dry_run = verified.measured, config.merge.dry_run
    reason = "nothing was written (merge.dry_run)" if dry_run else "not asked for: merge.verify=functional"
    done = dict(zip(_CHECKS[: len(verified.words)], verified.words, strict=True))
    checks = [{"name": name, "status": "pass", "details": words} for name, words in done.items()]
    checks += [{"name": name, "status": "skipped", "details": reason} for name in _CHECKS if name not in done]
    figures = {row["layer"]: row for row in measured.layers}
    return Result(
        task="merge",
        ckpt=None if dry_run else str(target),
        base=measured.base,
        # Of NPT layers it always is the base.
        reference=None if output.layers else measured.reference,
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
        findings=[*output.findings, *measured.findings, *verified.said],
        timing=context.timing,
        versions=versions(),
        details={
            "output": str(target),
            "dry_run": dry_run,
            **output.details,
            **verified.found,
            **({"fidelity": measured.details["fidelity"]} if "fidelity" in measured.details else {}),
            "keys": len(output.weights),
            "parameters": output.parameters,
            "bytes": output.nbytes,
            "conflicts": list(output.conflicts),
            "verification": {check["name"]: check["status"] for check in checks},
        },
    )
