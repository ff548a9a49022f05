"""How anything is trained: the keys that every `train` node has, checked. Nothing heavy is imported here."""

import math
from dataclasses import dataclass, fields
from typing import ClassVar

from runner.errors import ConfigError, did_you_mean

# What the passes compute in, and the other spellings that people know.
PRECISIONS = ("auto", "float32", "bf16", "fp16")
_SPELLED = {"bfloat16": "bf16", "float16": "fp16", "fp32": "float32"}


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How anything over a frozen base is trained; steps are optimizer steps.

    `batch_size` rows of up to `sequence_length` tokens are a micro-batch of one process, and
    `gradient_accumulation_steps` of them a step; streamed text is cut every `stride` tokens (None: `sequence_length`).
    `gradient_scale_factor` multiplies the gradients before they are clipped. `precision`: what the passes compute in;
    auto is that of the base. Every `log_every`, `eval_every`, `sample_every` and `save_every` steps (None: never) a
    row is logged, the held-out rows and the checkpoint are measured, prompts are continued, and a checkpoint is
    written, which happens at the end, too. `eval_fraction` of the documents is held out for `eval_batches` batches.
    The names of the fields below say what each number of a subclass must be. Raises ConfigError for what cannot be
    trained.
    """

    max_steps: int
    save_every: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    gradient_clip_value: float = 1.0
    gradient_scale_factor: float = 1.0
    batch_size: int
    gradient_accumulation_steps: int = 1
    precision: str = "auto"
    sequence_length: int = 256
    stride: int | None = None
    shuffle_buffer: int = 1000
    log_every: int = 10
    eval_every: int | None = None
    eval_batches: int = 8
    eval_fraction: float = 0.02
    sample_every: int | None = None
    seed: int = 0

    family: ClassVar[str]
    at_least_one: ClassVar[tuple[str, ...]] = (
        "max_steps", "save_every", "batch_size", "gradient_accumulation_steps", "log_every", "eval_batches",
        "shuffle_buffer",
    )  # fmt: skip
    positive: ClassVar[tuple[str, ...]] = (
        "learning_rate", "gradient_clip_value", "gradient_scale_factor", "epsilon", "eval_fraction",
    )  # fmt: skip
    not_negative: ClassVar[tuple[str, ...]] = ("weight_decay",)
    # Keys that say what a command does, and nothing of what the weights are made with.
    unrecorded: ClassVar[tuple[str, ...]] = ("resume_from", "dry_run")

    def __post_init__(self) -> None:
        for name in self.at_least_one:
            check_whole(name, getattr(self, name), 1)
        for name in ("eval_every", "sample_every", "stride"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), 1, or_else="null")
        check_whole("sequence_length", self.sequence_length, 2)
        check_whole("warmup_steps", self.warmup_steps, 0)
        check_whole("seed", self.seed, 0)
        for name in (*self.positive, *self.not_negative):
            check_number(name, getattr(self, name), zero_allowed=name in self.not_negative)
        if getattr(self, "resume_from", None) is None:  # else one of the two may be as the checkpoint says
            self.check_schedule()
        if self.eval_fraction >= 1:
            raise ConfigError(f"train.eval_fraction={self.eval_fraction}: must be below 1")
        betas = self.betas
        if not isinstance(betas, (list, tuple)) or len(betas) != 2 or not all(map(_is_share, betas)):
            raise ConfigError(f"train.betas={betas}: give two numbers from 0 to below 1, such as [0.9,0.999]")
        object.__setattr__(self, "betas", tuple(betas))
        precision = _SPELLED.get(self.precision, self.precision) if isinstance(self.precision, str) else self.precision
        if precision not in PRECISIONS:
            near = did_you_mean(str(precision), PRECISIONS)
            raise ConfigError(f"train.precision={precision} is unknown{near}")
        object.__setattr__(self, "precision", precision)

    def check_schedule(self) -> None:
        """Raise ConfigError where the warm-up does not end before the last step."""
        if self.warmup_steps >= self.max_steps:
            raise ConfigError(f"train.warmup_steps={self.warmup_steps} must be below train.max_steps={self.max_steps}")

    def values(self) -> dict[str, object]:
        """The fields that say what the trained weights are made with."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name not in self.unrecorded}

    def stage(self, step: int) -> str | None:
        """The name of the stage that `step` runs in, where there are several."""
        return None

    def is_saved(self, step: int) -> bool:
        """Whether a checkpoint is written after `step`."""
        return step % self.save_every == 0 or step == self.max_steps

    def is_logged(self, step: int) -> bool:
        """Whether a row of the log is written after `step`."""
        return step % self.log_every == 0 or step == self.max_steps

    def is_evaluated(self, step: int) -> bool:
        """Whether the held-out rows are measured after `step`."""
        return self.eval_every is not None and (step % self.eval_every == 0 or step == self.max_steps)

    def is_sampled(self, step: int) -> bool:
        """Whether prompts are continued after `step`."""
        return self.sample_every is not None and (step % self.sample_every == 0 or step == self.max_steps)


def check_whole(name: str, value: object, least: int, *, or_else: str = "") -> None:
    """Raise ConfigError unless `train.<name>` is a whole number of at least `least`; `or_else`: what else it may be."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(
            f"train.{name}={value}: must be a whole number, at least {least}{or_else and f', or {or_else}'}"
        )


def check_number(name: str, value: object, *, zero_allowed: bool) -> None:
    """Raise ConfigError unless `train.<name>` is a finite number above 0, or 0 where that is allowed."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or value < 0 or (value == 0 and not zero_allowed):  # type: ignore[operator]
        raise ConfigError(f"train.{name}={value}: must be a number {'of at least' if zero_allowed else 'above'} 0")


def _is_share(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1
