"""NPT: a Llama whose attention modulates the weights of its MLPs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from runner.families.family import Family

if TYPE_CHECKING:
    from torch import nn

    from runner.checkpoints.checkpoint import Checkpoint, Writer
    from runner.checks.context import Check, CheckContext, Example, Traits
    from runner.config import Conversion
    from runner.evaluation.base_models import Base
    from runner.evaluation.placement import Placement
    from runner.families.npt.model import NptLlamaForCausalLM
    from runner.merge.plan import MergeOutput
    from runner.merge.spec import MergeSpec

DELTA, FULL = "npt_delta", "npt_full"


@dataclass(frozen=True, kw_only=True)
class Npt(Family):
    """NPT layers over a frozen Llama (npt_delta), or a complete model with them (npt_full)."""

    name: str = "npt"

    format_modules: ClassVar[tuple[str, ...]] = ("runner.families.npt.checkpoint", "runner.families.npt.full")
    llama_base: ClassVar[bool] = True

    def needs_base(self, checkpoint: "Checkpoint") -> bool:
        """All but npt_full do, formats of a user's own among them."""
        return checkpoint.format != FULL

    def is_made_from_base(self, checkpoint: "Checkpoint") -> bool:
        """An npt_full is."""
        return checkpoint.format == FULL

    def can_be_spread(self, checkpoint: "Checkpoint") -> bool:
        """Always: it is a Llama."""
        return True

    def build(self, checkpoint: "Checkpoint", base: "Base | None", placement: "Placement") -> "NptLlamaForCausalLM":
        """As `Family.build`."""
        from runner.families.npt import model

        if base is None:
            return model.build_complete(checkpoint, checkpoint.details, placement)
        return model.build_npt(checkpoint, base)

    def can_save(self, checkpoint: "Checkpoint") -> bool:
        """Both of its formats."""
        return checkpoint.format in (DELTA, FULL)

    def save(self, checkpoint: "Checkpoint", model: "nn.Module", base: Path | None, target: Path) -> Path:
        """As `Family.save`."""
        from runner.families.npt import save
        from runner.families.npt.model import NptLlamaForCausalLM

        assert isinstance(model, NptLlamaForCausalLM)
        if checkpoint.format == FULL:
            save.save_full(checkpoint, model, target)
        elif checkpoint.format == DELTA:
            save.save_delta(checkpoint, model, base, target)
        else:
            return super().save(checkpoint, model, base, target)
        return target

    def convert(self, checkpoint: "Checkpoint", wanted: "Conversion", target: Path) -> "Writer":
        """An npt_delta in the other container; an npt_full as a base and adapters apart."""
        from runner.families.npt import save

        if wanted.to == "hf" and checkpoint.format == FULL:
            return partial(save.take_apart, checkpoint)
        if wanted.to != "hf" and checkpoint.format == DELTA:
            return partial(save.convert_delta, checkpoint, wanted.to, target)
        return super().convert(checkpoint, wanted, target)

    def plan_merge(
        self, spec: "MergeSpec", paths: Sequence[Path], opened: "Sequence[Checkpoint]", base: str | None, output: Path
    ) -> "MergeOutput":
        """As `Family.plan_merge`: layers of several npt_delta checkpoints."""
        from runner.families.npt.merge import plan_merge

        return plan_merge(spec, paths, opened, base, output)

    def canonical_names(self, checkpoint: "Checkpoint") -> dict[str, str]:
        """As `Family.canonical_names`: npt_delta has two spellings."""
        from runner.families.npt.checkpoint import key

        names = super().canonical_names(checkpoint)
        if checkpoint.format != DELTA:
            return names
        for layer in checkpoint.layers:
            for projection, matrices in layer.keys.items():
                for matrix, spelled in matrices.items():
                    for rank, name in enumerate(spelled):
                        del names[name]
                        names[key(layer.layer, layer.modulation, projection, matrix, rank, layer.num_ranks)] = name
        return names

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
