"""From the paths of the sources to everything that a merge will write, without reading a tensor."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from runner.checkpoints.checkpoint import Checkpoint
from runner.checkpoints.detect import open_checkpoint
from runner.errors import CheckpointError
from runner.families.gpt import checkpoint as gpt
from runner.families.gpt.merge import gather_gpt, open_gpt_source
from runner.families.lora_moe import checkpoint as lora_moe
from runner.families.lora_moe.merge import gather_moe, open_moe_source
from runner.families.npt import checkpoint as npt_delta
from runner.merge.execute import Content
from runner.merge.files import Files
from runner.merge.plan import plan_merge
from runner.merge.sources import check_bases, check_layers, open_source
from runner.merge.spec import MergeSpec
from runner.merge.training_state import config, multi_layer_state, training_state


def gather(spec: MergeSpec, paths: Sequence[Path], base: str | None, output: Path) -> Content | Files:
    """Open the sources at `paths` and plan: `Content` for NPT layers, `Files` for other formats.

    Raises CheckpointError or ConfigError where the merge is not possible.
    """
    opened = [open_checkpoint(path) for path in paths]
    kind = _kind(paths, opened)
    if kind == lora_moe.FAMILY:
        experts = [open_moe_source(*each) for each in zip(spec.sources, paths, opened, strict=True)]
        return gather_moe(spec, experts, base, output)
    if kind == gpt.FAMILY:
        return gather_gpt(spec, [open_gpt_source(*each) for each in zip(spec.sources, paths, opened, strict=True)])
    return gather_npt(spec, paths, opened, base, output)


def gather_npt(
    spec: MergeSpec, paths: Sequence[Path], opened: Sequence[Checkpoint], base: str | None, output: Path
) -> Content:
    """The merge of NPT layers. Raises CheckpointError or ConfigError where it is not possible."""
    sources = [open_source(*each) for each in zip(spec.sources, paths, opened, strict=True)]
    plan = plan_merge(spec, sources)
    said = check_bases(sources, base, check_layers)
    return Content(
        plan=replace(plan, findings=(*plan.findings, *said)),
        format=spec.format,
        training_state=training_state(plan),
        multi_layer_state=multi_layer_state(plan),
        config=config(plan, base, output),
    )


def _kind(paths: Sequence[Path], opened: Sequence[Checkpoint]) -> str:
    """The family that is merged. Raises CheckpointError where the sources are of several."""
    kinds = [each.family if each.family in (lora_moe.FAMILY, gpt.FAMILY) else npt_delta.FAMILY for each in opened]
    for kind, path, checkpoint in zip(kinds, paths, opened, strict=True):
        if kind != kinds[0]:
            raise CheckpointError(
                f"{paths[0]} is {opened[0].format} and {path} is {checkpoint.format}: checkpoints of different "
                "families cannot be merged"
            )
    return kinds[0]
