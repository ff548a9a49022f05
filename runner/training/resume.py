"""To go on from a checkpoint: with its optimizer and schedule, whose values are checked, and the same recipe or not."""

import hashlib
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.optim.lr_scheduler import LambdaLR

from runner.errors import CheckpointError, ConfigError, ModelError
from runner.files import manifest
from runner.training.settings import TrainingSettings

if TYPE_CHECKING:
    from runner.training.loop import Source

# What the state of the optimizer and its schedule says again, whatever the settings say.
RESTORED = ("learning_rate", "weight_decay")
_LARGEST = 1 << 53  # of the whole numbers, those up to which a float counts one by one


def require_state(path: Path, missing: Sequence[str]) -> None:
    """Raise CheckpointError where the checkpoint at `path` lacks what a training goes on from."""
    if missing:
        raise CheckpointError(f"{path}: has no {' and no '.join(missing)} to go on from; start a new training instead")


def require_steps_left(path: Path, step: int, settings: TrainingSettings) -> None:
    """Raise ConfigError where the checkpoint at `path` is at the last step already."""
    if step >= settings.max_steps:
        raise ConfigError(f"train.resume_from={path}: is at step {step} already; give a larger train.max_steps")


def recipe(settings: TrainingSettings, rows: Sequence[Sequence[int]], base_name: str) -> dict[str, object]:
    """Settings, base, and the SHA-256 of the rows of token ids in their order, as values of JSON."""
    text = json.dumps([list(row) for row in rows], separators=(",", ":"))
    data = hashlib.sha256(text.encode()).hexdigest()
    values = {"task": "train", "family": settings.family, "base": base_name, "data_sha256": data, **settings.values()}
    plain: dict[str, object] = json.loads(json.dumps(values))
    return plain


def recipe_of(checkpoint: Path) -> Mapping[str, object] | None:
    """The recipe in a checkpoint's manifest, or None. Raises CheckpointError for a damaged manifest."""
    if not (checkpoint / manifest.FILE_NAME).is_file():
        return None
    found = manifest.read(checkpoint).get("recipe")
    return found if isinstance(found, Mapping) else None


def differences(
    checkpoint: Path, now: Mapping[str, object], harmless: Collection[str], restored: Collection[str] = RESTORED
) -> list[str]:
    """In what a training with the recipe `now` that goes on from `checkpoint` is not the one that wrote it.

    One line a difference; what is `harmless` changes no weight, what is `restored` stays as the optimizer's state has
    it. Empty where it continues that training bit for bit. What an older recipe does not name is no difference.
    Raises CheckpointError for a damaged manifest.
    """
    before = recipe_of(checkpoint)
    if before is None and (checkpoint / manifest.FILE_NAME).is_file():
        return [f"{checkpoint / manifest.FILE_NAME} has no recipe: what it was trained with is not known"]
    if before is None:
        return [f"{checkpoint} has no {manifest.FILE_NAME}: what it was trained with is not known"]
    changed = [name for name in now if name in before and now[name] != before[name] and name not in harmless]
    return [_difference(name, before[name], now[name], restored) for name in changed]


def _difference(name: str, before: object, now: object, restored: Collection[str]) -> str:
    if name == "data_sha256":
        return "goes on with other data than the checkpoint's: not what one uninterrupted training would have given"
    if name in restored:
        return f"{name} stays {before}, as the checkpoint's optimizer has it, and is not {now}"
    return f"goes on with {name} {now} after {before}: not what one uninterrupted training would have given"


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


S = TypeVar("S", bound=TrainingSettings)
P = TypeVar("P", bound="Source[Any]")


def as_before(
    settings: S, saved: Mapping[str, object], given: Collection[str] | None, path: Path
) -> tuple[S, list[str]]:
    """The settings to go on with from the checkpoint at `path`, and what of them is another than before.

    What was not `given` on the command line is as `saved`; None: all of `settings` counts as given. Raises ConfigError
    where what was saved cannot be gone on with.
    """
    known = {each.name for each in fields(settings)} - {*settings.unrecorded}
    kept: dict[str, Any] = {}
    said = []
    for name in (each for each in saved if each in known):
        before, now = saved[name], getattr(settings, name)
        before = tuple(before) if isinstance(before, list) else before
        if before == now:
            continue
        if given is None or name in given:
            said.append(f"goes on with {name} {_shown(now)} after {_shown(before)}")
        else:
            kept[name] = before
    try:
        settings = replace(settings, **kept)
        settings.check_schedule()
        return settings, said
    except ConfigError as error:
        raise ConfigError(f"{error} (what is not given is as {path} has it)") from error


def _shown(value: object) -> str:
    return f"[{','.join(map(str, value))}]" if isinstance(value, tuple) else str(value)


def taken_up(make: Callable[[], P], state: object) -> tuple[P, str | None]:
    """A source of batches that stands where `state`, out of a checkpoint, says; or at its start, and why."""
    source = make()
    if not isinstance(state, Mapping):
        return source, None if state is None else "the checkpoint does not say where they were"
    try:
        source.restore(state)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        return make(), str(error) or type(error).__name__
    return source, None
