"""How NPT layers are trained: numbers, checked. Nothing heavy is imported here, so that configs build at once."""

import math
from dataclasses import dataclass

from runner.errors import ConfigError

PROJECTIONS = {"single": ("gate",), "dual": ("gate", "up"), "triple": ("gate", "up", "down")}

_AT_LEAST_ONE = ("np_rank", "num_ranks", "max_steps", "save_every", "batch_size")
_POSITIVE = ("learning_rate", "gradient_clip_value")
_NOT_NEGATIVE = ("weight_decay", "direct_weight", "logit_weight", "initial_scale")


@dataclass(frozen=True, kw_only=True)
class EquivalenceSettings:
    """Which layers become NPT layers, and how they are trained.

    `batch_size` rows of up to `sequence_length` tokens are what a caller's batches are made of. `direct_weight`,
    `logit_weight`: how much each loss of losses.py counts. `initial_scale`: the size of the random W_b_up relative
    to that of the other matrices; 0 starts from the unmodulated MLP. Raises ConfigError for what cannot be trained.
    """

    layers: tuple[int, ...]
    modulation: str = "triple"
    np_rank: int = 16
    num_ranks: int = 4
    max_steps: int = 3000
    save_every: int = 500
    learning_rate: float = 1e-3
    warmup_steps: int = 300
    weight_decay: float = 0.0
    gradient_clip_value: float = 1.0
    batch_size: int = 8
    sequence_length: int = 256
    direct_weight: float = 1.0
    logit_weight: float = 1.0
    initial_scale: float = 1.0
    seed: int = 0

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
        for name in _AT_LEAST_ONE:
            check_whole(name, getattr(self, name), 1)
        check_whole("sequence_length", self.sequence_length, 2)
        check_whole("warmup_steps", self.warmup_steps, 0)
        check_whole("seed", self.seed, 0)
        for name in (*_POSITIVE, *_NOT_NEGATIVE):
            check_number(name, getattr(self, name), zero_allowed=name in _NOT_NEGATIVE)
        if not self.direct_weight and not self.logit_weight:
            raise ConfigError("train.direct_weight and train.logit_weight are both 0: nothing would be trained")
        if self.warmup_steps >= self.max_steps:
            raise ConfigError(f"train.warmup_steps={self.warmup_steps} must be below train.max_steps={self.max_steps}")


@dataclass(frozen=True, kw_only=True)
class TrainSettings(EquivalenceSettings):
    """The `train` node of `task=train`. `resume_from`: a checkpoint, or a run whose last one it is, to go on from."""

    resume_from: str | None = None


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
