"""The frame of every merge: sources checked, tensors written, everything read back and compared, then its name."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.families.npt.checkpoint import MERGE_SUMMARY
from runner.files.staging import staged
from runner.merge.execute import Content, expected_bytes, write_tensors
from runner.merge.spec import MergeSpec
from runner.merge.verify import comparisons
from runner.merging.files import Files
from runner.merging.inputs import Inputs
from runner.merging.progress import byte_bar
from runner.merging.sinks import write_json_files
from runner.tasks.context import Context

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
