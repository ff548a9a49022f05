"""Plain causal language models in Hugging Face directories, and one LoRA adapter over such a model (peft)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from runner.errors import ConfigError
from runner.families.family import Family

if TYPE_CHECKING:
    from torch import nn

    from runner.checkpoints.checkpoint import Checkpoint, Listing
    from runner.checks.context import Check, Example, Traits
    from runner.evaluation.base_models import Base
    from runner.evaluation.placement import Placement
    from runner.merge.plan import MergeOutput
    from runner.merge.spec import MergeSpec

PEFT = "peft"


@dataclass(frozen=True, kw_only=True)
class Hf(Family):
    """A complete model (hf), or a LoRA adapter over one (peft)."""

    name: str = "hf"

    format_modules: ClassVar[tuple[str, ...]] = ("runner.families.lora.checkpoint", "runner.families.hf.checkpoint")

    def may_hold(self, listing: "Listing", module: str) -> bool:
        """As `Family.may_hold`: a whole model, or an adapter and its config."""
        if module == self.format_modules[0]:
            directory = listing.path if listing.path.is_dir() else listing.path.parent
            return (directory / "adapter_config.json").is_file()
        return "config.json" in listing.entries and any("model" in name for name in listing.entries)

    def needs_base(self, checkpoint: "Checkpoint") -> bool:
        return checkpoint.format == PEFT

    def is_base(self, checkpoint: "Checkpoint") -> bool:
        return checkpoint.format != PEFT

    def can_be_spread(self, checkpoint: "Checkpoint") -> bool:
        return checkpoint.format != PEFT

    def build(self, checkpoint: "Checkpoint", base: "Base | None", placement: "Placement") -> "nn.Module":
        from runner.evaluation.base_models import build_plain

        if base is not None:
            from runner.families.lora_moe.model import build_adapter

            return build_adapter(checkpoint, base)
        checkpoint.require_complete()
        return build_plain(checkpoint.details.config, checkpoint.weights, checkpoint.weights.infos, placement)

    def can_save(self, checkpoint: "Checkpoint") -> bool:
        return True

    def save(self, checkpoint: "Checkpoint", model: "nn.Module", base: Path | None, target: Path) -> Path:
        from runner.checkpoints import model_directory
        from runner.files.staging import staged

        if checkpoint.format == PEFT:
            from runner.families.lora.checkpoint import save_peft
            from runner.families.lora_moe.model import LoraForCausalLM

            assert isinstance(model, LoraForCausalLM)
            return save_peft(checkpoint.details, model.adapters()[0], base, target)
        tensors = model_directory.stored_tensors(checkpoint, model)
        with staged(target) as directory:
            model_directory.save(directory, tensors, config=checkpoint.details.config)
        return target

    def plan_merge(
        self, spec: "MergeSpec", paths: Sequence[Path], opened: "Sequence[Checkpoint]", base: str | None, output: Path
    ) -> "MergeOutput":
        """As `Family.plan_merge`; where one is an adapter, all are."""
        if any(checkpoint.format == PEFT for checkpoint in opened):
            from runner.families.lora.merge import plan_merge
        else:
            from runner.families.hf.merge import plan_merge

        return plan_merge(spec, paths, opened, base, output)

    def checks(self) -> "Mapping[str, Check]":
        from runner.families.hf.checks import CHECKS

        return CHECKS

    def check_buildable(self, base: str | None) -> None:
        raise ConfigError("family=hf: nothing is added to a plain model; give ckpt=, or family=npt, gpt or lora_moe")

    def examples(self) -> "Mapping[str, Example]":
        from runner.families.hf.checks import write_adapter, write_model

        return {PEFT: write_adapter, self.name: write_model}

    def base_misfits(self, checkpoint: "Checkpoint", config: Mapping[str, Any]) -> list[str]:
        from runner.families.hf.checks import base_misfits

        return base_misfits({"the adapter": checkpoint.details}, config)

    def traits(self, checkpoint: "Checkpoint") -> "Traits":
        from runner.families.hf.checks import LoraTraits

        return LoraTraits() if checkpoint.format == PEFT else super().traits(checkpoint)
