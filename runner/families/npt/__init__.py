"""NPT: a Llama whose attention modulates the weights of its MLPs."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from runner.errors import ConfigError
from runner.families.family import Family
from runner.training.settings import TrainingSettings, check_number, check_whole

if TYPE_CHECKING:
    from torch import nn

    from runner.checkpoints.checkpoint import Checkpoint, Listing, Writer
    from runner.checks.context import Check, CheckContext, Example, Traits
    from runner.config import Conversion
    from runner.evaluation.base_models import Base
    from runner.evaluation.placement import Placement
    from runner.families.npt.curriculum import Stage
    from runner.families.npt.model import NptLlamaForCausalLM
    from runner.merge.plan import MergeOutput
    from runner.merge.spec import MergeSpec
    from runner.training.inputs import Trained, TrainingInputs

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
    trains_on_streams: ClassVar[bool] = True

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
        """All of its formats."""
        return checkpoint.format in (DELTA, FULL, EDIT)

    def save(self, checkpoint: "Checkpoint", model: "nn.Module", base: Path | None, target: Path) -> Path:
        """As `Family.save`."""
        from runner.families.npt import save, transfer_permanent
        from runner.families.npt.model import NptLlamaForCausalLM

        assert isinstance(model, NptLlamaForCausalLM)
        if checkpoint.format == FULL:
            save.save_full(checkpoint, model, target)
        elif checkpoint.format == EDIT:
            transfer_permanent.save_edited(model, target, "hf" if checkpoint.details.config else "delta")
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

        return {checkpoint.NAME: checks.write_delta, full.NAME: checks.write_full, EDIT: checks.write_edited}

    def base_misfits(self, checkpoint: "Checkpoint", config: Mapping[str, Any]) -> list[str]:
        """As `Family.base_misfits`."""
        from runner.families.npt.checks import base_misfits

        return base_misfits(checkpoint, config)

    def traits(self, checkpoint: "Checkpoint") -> "Traits":
        """As `Family.traits`."""
        from runner.families.npt.checks import NptTraits

        return NptTraits()


LAYER_WEIGHTS = ("uniform", "linear")
INITS = ("scaled", "xavier")
DIRECT_LOSSES = ("relative", "mse")


@dataclass(frozen=True, kw_only=True)
class EquivalenceSettings(TrainingSettings):
    """Which layers become NPT layers, and how they are trained.

    `curriculum`: stages as `name:steps[:ratio[:ratio]]` (README of this folder); None: the layers are trained by
    themselves on what the base gives them, and together by the logits. `direct_weight`, `logit_weight` (the original's
    name: `fidelity_weight`, which wins) and `regularization_weight`: how much each loss counts; `layer_weights`: how
    much each layer does. `direct_loss`: relative to the target's mean square, or mse; None: mse under a curriculum.
    `init=scaled`: `initial_scale` is the size of the random W_b_up relative to that of the other matrices, 0 starts
    from the unmodulated MLP; `init=xavier`: as the original, of size `init_scale`.
    Of a checkpoint that is gone on from: `new_layers` allows layers that it does not have, `keep_layers` keeps those
    that are not trained, and `start_step` is where the schedule starts.
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
    curriculum: str | None = None
    direct_weight: float = 1.0
    direct_loss: str | None = None
    logit_weight: float = 1.0
    fidelity_weight: float | None = None
    regularization_weight: float = 0.0
    layer_weights: str | tuple[float, ...] = "uniform"
    init: str = "scaled"
    initial_scale: float = 1.0
    init_scale: float = 0.001
    new_layers: bool = False
    keep_layers: bool = True
    start_step: int | None = None

    family: ClassVar[str] = "npt"
    at_least_one: ClassVar[tuple[str, ...]] = ("np_rank", "num_ranks", *TrainingSettings.at_least_one)
    positive: ClassVar[tuple[str, ...]] = ("init_scale", *TrainingSettings.positive)
    not_negative: ClassVar[tuple[str, ...]] = (
        "weight_decay", "direct_weight", "logit_weight", "regularization_weight", "initial_scale",
    )  # fmt: skip
    unrecorded: ClassVar[tuple[str, ...]] = (
        *TrainingSettings.unrecorded, "new_layers", "keep_layers", "start_step",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if not isinstance(self.layers, (list, tuple)) or not self.layers:
            raise ConfigError(f"train.layers={self.layers}: give a list of layer numbers, such as [1,3]")
        object.__setattr__(self, "layers", tuple(self.layers))
        for layer in self.layers:
            check_whole("layers", layer, 0)
        if len(set(self.layers)) < len(self.layers):
            raise ConfigError(f"train.layers={list(self.layers)}: names a layer twice")
        for name, known in (("modulation", tuple(PROJECTIONS)), ("init", INITS)):
            if getattr(self, name) not in known:
                raise ConfigError(f"train.{name}={getattr(self, name)} is unknown; choose {', '.join(known)}")
        if self.direct_loss not in (None, *DIRECT_LOSSES):
            raise ConfigError(f"train.direct_loss={self.direct_loss} is unknown; choose {' or '.join(DIRECT_LOSSES)}")
        for name in ("new_layers", "keep_layers"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"train.{name}={getattr(self, name)}: give true or false")
        super().__post_init__()
        if self.fidelity_weight is not None:
            check_number("fidelity_weight", self.fidelity_weight, zero_allowed=True)
        if self.start_step is not None:
            check_whole("start_step", self.start_step, 0)
        if not self.direct_weight and not self.of_logits:
            raise ConfigError("train.direct_weight and train.logit_weight are both 0: nothing would be trained")
        weights = self.layer_weights
        if isinstance(weights, (list, tuple)):  # Hydra makes a list of one word, too
            alone = len(weights) == 1 and isinstance(weights[0], str)
            object.__setattr__(self, "layer_weights", weights[0] if alone else tuple(weights))
        self.weight_of()
        self.stages()

    @property
    def of_logits(self) -> float:
        """How much the logits count."""
        return self.logit_weight if self.fidelity_weight is None else self.fidelity_weight

    @property
    def relative(self) -> bool:
        """Whether direct losses are relative to their targets."""
        return self.direct_loss == "relative" or (self.direct_loss is None and self.curriculum is None)

    def stages(self) -> "tuple[Stage, ...]":
        """The stages; none for the one stage of a training without a curriculum. Raises ConfigError."""
        if self.curriculum is None:
            return ()
        from runner.families.npt.curriculum import parse

        return parse(self.curriculum)

    def stage(self, step: int) -> str | None:
        """As `TrainingSettings.stage`."""
        if not (stages := self.stages()):
            return None
        from runner.families.npt.curriculum import stage_at

        return stages[stage_at(stages, step)].name

    def weight_of(self) -> dict[int, float]:
        """How much each layer counts; linear goes from 1 to 0.5 in the order of `layers`. Raises ConfigError."""
        said, count = self.layer_weights, len(self.layers)
        if isinstance(said, str):
            if said not in LAYER_WEIGHTS:
                raise ConfigError(
                    f"train.layer_weights={said} is unknown; choose uniform, linear, or a number for each layer"
                )
            fall = 0.5 if said == "linear" and count > 1 else 0.0
            return {layer: 1 - fall * j / max(1, count - 1) for j, layer in enumerate(self.layers)}
        if not isinstance(said, tuple) or len(said) != count:
            raise ConfigError(f"train.layer_weights={said}: give a number for each of the {count} layers")
        for number in said:
            check_number("layer_weights", number, zero_allowed=True)
        return dict(zip(self.layers, map(float, said), strict=True))


@dataclass(frozen=True, kw_only=True)
class TrainSettings(EquivalenceSettings):
    """The `train` node of `task=train`. `resume_from`: a checkpoint, or a run whose last one it is, to go on from.
    `dry_run`: say what would be trained, and stop."""

    resume_from: str | None = None
    dry_run: bool = False
