"""NPT: a Llama whose attention modulates the weights of its MLPs."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from runner.config import TrainingSettings, check_whole
from runner.errors import ConfigError
from runner.families.family import Family

if TYPE_CHECKING:
    from torch import nn

    from runner.checkpoints.checkpoint import Checkpoint, Listing, Writer
    from runner.checks.context import Check, CheckContext, Example, Traits
    from runner.config import Conversion
    from runner.evaluation.base_models import Base
    from runner.evaluation.placement import Placement
    from runner.families.npt.model import NptLlamaForCausalLM
    from runner.merge.plan import MergeOutput
    from runner.merge.spec import MergeSpec
    from runner.training.loop import Trained, TrainingInputs

DELTA, FULL, EDIT = "npt_delta", "npt_full", "npt_edit"
PROJECTIONS = {"single": ("gate",), "dual": ("gate", "up"), "triple": ("gate", "up", "down")}

# The files of a whole model.
_MODEL = re.compile(r"(model|pytorch_model)\b")


@dataclass(frozen=True, kw_only=True)
class Npt(Family):
    """NPT layers over a frozen Llama (npt_delta), a complete model with them (npt_full), or an edited one (npt_edit).

    `layers`: which of its NPT layers modulate, the others being the base's; None: all.
    """

    name: str = "npt"
    layers: tuple[int, ...] | None = None

    format_modules: ClassVar[tuple[str, ...]] = (
        "runner.families.npt.checkpoint",
        "runner.families.npt.full",
        "runner.families.npt.edited",
    )
    llama_base: ClassVar[bool] = True

    def needs_base(self, checkpoint: "Checkpoint") -> bool:
        """All but those that hold its weights do, formats of a user's own among them."""
        return checkpoint.format != FULL and not (checkpoint.format == EDIT and checkpoint.details.config)

    def is_made_from_base(self, checkpoint: "Checkpoint") -> bool:
        """An npt_full is, and an edited model."""
        return checkpoint.format in (FULL, EDIT)

    def may_hold(self, listing: "Listing", module: str) -> bool:
        """As `Family.may_hold`."""
        if module.endswith(".full"):
            return "config.json" in listing.entries and any(map(_MODEL.match, listing.entries))
        return not module.endswith(".edited") or any(name.startswith("injection") for name in listing.entries)

    def can_be_spread(self, checkpoint: "Checkpoint") -> bool:
        """Always: it is a Llama."""
        return True

    def train(self, inputs: "TrainingInputs") -> "Trained":
        """As `Family.train`: toward equivalence with the layers of the base."""
        from runner.families.npt import training

        return training.train(inputs)

    def build(self, checkpoint: "Checkpoint", base: "Base | None", placement: "Placement") -> "NptLlamaForCausalLM":
        """As `Family.build`."""
        from runner.families.npt import model

        if checkpoint.format == EDIT:
            from runner.families.npt import transfer_permanent

            built = transfer_permanent.build_edited(checkpoint, base, placement)
        elif base is None:
            built = model.build_complete(checkpoint, checkpoint.details, placement)
        else:
            built = model.build_npt(checkpoint, base)
        if self.layers is not None:
            model.switch(built, self.layers)
        return built

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


@dataclass(frozen=True, kw_only=True)
class EquivalenceSettings(TrainingSettings):
    """Which layers become NPT layers, and how they are trained.

    `direct_weight`, `logit_weight`: how much each loss counts. `initial_scale`: the size of the random W_b_up
    relative to that of the other matrices; 0 starts from the unmodulated MLP.
    """

    layers: tuple[int, ...]
    modulation: str = "triple"
    np_rank: int = 16
    num_ranks: int = 4
    max_steps: int = 3000
    save_every: int = 500
    learning_rate: float = 1e-3
    warmup_steps: int = 300
    batch_size: int = 8
    direct_weight: float = 1.0
    logit_weight: float = 1.0
    initial_scale: float = 1.0

    family: ClassVar[str] = "npt"
    at_least_one: ClassVar[tuple[str, ...]] = ("np_rank", "num_ranks", *TrainingSettings.at_least_one)
    not_negative: ClassVar[tuple[str, ...]] = ("weight_decay", "direct_weight", "logit_weight", "initial_scale")

    def __post_init__(self) -> None:
        if not isinstance(self.layers, (list, tuple)) or not self.layers:
            raise ConfigError(f"train.layers={self.layers}: give a list of layer numbers, such as [1,3]")
        object.__setattr__(self, "layers", tuple(self.layers))
        for layer in self.layers:
            check_whole("layers", layer, 0)
        if len(set(self.layers)) < len(self.layers):
            raise ConfigError(f"train.layers={list(self.layers)}: names a layer twice")
        if self.modulation not in PROJECTIONS:
            raise ConfigError(f"train.modulation={self.modulation} is unknown; choose {', '.join(PROJECTIONS)}")
        super().__post_init__()
        if not self.direct_weight and not self.logit_weight:
            raise ConfigError("train.direct_weight and train.logit_weight are both 0: nothing would be trained")


@dataclass(frozen=True, kw_only=True)
class TrainSettings(EquivalenceSettings):
    """The `train` node of `task=train`. `resume_from`: a checkpoint, or a run whose last one it is, to go on from."""

    resume_from: str | None = None
