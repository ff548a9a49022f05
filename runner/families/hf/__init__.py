"""Plain causal language models in Hugging Face directories, and one LoRA adapter over such a model (peft)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from runner.errors import ConfigError
from runner.families.family import Family

if TYPE_CHECKING:
    from torch import nn

    from runner.checkpoints.checkpoint import Checkpoint
    from runner.checks.check import Check
    from runner.checks.headers import Header
    from runner.evaluation.base_models import Base
    from runner.evaluation.placement import Placement

PEFT = "peft"


@dataclass(frozen=True, kw_only=True)
class Hf(Family):
    """A complete model (hf), or a LoRA adapter over one (peft)."""

    name: str = "hf"

    format_modules: ClassVar[tuple[str, ...]] = ("runner.families.lora.checkpoint", "runner.families.hf.checkpoint")

    def needs_base(self, checkpoint: "Checkpoint") -> bool:
        """An adapter does."""
        return checkpoint.format == PEFT

    def is_base(self, checkpoint: "Checkpoint") -> bool:
        """A complete model is."""
        return checkpoint.format != PEFT

    def can_be_spread(self, checkpoint: "Checkpoint") -> bool:
        """A complete model can."""
        return checkpoint.format != PEFT

    def build(self, checkpoint: "Checkpoint", base: "Base | None", placement: "Placement") -> "nn.Module":
        """As `Family.build`."""
        from runner.evaluation.base_models import build_plain

        if base is not None:
            from runner.families.lora_moe.model import build_adapter

            return build_adapter(checkpoint, base)
        checkpoint.require_complete()
        return build_plain(checkpoint.details.config, checkpoint.weights, checkpoint.weights.infos, placement)

    def can_save(self, checkpoint: "Checkpoint") -> bool:
        """Both of its formats."""
        return True

    def save(self, checkpoint: "Checkpoint", model: "nn.Module", base: Path | None, target: Path) -> Path:
        """As `Family.save`."""
        from runner.checkpoints import model_directory
        from runner.files.staging import staged

        if checkpoint.format == PEFT:
            from runner.families.lora.adapter import save_peft
            from runner.families.lora_moe.model import LoraForCausalLM

            assert isinstance(model, LoraForCausalLM)
            return save_peft(checkpoint.details, model.adapters()[0], base, target)
        tensors = model_directory.stored_tensors(checkpoint, model)
        with staged(target) as directory:
            model_directory.save(directory, tensors, config=checkpoint.details.config)
        return target

    def checks(self) -> "Mapping[str, Check]":
        """As `Family.checks`."""
        from runner.checks.catalogue import OF_FAMILY

        return OF_FAMILY["hf"]

    def detect(self, path: Path, read_header: "Callable[[Path], Header]") -> str | None:
        """As `Family.detect`."""
        from runner.checks.detected import look

        found = look(path, read_header)
        return found.format if found.family == self.name else None

    def check_buildable(self, base: str | None) -> None:
        """Never."""
        raise ConfigError("family=hf: nothing is added to a plain model; give ckpt=, or family=npt, gpt or lora_moe")
