"""The optimizer and schedule of every training on top of a frozen base."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_cosine_schedule_with_warmup


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
