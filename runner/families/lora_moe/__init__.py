"""Mixtures of LoRA experts under a router (DyLoRA-MoE)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from runner.families.family import Family

if TYPE_CHECKING:
    from torch import nn

    from runner.checkpoints.checkpoint import Checkpoint
    from runner.checks.context import Check, CheckContext, Example, Traits
    from runner.evaluation.base_models import Base
    from runner.evaluation.placement import Placement
    from runner.families.lora_moe.model import LoraMoeForCausalLM
    from runner.merge.plan import MergeOutput
    from runner.merge.spec import MergeSpec


@dataclass(frozen=True, kw_only=True)
class LoraMoe(Family):
    """Several LoRA experts and a router over any causal language model.

    `top_k` takes the place of the checkpoint's own; `router_features`: all_experts (the default), base or expert_0;
    `experts`: whether they are on.
    """

    name: str = "lora_moe"
    top_k: int | None = None
    router_features: str | None = None
    experts: bool = True

    format_modules: ClassVar[tuple[str, ...]] = ("runner.families.lora_moe.checkpoint",)

    def needs_base(self, checkpoint: "Checkpoint") -> bool:
        """Always."""
        return True

    def build(self, checkpoint: "Checkpoint", base: "Base | None", placement: "Placement") -> "LoraMoeForCausalLM":
        """As `Family.build`."""
        from runner.families.lora_moe.model import build_moe

        assert base is not None, "its experts stand on a base"
        given = {"top_k": self.top_k, "router_features": self.router_features}
        model = build_moe(checkpoint, base, **{name: value for name, value in given.items() if value is not None})
        model.experts_on = self.experts
        return model

    def can_save(self, checkpoint: "Checkpoint") -> bool:
        """Always."""
        return True

    def save(self, checkpoint: "Checkpoint", model: "nn.Module", base: Path | None, target: Path) -> Path:
        """As `Family.save`."""
        from runner.families.lora_moe.model import LoraMoeForCausalLM
        from runner.families.lora_moe.save import save_moe
        from runner.families.lora_moe.state import read_skills

        assert isinstance(model, LoraMoeForCausalLM)
        skills = None if checkpoint.details.skills is None else read_skills(checkpoint.details.skills)
        name = str(base.resolve()) if base else ""
        save_moe(model, target, base_name=name, step=checkpoint.step, skills=skills)
        return target

    def plan_merge(
        self, spec: "MergeSpec", paths: Sequence[Path], opened: "Sequence[Checkpoint]", base: str | None, output: Path
    ) -> "MergeOutput":
        """As `Family.plan_merge`: experts of several checkpoints, or their mean."""
        from runner.families.lora_moe.merge import plan_merge

        return plan_merge(spec, paths, opened, base, output)

    def checks(self) -> "Mapping[str, Check]":
        """As `Family.checks`."""
        from runner.families.lora_moe.checks import CHECKS

        return CHECKS

    def check_buildable(self, base: str | None) -> None:
        """Over any base."""

    def build_small(self, context: "CheckContext") -> Path:
        """As `Family.build_small`."""
        from runner.families.lora_moe.checks import build_small

        return build_small(context)

    def examples(self) -> "Mapping[str, Example]":
        """As `Family.examples`."""
        from runner.families.lora_moe.checks import write_example

        return {self.name: write_example}

    def base_misfits(self, checkpoint: "Checkpoint", config: Mapping[str, Any]) -> list[str]:
        """As `Family.base_misfits`."""
        from runner.families.lora_moe.checks import base_misfits

        return base_misfits(checkpoint, config)

    def traits(self, checkpoint: "Checkpoint") -> "Traits":
        """As `Family.traits`."""
        from runner.families.lora_moe.checks import MoeTraits

        return MoeTraits()
