"""How a classifier is fine-tuned: the keys of `train` of task=finetune, checked."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from runner.errors import ConfigError, did_you_mean
from runner.finetuning.low_rank import LowRankSettings
from runner.training.settings import TrainingSettings, check_number, check_whole

SCHEDULES = ("linear", "cosine", "constant")
SCOPES = ("all", "head", "lora", "added", "auto")
# What an evaluation can be best by.
METRICS = ("loss", "accuracy", "balanced_accuracy", "macro_f1", "macro_f2", "macro_recall", "macro_precision")
# Whole share of an epoch after which a linear schedule is at its end.
_LINEAR_END = 0.9


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings:
    """`learning_rate` is the head's, `backbone_scale` of it the backbone's. `warmup`: the share of all steps.

    `final_scale`: the share of the rate at the end. `eval_every`: steps, or `epoch`. `metric`: val/accuracy or another
    figure. `patience`: evaluations in a row without improvement; None: all epochs. `max_steps` ends earlier, under the
    same schedule. `scope`: auto (what the family trains), all, head, lora, or last:N. Raises ConfigError.
    """

    head: str | None = None
    scope: str = "auto"
    lora: Mapping[str, Any] | None = None
    routing: str = "evaluation"
    epochs: int = 3
    batch_size: int = 16
    accumulation: int = 1
    learning_rate: float = 1e-4
    backbone_scale: float = 0.1
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    clip: float = 1.0
    warmup: float = 0.1
    schedule: str = "linear"
    final_scale: float = 0.1
    dropout: float = 0.1
    precision: str = "float32"
    class_weights: str = "none"
    label_smoothing: float = 0.0
    eval_every: int | str = "epoch"
    eval_batch_size: int = 32
    log_every: int = 10
    metric: str = "val/accuracy"
    patience: int | None = None
    max_steps: int | None = None
    resume_from: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulation", "eval_batch_size", "log_every"):
            check_whole(name, getattr(self, name), 1)
        for name in ("patience", "max_steps"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), 1, or_else="null")
        check_whole("seed", self.seed, 0)
        for name in ("learning_rate", "clip", "epsilon"):
            check_number(name, getattr(self, name), zero_allowed=False)
        for name in ("backbone_scale", "weight_decay", "warmup", "final_scale", "dropout", "label_smoothing"):
            check_number(name, getattr(self, name), zero_allowed=True)
        for name in ("warmup", "dropout", "label_smoothing"):
            if getattr(self, name) >= 1:
                raise ConfigError(f"train.{name}={getattr(self, name)}: must be below 1")
        for name, known in (
            ("schedule", SCHEDULES), ("class_weights", ("none", "balanced")), ("routing", ("evaluation", "train")),
            ("precision", ("float32", "bfloat16")), ("head", (None, "mlp", "linear")),
        ):  # fmt: skip
            if (value := getattr(self, name)) not in known:
                words = [word for word in known if word]
                raise ConfigError(f"train.{name}={value} is unknown{did_you_mean(str(value), words)}")
        if self.scope not in SCOPES and not re.fullmatch(r"last:[1-9]\d*", str(self.scope)):
            raise ConfigError(f"train.scope={self.scope} is unknown; choose all, head, lora, last:N or auto")
        if self.eval_every != "epoch":
            check_whole("eval_every", self.eval_every, 1, or_else="epoch")
        if self.figure not in METRICS:
            raise ConfigError(f"train.metric={self.metric} is unknown{did_you_mean(self.figure, METRICS)}")
        object.__setattr__(self, "betas", tuple(self.betas))
        if any(value is not None for value in (self.lora or {}).values()) and self.scope != "lora":
            if self.scope != "auto":
                raise ConfigError(f"train.lora needs train.scope=lora, not {self.scope}")
            object.__setattr__(self, "scope", "lora")
        self.low_rank  # noqa: B018 - which checks it

    @property
    def figure(self) -> str:
        """`metric` without the set's name."""
        return str(self.metric).removeprefix("val/")

    @property
    def low_rank(self) -> LowRankSettings | None:
        """The low-rank updates; None where none are trained."""
        if self.scope != "lora":
            return None
        own = {str(name): value for name, value in (self.lora or {}).items() if value is not None}
        known = [each.name for each in fields(LowRankSettings)]
        if unknown := sorted(set(own) - set(known)):
            raise ConfigError(f"train.lora.{unknown[0]} is unknown{did_you_mean(unknown[0], known)}")
        return LowRankSettings(**own)

    def values(self) -> dict[str, Any]:
        """All but where it goes on from."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name != "resume_from"}

    def shares(self, total: int) -> Callable[[int], float]:
        """The share of a group's peak after so many of `total` steps.

        linear: up over the first `warmup` of them, (i + 1) / (w + 1), then down to `final_scale` at 90 %. cosine: down
        to it at the end.
        """
        warm = int(self.warmup * total)

        def share(done: int) -> float:
            if done < warm:
                return (done + 1) / (warm + 1)
            if self.schedule == "constant":
                return 1.0
            end = _LINEAR_END * total if self.schedule == "linear" else total
            progress = min(1.0, (done - warm) / (end - warm)) if end > warm else 1.0
            fall = progress if self.schedule == "linear" else 0.5 * (1 - math.cos(math.pi * progress))
            return 1.0 - (1.0 - self.final_scale) * fall

        return share


@dataclass(frozen=True, kw_only=True)
class Steps(TrainingSettings):
    """What the loop is told: `every` steps the validation rows are measured, and a checkpoint is written."""

    every: int
    save_every: int = 1
    warmup_steps: int = 0

    def is_evaluated(self, step: int) -> bool:
        """Every so many steps, and at the end."""
        return step % self.every == 0 or step == self.max_steps

    def is_saved(self, step: int) -> bool:
        """Wherever it is evaluated: what is best is then on the disk."""
        return self.is_evaluated(step)


def steps(settings: FinetuneSettings, in_epoch: int) -> Steps:
    """The loop's settings, for so many steps in an epoch."""
    total = settings.epochs * in_epoch
    last = total if settings.max_steps is None else min(total, settings.max_steps)
    return Steps(
        max_steps=last,
        every=in_epoch if settings.eval_every == "epoch" else int(settings.eval_every),
        learning_rate=settings.learning_rate,
        gradient_clip_value=settings.clip,
        batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        log_every=settings.log_every,
        seed=settings.seed,
    )
