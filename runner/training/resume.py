"""To go on from a saved optimizer and schedule, whose values come out of a file and are checked one by one."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch.optim.lr_scheduler import LambdaLR

from runner.errors import CheckpointError, ConfigError, ModelError
from runner.training.optimization import TrainingSettings

_LARGEST = 1 << 53  # of the whole numbers, those up to which a float counts one by one


def require_state(path: Path, missing: Sequence[str]) -> None:
    """Raise CheckpointError where the checkpoint at `path` lacks what a training goes on from."""
    if missing:
        raise CheckpointError(f"{path}: has no {' and no '.join(missing)} to go on from; start a new training instead")


def require_steps_left(path: Path, step: int, settings: TrainingSettings) -> None:
    """Raise ConfigError where the checkpoint at `path` is at the last step already."""
    if step >= settings.max_steps:
        raise ConfigError(f"train.resume_from={path}: is at step {step} already; give a larger train.max_steps")


def load_optimizer(optimizer: torch.optim.Optimizer, state: object) -> None:
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


def load_schedule(schedule: LambdaLR, state: object) -> None:
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


def is_step(value: object) -> bool:
    """Whether a value out of a file can be a number of steps."""
    return type(value) is int and 0 <= value < _LARGEST


def _indices(found: object, own: Sequence[int]) -> bool:
    return isinstance(found, (list, tuple)) and list(found) == list(own)


def _is_entry(entry: object, parameter: torch.Tensor) -> bool:
    if not isinstance(entry, Mapping) or not {"step", "exp_avg", "exp_avg_sq"} <= set(entry):
        return False
    step = entry["step"]
    step = step.item() if isinstance(step, torch.Tensor) and step.numel() == 1 else step
    moments = [value for name, value in entry.items() if name != "step"]
    return _alike(step, 0.0) and all(
        isinstance(value, torch.Tensor) and value.shape == parameter.shape and value.is_floating_point()
        for value in moments
    )


def _alike(found: object, own: object) -> bool:
    """Whether a value out of a file is of the kind of our own."""
    if own is None or isinstance(own, bool):
        return found is None or isinstance(found, bool)
    if isinstance(own, (int, float)):
        is_number = isinstance(found, (int, float)) and not isinstance(found, bool)
        return is_number and abs(found) < _LARGEST and math.isfinite(found)  # type: ignore[arg-type]
    if isinstance(own, (list, tuple)):
        return isinstance(found, (list, tuple)) and len(found) == len(own) and all(map(_alike, found, own))
    return type(found) is type(own)
