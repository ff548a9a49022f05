"""What every training on top of a frozen base shares: optimizer and schedule, and how it ends where it diverges."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_cosine_schedule_with_warmup

from runner.errors import DivergedError
from runner.files.tensors import is_finite

DIVERGED = "give a smaller train.learning_rate or train.gradient_clip_value"


class Rates(Protocol):
    """The settings that this reads; steps are optimizer steps."""

    @property
    def learning_rate(self) -> float: ...  # noqa: D102
    @property
    def weight_decay(self) -> float: ...  # noqa: D102
    @property
    def warmup_steps(self) -> int: ...  # noqa: D102
    @property
    def max_steps(self) -> int: ...  # noqa: D102


def optimizer_and_schedule(
    parameters: Sequence[torch.Tensor], settings: Rates, device: torch.device
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


def require_finite(parameters: Iterable[torch.Tensor], step: int) -> None:
    """Raise DivergedError where a weight is NaN or Inf after `step`."""
    if not all(map(is_finite, parameters)):
        raise DivergedError(f"NaN or Inf in the weights after step {step}, not saved: {DIVERGED}")


@contextmanager
def naming_the_last(written: Sequence[Path], resume_from: Path | None) -> Iterator[None]:
    """Within the block a DivergedError also says which checkpoint is left to go on from."""
    try:
        yield
    except DivergedError as error:
        last = written[-1] if written else resume_from
        left = "no checkpoint was written" if last is None else f"the last good checkpoint is {last}"
        raise DivergedError(f"{error}; {left}") from error
