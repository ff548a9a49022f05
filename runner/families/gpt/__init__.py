"""GPTs as modded-nanogpt trains them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from runner.errors import ConfigError
from runner.families.family import Family

if TYPE_CHECKING:
    from torch import nn

    from runner.checkpoints.checkpoint import Checkpoint, CheckpointFormat, Writer
    from runner.checks.context import Check, CheckContext, Example, Traits
    from runner.config import Conversion
    from runner.evaluation.base_models import Base
    from runner.evaluation.placement import Placement
    from runner.families.gpt.model import Windows
    from runner.finetuning.low_rank import LowRankSettings
    from runner.merge.plan import MergeOutput
    from runner.merge.spec import MergeSpec


@dataclass(frozen=True, kw_only=True)
class Gpt(Family):
    """A complete GPT of one of the public records of modded-nanogpt.

    `record`: whose checkpoint it is, where nothing in the file says it. `documents`: whether a document sees itself
    alone; a number is the token that each starts with. `window`: how far attention looks back, in blocks of 128: that
    of long blocks (short ones see half of it), [long, short], or trained; None: over everything.
    """

    name: str = "gpt"
    record: str | None = None
    documents: bool | int = False
    window: object = None

    format_modules: ClassVar[tuple[str, ...]] = ("runner.families.gpt.checkpoint",)
    needs_tokenizer: ClassVar[bool] = False
    can_cut_vocabulary: ClassVar[bool] = True
    classifier_head: ClassVar[str] = "mlp"

    def __post_init__(self) -> None:
        if self.record is not None:
            from runner.families.gpt.identify import named

            named(str(self.record))
        if not isinstance(self.documents, int) or self.documents < 0:
            raise ConfigError(
                f"family.documents={self.documents}: true, false, or the id of the token of a document's start"
            )
        self._windows()

    def _windows(self) -> "Windows":
        """`window` as `build_gpt` takes it. Raises ConfigError."""
        if self.window is None or self.window == "trained":
            return "trained" if self.window else None
        is_pair = isinstance(self.window, Sequence) and not isinstance(self.window, str) and len(self.window) == 2
        sizes = [size for size in (self.window if is_pair else [self.window]) if type(size) is int and size > 0]  # type: ignore[union-attr, attr-defined]
        if len(sizes) != 1 + is_pair:
            raise ConfigError(f"family.window={self.window}: a number of blocks of 128, [long, short], or trained")
        return sizes if is_pair else sizes[0]

    def formats(self) -> "tuple[CheckpointFormat, ...]":
        """Its formats; all but the first two for the record that was told."""
        from runner.families.gpt import checkpoint, identify

        return checkpoint.FORMATS if self.record is None else checkpoint.formats(identify.named(str(self.record)))

    def build(self, checkpoint: "Checkpoint", base: "Base | None", placement: "Placement") -> "nn.Module":
        """As `Family.build`."""
        from runner.families.gpt import model

        return model.build_gpt(checkpoint, placement, documents=self.documents, window=self._windows())

    def can_save(self, checkpoint: "Checkpoint") -> bool:
        """All of them."""
        return True

    def save(self, checkpoint: "Checkpoint", model: "nn.Module", base: Path | None, target: Path) -> Path:
        """As `Family.save`."""
        from runner.families.gpt.save import save_model

        save_model(checkpoint, model, target)
        return target

    def convert(self, checkpoint: "Checkpoint", wanted: "Conversion", target: Path) -> "Writer":
        """The same tensors in the other container, padding of the vocabulary cut where asked."""
        from runner.families.gpt.save import conversion

        if wanted.to == "hf":
            return super().convert(checkpoint, wanted, target)
        return conversion(checkpoint, wanted.to, wanted.vocab_size)

    def plan_merge(
        self, spec: "MergeSpec", paths: Sequence[Path], opened: "Sequence[Checkpoint]", base: str | None, output: Path
    ) -> "MergeOutput":
        """As `Family.plan_merge`: a mean of weights."""
        from runner.families.gpt.merge import plan_merge

        return plan_merge(spec, paths, opened, base, output)

    def add_low_rank(self, model: "nn.Module", settings: "LowRankSettings") -> list[str]:
        """As `Family.add_low_rank`: parts of merged tensors have names of their own."""
        from runner.families.gpt.low_rank import add_low_rank
        from runner.families.gpt.model import GptForCausalLM

        assert isinstance(model, GptForCausalLM)
        return add_low_rank(model, settings)

    def checks(self) -> "Mapping[str, Check]":
        """As `Family.checks`."""
        from runner.families.gpt.checks import CHECKS

        return CHECKS

    def check_buildable(self, base: str | None) -> None:
        """Without a base."""
        if base is not None:
            raise ConfigError("base= belongs to families that stand on a base; a gpt is complete by itself")

    def build_small(self, context: "CheckContext") -> Path:
        """As `Family.build_small`."""
        from runner.families.gpt.checks import build_small

        return build_small(context)

    def examples(self) -> "Mapping[str, Example]":
        """As `Family.examples`."""
        from runner.families.gpt.checks import EXAMPLES

        return EXAMPLES

    def traits(self, checkpoint: "Checkpoint") -> "Traits":
        """As `Family.traits`."""
        from runner.families.gpt.checks import GptTraits

        return GptTraits(checkpoint)
