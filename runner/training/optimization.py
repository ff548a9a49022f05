"""What every training shares: optimizers and schedules, and what is refused where it diverges."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch.optim.lr_scheduler import LambdaLR

from runner.errors import DivergedError
from runner.files.tensors import is_finite
from runner.training.settings import TrainingSettings

DIVERGED = "give a smaller train.learning_rate or train.gradient_clip_value"
# The quintic of Keller Jordan's Newton-Schulz iteration: five rounds bring all singular values near 1.
_ROUNDS = 5
_A, _B, _C = 3.4445, -4.7750, 2.0315


def warmup_and_cosine(warmup: int, total: int) -> Callable[[int], float]:
    """The share of the rate after so many steps: linear from 0 over `warmup` steps, then a cosine to 0 at `total`."""

    def share(done: int) -> float:
        if done < warmup:
            return done / warmup
        progress = (done - warmup) / (total - warmup)
        return 0.5 * (1 + math.cos(math.pi * progress)) if progress < 1 else 0.0

    return share


def optimizer_and_schedule(
    parameters: Sequence[torch.Tensor], settings: TrainingSettings, device: torch.device
) -> tuple[torch.optim.AdamW, LambdaLR]:
    """AdamW over `parameters`, which lie on `device`; a linear warm-up, then a cosine to 0 at `max_steps`."""
    optimizer = torch.optim.AdamW(
        parameters,
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
        fused=device.type in ("cpu", "cuda"),
    )
    return optimizer, LambdaLR(optimizer, warmup_and_cosine(settings.warmup_steps, settings.max_steps))


def stand_at(schedule: LambdaLR, step: int) -> None:
    """Let the schedule stand after `step`: its rates follow from the step and `base_lrs` alone."""
    schedule.last_epoch = step
    schedule._step_count = step + 1
    rates = [rate * share(step) for rate, share in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates


def require_finite_loss(loss: float, step: int) -> None:
    """Raise DivergedError where the loss of `step`, or the norm of its gradient, is NaN or Inf."""
    if not math.isfinite(loss):
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
