"""What every training on top of a frozen base shares: optimizer and schedule, and how it ends where it diverges."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_cosine_schedule_with_warmup

from runner.errors import DivergedError, ModelError
from runner.files.tensors import is_finite

DIVERGED = "give a smaller train.learning_rate or train.gradient_clip_value"

_LARGEST = 1 << 53  # of the whole numbers, those up to which a float counts one by one


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


def load_optimizer(optimizer: torch.optim.Optimizer, state: Any) -> None:
    """Go on with an AdamW's saved `state`. Raises ModelError unless it is one over parameters of the same shapes."""
    own = optimizer.state_dict()["param_groups"]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    groups = state.get("param_groups") if isinstance(state, Mapping) else None
    entries = state.get("state") if isinstance(state, Mapping) else None
    if not isinstance(entries, Mapping) or not isinstance(groups, (list, tuple)) or len(groups) != len(own):
        raise ModelError(f"the optimizer's state needs `state` and {len(own)} group(s) of parameters")
    for group, expected in zip(groups, own, strict=True):
        for name, value in expected.items():
            settled = isinstance(value, (float, tuple, list))  # what torch has no default for
            found = group.get(name, None if settled else value) if isinstance(group, Mapping) else None
            if not (_alike(found, value) if name != "params" else _indices(found, value)):
                raise ModelError(
                    f"the optimizer's state has a group whose {name} is not of the kind that this training has"
                )
    for index, parameter in enumerate(parameters):
        if index in entries and not _is_entry(entries[index], parameter):
            raise ModelError(f"the optimizer's state does not fit: entry {index} is not of its parameter's shape")
    if not set(entries) <= set(range(len(parameters))):
        raise ModelError(f"the optimizer's state is not for {len(parameters)} parameters")
    optimizer.load_state_dict({"state": dict(entries), "param_groups": [dict(group) for group in groups]})


def load_schedule(schedule: LambdaLR, state: Any) -> None:
    """Go on with a schedule's saved `state`. Raises ModelError unless it is one of as many rates."""
    own = schedule.state_dict()
    if not isinstance(state, Mapping) or type(state.get("last_epoch")) is not int:
        raise ModelError("the scheduler's state has no last_epoch")
    # What another version of torch does not write stays as it is here, and what it writes beside is not needed.
    found = {name: state.get(name, value) for name, value in own.items()}
    for name, value in own.items():
        if not _alike(found[name], value):
            raise ModelError(f"the scheduler's state has a {name} that is not of the kind that this training has")
    schedule.load_state_dict(found)


def is_step(value: Any) -> bool:
    """Whether a value out of a file can be a number of steps."""
    return type(value) is int and 0 <= value < _LARGEST


def _indices(found: Any, own: Sequence[int]) -> bool:
    return isinstance(found, (list, tuple)) and list(found) == list(own)


def _is_entry(entry: Any, parameter: torch.Tensor) -> bool:
    if not isinstance(entry, Mapping) or not {"step", "exp_avg", "exp_avg_sq"} <= set(entry):
        return False
    step = entry["step"]
    step = step.item() if isinstance(step, torch.Tensor) and step.numel() == 1 else step
    moments = [value for name, value in entry.items() if name != "step"]
    return _alike(step, 0.0) and all(
        isinstance(value, torch.Tensor) and value.shape == parameter.shape and value.is_floating_point()
        for value in moments
    )


def _alike(found: Any, own: Any) -> bool:
    """Whether a value out of a file is of the kind of our own."""
    if own is None or isinstance(own, bool):
        return found is None or isinstance(found, bool)
    if isinstance(own, (int, float)):
        number = isinstance(found, (int, float)) and not isinstance(found, bool)
        return number and abs(found) < _LARGEST and math.isfinite(found)
    if isinstance(own, (list, tuple)):
        return isinstance(found, (list, tuple)) and len(found) == len(own) and all(map(_alike, found, own))
    return type(found) is type(own)
