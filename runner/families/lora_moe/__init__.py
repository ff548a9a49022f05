"""Mixtures of LoRA experts under a router (DyLoRA-MoE)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from runner.config import AUTO
from runner.errors import CheckpointError, ConfigError
from runner.families.family import Family
from runner.training.settings import TrainingSettings, check_whole

if TYPE_CHECKING:
    from torch import nn

    from runner.checkpoints.checkpoint import Checkpoint, Listing
    from runner.checks.context import Check, CheckContext, Example, Traits
    from runner.evaluation.base_models import Base
    from runner.evaluation.placement import Placement
    from runner.families.lora_moe.model import LoraMoeForCausalLM
    from runner.merge.plan import MergeOutput
    from runner.merge.spec import MergeSpec
    from runner.training.inputs import Trained, TrainingInputs

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
REDUCTIONS = ("max", "median")


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

    def may_hold(self, listing: "Listing", module: str) -> bool:
        """As `Family.may_hold`: a directory of experts, or a config.json of its own."""
        if {"peft_adapters", "dylo_moe_state"} & {*listing.entries}:
            return True
        if not listing.path.is_dir() or "config.json" not in listing.entries:
            return False
        from runner.files.strict_json import read_object

        try:
            return read_object(listing.file("config.json"), "config", 16 << 20).get("model_type") == "dylora-moe"
        except CheckpointError:
            return True  # whoever looks closer says what is wrong

    def needs_base(self, checkpoint: "Checkpoint") -> bool:
        return True

    def check_training(self, settings: "TrainingSettings") -> None:
        assert isinstance(settings, MoeSettings)
        if self.router_features is not None or not self.experts:
            raise ConfigError(
                "family.router_features and family.experts are no keys of task=train: a checkpoint does not record "
                "them; give them when it is measured"
            )
        # With train.experts=auto their number is known later, and the model checks it.
        if isinstance(settings.experts, int) and self.top_k is not None and not 1 <= self.top_k <= settings.experts:
            raise ConfigError(
                f"family.top_k={self.top_k}: with train.experts={settings.experts} it is a number from 1 to "
                f"{settings.experts}"
            )

    def training_texts(self, documents: Sequence[str], name: str | None) -> dict[str, list[str]]:
        from runner.families.lora_moe.skills import documents_by_skill

        return documents_by_skill(documents, name)

    def train(self, inputs: "TrainingInputs") -> "Trained":
        from runner.families.lora_moe import training

        return training.train(inputs, top_k=self.top_k)

    def build(self, checkpoint: "Checkpoint", base: "Base | None", placement: "Placement") -> "LoraMoeForCausalLM":
        from runner.families.lora_moe.model import build_moe

        assert base is not None, "its experts stand on a base"
        given = {"top_k": self.top_k, "router_features": self.router_features}
        model = build_moe(checkpoint, base, **{name: value for name, value in given.items() if value is not None})
        model.experts_on = self.experts
        return model

    def can_save(self, checkpoint: "Checkpoint") -> bool:
        return True

    def save(self, checkpoint: "Checkpoint", model: "nn.Module", base: Path | None, target: Path) -> Path:
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
        from runner.families.lora_moe.merge import plan_merge

        return plan_merge(spec, paths, opened, base, output)

    def checks(self) -> "Mapping[str, Check]":
        from runner.families.lora_moe.checks import CHECKS

        return CHECKS

    def check_buildable(self, base: str | None) -> None:
        """Over any base."""

    def build_small(self, context: "CheckContext") -> Path:
        from runner.families.lora_moe.checks import build_small

        return build_small(context)

    def examples(self) -> "Mapping[str, Example]":
        from runner.families.lora_moe.checks import write_example

        return {self.name: write_example}

    def base_misfits(self, checkpoint: "Checkpoint", config: Mapping[str, Any]) -> list[str]:
        from runner.families.hf.checks import base_misfits

        return base_misfits({expert.name: expert.adapter for expert in checkpoint.details.experts}, config)

    def traits(self, checkpoint: "Checkpoint") -> "Traits":
        from runner.families.lora_moe.checks import MoeTraits

        return MoeTraits()


@dataclass(frozen=True, kw_only=True)
class MoeSettings(TrainingSettings):
    """The experts, and how they are trained.

    `experts`: their number, or `auto` for one for each new skill of the data (a training that goes on keeps those of
    its checkpoint). `target_modules`: what the experts change, by the last part of the modules' names. `temperature`
    divides the router's logits in training; `balance_weight`: how much the balance loss counts beside the
    cross-entropy. A skill is new where its `novelty` (max or median) cosine to the library is below
    `novelty_threshold`.
    """

    experts: int | str = 2
    lora_r: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] = TARGETS
    temperature: float = 2.0
    balance_weight: float = 0.1
    novelty: str = "max"
    novelty_threshold: float = 0.75
    max_steps: int = 200
    save_every: int = 100
    learning_rate: float = 5e-3
    warmup_steps: int = 20
    batch_size: int = 16

    family: ClassVar[str] = "lora_moe"
    at_least_one: ClassVar[tuple[str, ...]] = ("lora_r", *TrainingSettings.at_least_one)
    positive: ClassVar[tuple[str, ...]] = ("lora_alpha", "temperature", *TrainingSettings.positive)
    not_negative: ClassVar[tuple[str, ...]] = ("weight_decay", "balance_weight", "lora_dropout", "novelty_threshold")

    def __post_init__(self) -> None:
        names = self.target_modules
        if not isinstance(names, (list, tuple)) or not names or not all(isinstance(n, str) and n for n in names):
            raise ConfigError(f"train.target_modules={names}: give a list of modules, such as [q_proj,v_proj]")
        object.__setattr__(self, "target_modules", tuple(names))
        if self.experts != AUTO:
            check_whole("experts", self.experts, 1, or_else=AUTO)
        super().__post_init__()
        if self.lora_dropout >= 1:
            raise ConfigError(f"train.lora_dropout={self.lora_dropout}: must be below 1")
        if self.novelty_threshold > 1:
            raise ConfigError(f"train.novelty_threshold={self.novelty_threshold}: a cosine is at most 1")
        if self.novelty not in REDUCTIONS:
            raise ConfigError(f"train.novelty={self.novelty} is unknown; choose {' or '.join(REDUCTIONS)}")


@dataclass(frozen=True, kw_only=True)
class MoeTrainSettings(MoeSettings):
    """The `train` node of `task=train family=lora_moe`. `resume_from`: a checkpoint or a run to go on from."""

    resume_from: str | None = None
