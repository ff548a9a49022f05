"""From the paths of the sources to everything that a merge will write, without reading a tensor."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from runner.checkpoints.detect import open_checkpoint
from runner.merging.base_models import check_bases, check_layers
from runner.merging.execute import Content
from runner.merging.plan import plan_merge
from runner.merging.sources import open_source
from runner.merging.spec import MergeSpec
from runner.merging.states import config, multi_layer_state, training_state


def gather(spec: MergeSpec, paths: Sequence[Path], base: str | None, output: Path) -> Content:
    """Open the sources at `paths` and plan. Raises CheckpointError or ConfigError where the merge is not possible."""
    opened = [open_checkpoint(path) for path in paths]
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
