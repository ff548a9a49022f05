"""Run directories: several checkpoints of one training run, ordered by the step in their names."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from runner.errors import CheckpointError, ConfigError

_NAMES = (
    re.compile(r"checkpoint-(?P<step>\d+)"),
    re.compile(r"state_step(?P<step>\d+)\.pt"),
    re.compile(r"best_state_step(?P<step>\d+)_val.*\.pt"),
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run directory: `checkpoints` as (step, path) by step; `ignored`, the entries that are no checkpoint."""

    path: Path
    checkpoints: tuple[tuple[int, Path], ...]
    ignored: tuple[str, ...]

    @property
    def steps(self) -> list[int]:
        """The steps, ascending, each once."""
        return sorted({step for step, _ in self.checkpoints})


def step_in_name(name: str) -> int | None:
    """The step in a checkpoint's name, or None where the name is no checkpoint's."""
    for pattern in _NAMES:
        if match := pattern.fullmatch(name):
            return int(match["step"])
    return None


def find_run(path: Path) -> Run | None:
    """The run at `path`, or None where it is no directory that holds named checkpoints."""
    if not path.is_dir():
        return None
    try:
        names = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be listed: {error.strerror}") from error
    steps = {name: step_in_name(name) for name in names}
    checkpoints = sorted((step, path / name) for name, step in steps.items() if step is not None)
    if not checkpoints:
        return None
    return Run(
        path=path,
        checkpoints=tuple(checkpoints),
        ignored=tuple(name for name, step in steps.items() if step is None),
    )


def select(run: Run, step: int) -> Path:
    """The checkpoint of `step`; a negative one counts from the end. Raises ConfigError with the steps there are."""
    steps = run.steps
    if step < 0 and -step <= len(steps):
        step = steps[step]
    paths = [path for number, path in run.checkpoints if number == step]
    if not paths:
        raise ConfigError(f"{run.path} has no step {step}; its steps are {spell(steps)}")
    if len(paths) > 1:
        raise ConfigError(f"{run.path} has several files of step {step}: {', '.join(p.name for p in paths)}; name one")
    return paths[0]


def spell(steps: Sequence[int]) -> str:
    """The steps for a message: all of them, or the ends of a long list."""
    shown = [str(step) for step in steps]
    return ", ".join(shown if len(shown) <= 24 else [*shown[:12], f"… ({len(shown)} in all) …", *shown[-6:]])


def resolve(path: Path, step: int | None = None, *, by_step: bool = True) -> Path:
    """The one checkpoint that `path` and `step` name.

    A run needs a step unless it holds one checkpoint only; a checkpoint takes none. `by_step`: whether the user can
    give one; else the path has to name the checkpoint. Raises ConfigError.
    """
    run = find_run(path)
    if run is None:
        if step is not None:
            raise ConfigError(f"{path} is no run directory (no checkpoint-<step> in it), so step={step} has no meaning")
        return path
    if step is not None:
        return select(run, step)
    if len(run.checkpoints) == 1:
        return run.checkpoints[0][1]
    what = f"{path} is a run of {len(run.checkpoints)} checkpoints"
    if by_step:
        raise ConfigError(f"{what}; choose step= from {spell(run.steps)}")
    raise ConfigError(f"{what}; name one of them, as {run.checkpoints[-1][1]}")
