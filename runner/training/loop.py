"""What a training is given, how it takes its steps, and what it leaves."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.optim.lr_scheduler import LambdaLR

from runner.config import TrainingSettings
from runner.errors import DivergedError
from runner.evaluation.base_models import Base
from runner.training.optimization import require_finite_loss

OnStep = Callable[[int, Mapping[str, float]], None]
# A row for the tracker every so many steps, and at the last.
LOG_EVERY = 10


@dataclass(frozen=True, kw_only=True)
class TrainingInputs:
    """What a training over `base` starts from, and who hears of it.

    Checkpoints go to `directory`/checkpoint-<step> and name their base `base_name`: a hub name, or a path that holds
    from the checkpoint. `texts`: token ids of the documents, by what they are about; `seed` orders them.
    `resume_from`: the checkpoint to go on from. `on_step` is called with the figures of each step, `on_log` with those
    of each row of the log.
    """

    directory: Path
    base: Base
    base_name: str
    texts: Mapping[str, Sequence[Sequence[int]]]
    settings: TrainingSettings
    seed: int
    resume_from: Path | None
    on_step: OnStep
    on_log: OnStep


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a training left: checkpoints of `format`, the figures of the last step, what the reader should know."""

    format: str
    checkpoints: list[Path]
    figures: dict[str, float]
    findings: list[str] = field(default_factory=list)

    def details(self) -> dict[str, object]:
        """What belongs into the result beside these."""
        return {}


def is_logged(step: int, settings: TrainingSettings) -> bool:
    """Whether a row of the log is written after `step`."""
    return step % LOG_EVERY == 0 or step == settings.max_steps


def take_steps(
    steps: Iterable[int],
    parameters: Sequence[torch.Tensor],
    optimizers: Sequence[tuple[torch.optim.Optimizer, LambdaLR]],
    losses: Callable[[int], Mapping[str, torch.Tensor]],
    *,
    clip: float,
) -> Iterator[tuple[int, dict[str, float]]]:
    """Take `steps` one after the other; → each with its figures, those of `losses(step)` and the gradient's norm.

    What is minimised is `losses(step)["loss"]`; gradients are clipped to the norm `clip` over all of `parameters`.
    Raises DivergedError where the norm, and so the loss, is NaN or Inf.
    """
    for step in steps:
        found = losses(step)
        for optimizer, _ in optimizers:
            optimizer.zero_grad(set_to_none=True)
        found["loss"].backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
        require_finite_loss(norm, step)
        for optimizer, schedule in optimizers:
            optimizer.step()
            schedule.step()
        yield step, {**{name: loss.item() for name, loss in found.items()}, "gradient_norm": norm.item()}


@contextmanager
def naming_the_last(written: Sequence[Path], resume_from: Path | None) -> Iterator[None]:
    """Within the block a DivergedError also says which checkpoint is left to go on from."""
    try:
        yield
    except DivergedError as error:
        last = written[-1] if written else resume_from
        left = "no checkpoint was written" if last is None else f"the last good checkpoint is {last}"
        raise DivergedError(f"{error}; {left}") from error
