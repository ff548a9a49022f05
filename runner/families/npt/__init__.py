"""NPT: a Llama whose attention modulates the weights of its MLPs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from runner.families.family import Family

if TYPE_CHECKING:
    from torch import nn

    from runner.checkpoints.checkpoint import Checkpoint, Writer
    from runner.checks.check import Check
    from runner.checks.context import CheckContext, Example, Traits
    from runner.config import Conversion
    from runner.evaluation.base_models import Base
    from runner.evaluation.placement import Placement
    from runner.merge.execute import Content
    from runner.merge.spec import MergeSpec


@dataclass(frozen=True, kw_only=True)
class Npt(Family):
    """NPT layers over a frozen Llama (npt_delta), or a complete model with them (npt_full)."""

    name: str = "npt"

    format_modules: ClassVar[tuple[str, ...]] = ("runner.families.npt.checkpoint", "runner.families.npt.full")
    base_type: ClassVar[str | None] = "llama"

    def needs_base(self, checkpoint: "Checkpoint") -> bool:
        """All but npt_full: a format of a user's own gives layers too."""
        return not self.is_made_from_base(checkpoint)

    def is_made_from_base(self, checkpoint: "Checkpoint") -> bool:
        """Whether it is an npt_full."""
        from runner.families.npt import full

        return checkpoint.format == full.NAME

    def can_be_spread(self, checkpoint: "Checkpoint") -> bool:
        """Always: it is a Llama."""
        return True

    def build(self, checkpoint: "Checkpoint", base: "Base | None", placement: "Placement") -> "nn.Module":
        """As `Family.build`: an `NptLlamaForCausalLM`."""
        from runner.evaluation.build import build

        return build(checkpoint, base, **vars(placement))

    def can_save(self, checkpoint: "Checkpoint") -> bool:
        """Both of its formats; those of a user's own are read only."""
        return checkpoint.format in {each.name for each in self.formats()}

    def save(self, checkpoint: "Checkpoint", model: "nn.Module", base: Path | None, target: Path) -> None:
        """As `Family.save`."""
        from runner.families.npt.save import write_model

        write_model(checkpoint, model, str(base.resolve()) if base else "", target)

    def convert(self, checkpoint: "Checkpoint", wanted: "Conversion", target: Path) -> "Writer":
        """npt_delta to the other container; npt_full to a base and adapters apart."""
        return super().convert(checkpoint, wanted, target)

    def plan_merge(
        self, spec: "MergeSpec", paths: Sequence[Path], opened: "Sequence[Checkpoint]", base: str | None, output: Path
    ) -> "Content":
        """As `Family.plan_merge`: layers of several npt_delta checkpoints."""
        from runner.merge.gather import gather_npt

        return gather_npt(spec, paths, opened, base, output)

    def checks(self) -> "Mapping[str, Check]":
        """As `Family.checks`."""
        from runner.families.npt.checks import CHECKS

        return CHECKS

    def check_buildable(self, base: str | None) -> None:
        """Over any Llama."""

    def build_small(self, context: "CheckContext") -> Path:
        """As `Family.build_small`."""
        from runner.families.npt.checks import build_small

        return build_small(context)

    def examples(self) -> "Mapping[str, Example]":
        """As `Family.examples`."""
        from runner.families.npt import checkpoint, checks, full

        return {checkpoint.NAME: checks.write_delta, full.NAME: checks.write_full}

    def base_misfits(self, checkpoint: "Checkpoint", config: Mapping[str, Any]) -> list[str]:
        """As `Family.base_misfits`."""
        from runner.families.npt.checks import base_misfits

        return base_misfits(checkpoint, config)

    def traits(self, checkpoint: "Checkpoint") -> "Traits":
        """As `Family.traits`."""
        from runner.families.npt.checks import NptTraits

        return NptTraits()
