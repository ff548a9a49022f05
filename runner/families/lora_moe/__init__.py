"""Mixtures of LoRA experts under a router (DyLoRA-MoE)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from runner.families.family import Family

if TYPE_CHECKING:
    from torch import nn

    from runner.checkpoints.checkpoint import Checkpoint
    from runner.checks.check import Check
    from runner.checks.context import Bench
    from runner.checks.headers import Header
    from runner.evaluation.base_models import Base
    from runner.evaluation.placement import Placement
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

    def routing(self) -> dict[str, Any]:
        """The options that take the place of the checkpoint's own."""
        given = {"top_k": self.top_k, "router_features": self.router_features}
        return {name: value for name, value in given.items() if value is not None}

    def build(self, checkpoint: "Checkpoint", base: "Base | None", placement: "Placement") -> "nn.Module":
        """As `Family.build`: a `LoraMoeForCausalLM`."""
        from runner.evaluation.build import build

        model: Any = build(checkpoint, base, routing=self.routing(), **vars(placement))
        model.experts_on = self.experts
        return model

    def can_save(self, checkpoint: "Checkpoint") -> bool:
        """Always."""
        return True

    def save(self, checkpoint: "Checkpoint", model: "nn.Module", base: Path | None, target: Path) -> None:
        """As `Family.save`."""
        from runner.checks.saving import save_model

        save_model(checkpoint, model, base, target)

    def plan_merge(
        self, spec: "MergeSpec", paths: Sequence[Path], opened: "Sequence[Checkpoint]", base: str | None, output: Path
    ) -> "MergeOutput":
        """As `Family.plan_merge`: experts of several checkpoints, or their mean."""
        from runner.families.lora_moe.merge import plan_merge

        return plan_merge(spec, paths, opened, base, output)

    def checks(self) -> "Mapping[str, Check]":
        """As `Family.checks`."""
        from runner.checks.catalogue import OF_FAMILY

        return OF_FAMILY["lora_moe"]

    def detect(self, path: Path, read_header: "Callable[[Path], Header]") -> str | None:
        """As `Family.detect`."""
        from runner.checks.detected import look

        found = look(path, read_header)
        return found.format if found.family == self.name else None

    def check_buildable(self, base: str | None) -> None:
        """Over any base."""

    def build_small(self, bench: "Bench") -> Path:
        """As `Family.build_small`."""
        from runner.checks.building import build

        return build(bench)
