"""GPTs as modded-nanogpt trains them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from runner.errors import CheckpointError, ConfigError
from runner.families.family import Family

if TYPE_CHECKING:
    from torch import nn

    from runner.checkpoints.checkpoint import Checkpoint, CheckpointFormat, Listing, Writer
    from runner.checks.context import Check, CheckContext, Example, Traits
    from runner.config import Conversion
    from runner.data.text import Data
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
    alone; a number is the token that each starts with; None: on token shards, where that token is known. `window`:
    how far attention looks back, in blocks of 128: that of long blocks (short ones see half of it), [long, short], or
    trained; None: over everything.
    """

    name: str = "gpt"
    record: str | None = None
    documents: object = None
    window: object = None

    format_modules: ClassVar[tuple[str, ...]] = ("runner.families.gpt.checkpoint",)
    needs_tokenizer: ClassVar[bool] = False
    can_cut_vocabulary: ClassVar[bool] = True
    classifier_head: ClassVar[str] = "mlp"

    def __post_init__(self) -> None:
        if self.record is not None:
            from runner.families.gpt.identify import named

            named(str(self.record))
        documents = self.documents
        if documents not in (None, "known") and (not isinstance(documents, int) or documents < 0):
            raise ConfigError(
                f"family.documents={documents}: true, false, or the id of the token of a document's start"
            )
        self._windows()

    def _windows(self) -> "Windows":
        """`window` as `build_gpt` takes it. Raises ConfigError."""
        if self.window is None or self.window == "trained":
            return "trained" if self.window else None
        sizes = list(self.window) if isinstance(self.window, (list, tuple)) else [self.window]
        whole = [size for size in sizes if isinstance(size, int) and not isinstance(size, bool) and size > 0]
        if len(whole) != len(sizes) or len(sizes) != 1 + isinstance(self.window, (list, tuple)):
            raise ConfigError(f"family.window={self.window}: a number of blocks of 128, [long, short], or trained")
        return whole if len(whole) == 2 else whole[0]

    def on(self, data: "Data | None") -> "Family":
        """As `Family.on`: the scripts pack documents into shards."""
        on_shards = data is not None and data.name == "shards"
        return replace(self, documents="known") if on_shards and self.documents is None else self

    def of_reference(self, checkpoint: "Checkpoint") -> "Family":
        """As `Family.of_reference`: another GPT with the same masks."""
        return replace(self, record=None) if checkpoint.family == self.name else super().of_reference(checkpoint)

    def may_hold(self, listing: "Listing", module: str) -> bool:
        """As `Family.may_hold`: by an embedding among the names of tensors, nested as the scripts nest them or not."""
        from runner.checkpoints.reading import tensor_names, weight_names

        for file in weight_names(listing):
            try:
                names = tensor_names(listing, file)
            except CheckpointError:
                return True  # whoever looks closer says what is wrong
            if any("embed" in name or ".wte." in name for name in names):
                return True
        return False

    def likely_formats(self, listing: "Listing") -> "tuple[CheckpointFormat, ...]":
        """As `Family.likely_formats`."""
        return self.formats() if self.may_hold(listing, self.format_modules[0]) else ()

    def formats(self) -> "tuple[CheckpointFormat, ...]":
        """Its formats; all but the first two for the record that was told."""
        from runner.families.gpt import checkpoint, identify

        return checkpoint.FORMATS if self.record is None else checkpoint.formats(identify.named(str(self.record)))

    def build(self, checkpoint: "Checkpoint", base: "Base | None", placement: "Placement") -> "nn.Module":
        """As `Family.build`."""
        from runner.families.gpt import model

        end = model.end_of_text(checkpoint.details, self.documents)
        return model.build_gpt(checkpoint, placement, end_of_text=end, window=self._windows())

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
