"""What every training shares: settings, optimizers and schedules, and what is refused where it diverges."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_cosine_schedule_with_warmup

from runner.errors import ConfigError, DivergedError
from runner.files.tensors import is_finite

DIVERGED = "give a smaller train.learning_rate or train.gradient_clip_value"
# The quintic of Keller Jordan's Newton-Schulz iteration: five rounds bring all singular values near 1.
_ROUNDS = 5
_A, _B, _C = 3.4445, -4.7750, 2.0315


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How anything over a frozen base is trained; steps are optimizer steps.

    `batch_size` rows of up to `sequence_length` tokens are a batch; a checkpoint is written every `save_every` steps
    and at the end. The names of the fields below say what each number of a subclass must be. Raises ConfigError for
    what cannot be trained.
    """

    max_steps: int
    save_every: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float = 0.0
    gradient_clip_value: float = 1.0
    batch_size: int
    sequence_length: int = 256
    seed: int = 0

    family: ClassVar[str]
    at_least_one: ClassVar[tuple[str, ...]] = ("max_steps", "save_every", "batch_size")
    positive: ClassVar[tuple[str, ...]] = ("learning_rate", "gradient_clip_value")
    not_negative: ClassVar[tuple[str, ...]] = ("weight_decay",)

    def __post_init__(self) -> None:
        for name in self.at_least_one:
            check_whole(name, getattr(self, name), 1)
        check_whole("sequence_length", self.sequence_length, 2)
        check_whole("warmup_steps", self.warmup_steps, 0)
        check_whole("seed", self.seed, 0)
        for name in (*self.positive, *self.not_negative):
            check_number(name, getattr(self, name), zero_allowed=name in self.not_negative)
        if self.warmup_steps >= self.max_steps:
            raise ConfigError(f"train.warmup_steps={self.warmup_steps} must be below train.max_steps={self.max_steps}")

    def values(self) -> dict[str, object]:
        """The fields but for the checkpoint to go on from: what the trained weights are made with."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name != "resume_from"}

    def is_saved(self, step: int) -> bool:
        """Whether a checkpoint is written after `step`."""
        return step % self.save_every == 0 or step == self.max_steps


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


def optimizer_and_schedule(
    parameters: Sequence[torch.Tensor], settings: TrainingSettings, device: torch.device
) -> tuple[torch.optim.AdamW, LambdaLR]:
    """AdamW over `parameters`, which lie on `device`; a linear warm-up, then a cosine to 0 at `max_steps`."""
    optimizer = torch.optim.AdamW(
        parameters,
        lr=settings.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=settings.weight_decay,
        fused=device.type in ("cpu", "cuda"),
    )
    return optimizer, get_cosine_schedule_with_warmup(optimizer, settings.warmup_steps, settings.max_steps)


def require_finite_loss(loss: torch.Tensor, step: int) -> None:
    """Raise DivergedError where the loss of `step`, or the norm of its gradient, is NaN or Inf."""
    if not bool(torch.isfinite(loss)):
        raise DivergedError(f"the loss is no longer finite at step {step}: {DIVERGED}")


def require_finite(parameters: Iterable[torch.Tensor], step: int) -> None:
    """Raise DivergedError where a weight is NaN or Inf after `step`."""
    if not all(map(is_finite, parameters)):
        raise DivergedError(f"NaN or Inf in the weights after step {step}, not saved: {DIVERGED}")


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, in the dtype of its parameters; every parameter is a matrix.

    The update of a matrix has about the root mean square of AdamW's, so that `lr` and `weight_decay` are of its size.
    torch's own multiplies in bfloat16, which most CPUs do twenty times slower.
    """

    def __init__(
        self, parameters: Iterable[torch.Tensor], *, lr: float, weight_decay: float = 0.0, momentum: float = 0.9
    ) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # there is no closure to compute the loss again
        """One step for every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in (p for p in group["params"] if p.grad is not None):
                momentum = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
                momentum.lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonal(parameter.grad.lerp(momentum, group["momentum"]))
                size = 0.2 * max(parameter.shape) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * size)


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix [m, n] with the singular vectors of `matrix` and singular values near 1 (0.7 to 1.2), in its dtype."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(_ROUNDS):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=_B, alpha=_C), wide, beta=_A)
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T
