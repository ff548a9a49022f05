"""A model with a classifier's head: what task=finetune leaves, and the original script's .pt."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from runner.errors import CheckpointError, ConfigError
from runner.families.family import Family

if TYPE_CHECKING:
    from torch import nn

    from runner.checkpoints.checkpoint import Checkpoint, CheckpointFormat, Listing, Writer
    from runner.checks.context import Check, CheckContext, Traits
    from runner.config import Conversion
    from runner.evaluation.base_models import Base
    from runner.evaluation.placement import Placement


@dataclass(frozen=True, kw_only=True)
class Finetuned(Family):
    """A classifier over a model of any other family.

    `backbone`: where the checkpoint lies that was fine-tuned, if it has moved. `force`: open a classifier whose
    backbone was converted to another architecture, as what it is.
    """

    name: str = "finetuned"
    backbone: str | None = None
    force: bool = False

    format_modules: ClassVar[tuple[str, ...]] = ("runner.families.finetuned.checkpoint",)
    needs_tokenizer: ClassVar[bool] = False
    continues_text: ClassVar[bool] = False

    def may_hold(self, listing: "Listing", module: str) -> bool:
        """As `Family.may_hold`: what describes a classifier, or one file with a classifier's tensors."""
        from runner.checkpoints.reading import tensor_names, weight_names

        if "classification.json" in listing.entries:
            return True
        files = weight_names(listing)
        try:
            return len(files) == 1 and any("classifier." in name for name in tensor_names(listing, files[0]))
        except CheckpointError:
            return True  # whoever looks closer says what is wrong

    def formats(self) -> "tuple[CheckpointFormat, ...]":
        from runner.families.finetuned.checkpoint import formats

        return formats(force=self.force)

    def needs_base(self, checkpoint: "Checkpoint") -> bool:
        return bool(checkpoint.details.base)

    def load_base(self, checkpoint: "Checkpoint", base: str | Path | None, placement: "Placement") -> "Base | None":
        from runner.families.finetuned.model import load_base

        return load_base(checkpoint, base, placement)

    def build(self, checkpoint: "Checkpoint", base: "Base | None", placement: "Placement") -> "nn.Module":
        from runner.families.finetuned.model import build

        return build(checkpoint, base, placement, self.backbone)

    def can_save(self, checkpoint: "Checkpoint") -> bool:
        return not checkpoint.details.is_original

    def save(self, checkpoint: "Checkpoint", model: "nn.Module", base: Path | None, target: Path) -> Path:
        from runner.families.finetuned.model import save

        return save(checkpoint, model, target)

    def convert(self, checkpoint: "Checkpoint", wanted: "Conversion", target: Path) -> "Writer":
        from runner.families.finetuned.convert import conversion

        if wanted.to == "safetensors":
            raise ConfigError("a fine-tuned classifier is converted to pt (the original script's) or hf")
        return conversion(checkpoint, wanted.to, self.backbone)

    def checks(self) -> "Mapping[str, Check]":
        from runner.families.finetuned.checks import CHECKS

        return CHECKS

    def check_buildable(self, base: str | None) -> None:
        raise ConfigError("family=finetuned: none is built; give ckpt=, or make one with task=finetune")

    def traits(self, checkpoint: "Checkpoint") -> "Traits":
        from runner.families.finetuned.checks import FinetunedTraits

        return FinetunedTraits(checkpoint)

    def build_small(self, context: "CheckContext") -> Path:
        raise ConfigError("family=finetuned: none is built; give ckpt=")
