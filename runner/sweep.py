"""Sweeps: which jobs a command line means, and what they left behind."""

import glob
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from runner.checkpoints.runs import Run, find_run, select, spell, step_in_name
from runner.errors import ConfigError
from runner.overrides import CommandLine, quoted, split_list
from runner.results import FILE_NAME, read_json

# Tasks that go over every checkpoint of a run when no step is named.
OVER_RUNS = ("diagnose", "test")
_GLOB = re.compile(r"[*?\[]")


def expand(line: CommandLine, *, demo_run: Callable[[], Path]) -> CommandLine:
    """The command line with checkpoint globs and `step=all`, lists and ranges written out, in numeric order.

    A run directory without a step means all of its steps (for the tasks in OVER_RUNS). `demo_run()` gives the
    demonstration's run directory. Raises ConfigError for a step that the run does not have, or a glob without match.
    """
    task, ckpt, step = line.get("task") or "diagnose", line.get("ckpt"), line.get("step")
    if ckpt is not None and _GLOB.search(ckpt) and not Path(ckpt).expanduser().exists():
        line = _expand_glob(line, ckpt)
        ckpt = line.get("ckpt")
    if task not in OVER_RUNS:
        return line
    path = None if ckpt is None else Path(ckpt).expanduser()
    if step is None:
        run = find_run(path) if path is not None and path.is_dir() else None
        if run is None or len(run.checkpoints) == 1:
            return line
        return _with_steps(line, run, run.steps)
    if re.fullmatch(r"-?\d+", step) or step == "null":
        return line
    run = find_run(demo_run() if path is None or ckpt == "demo" else path)
    if run is None:
        raise ConfigError(f"step={step} needs a run directory as ckpt=; {ckpt} holds no checkpoint-<step> directories")
    return _with_steps(line, run, steps_of(step, run))


def steps_of(value: str, run: Run) -> list[int]:
    """The steps that `value` names: `all`, `1000,2000`, `[1000,2000]`, `range(1000,5001,1000)`; -1 is the last."""
    if value == "all":
        return run.steps
    match = re.fullmatch(r"range\((.*)\)", value)
    parts = split_list(match[1] if match else value)
    try:
        numbers = [int(part.partition("=")[2] or part) for part in parts]
        numbers = list(range(*numbers)) if match else numbers
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"step={value}: give a number, a list, range(start,stop,step) or all; there are {spell(run.steps)}"
        ) from error
    for number in numbers:
        select(run, number)
    return sorted({run.steps[n] if n < 0 else n for n in numbers})


def _with_steps(line: CommandLine, run: Run, steps: list[int]) -> CommandLine:
    if not steps:
        raise ConfigError(f"no step of {run.path} is named; its steps are {spell(run.steps)}")
    overrides = [(key, value) for key, value in line.overrides if key != "step"]
    flags = line.flags if line.multirun else (*line.flags, "--multirun")
    return replace(line, flags=flags, overrides=(*overrides, ("step", ",".join(map(str, steps)))))


def _expand_glob(line: CommandLine, pattern: str) -> CommandLine:
    """The checkpoints that `pattern` matches, by step; one without -m is taken, several are a sweep."""
    paths = map(Path, glob.glob(str(Path(pattern).expanduser())))  # noqa: PTH207 - the pattern may be absolute
    found = sorted(paths, key=lambda path: (str(path.parent), step_in_name(path.name) or 0, path.name))
    named = [path for path in found if step_in_name(path.name) is not None] or found
    if not named:
        raise ConfigError(f"ckpt={pattern}: no such file or directory, and as a pattern it matches nothing")
    if len(named) > 1 and not line.multirun:
        shown = ", ".join(map(str, named[:8])) + (f", … ({len(named)} in all)" if len(named) > 8 else "")
        raise ConfigError(f"ckpt={pattern}: matches several checkpoints; add -m to go over them, or name one: {shown}")
    overrides = tuple(
        (key, ",".join(quoted(str(path)) for path in named)) if key == "ckpt" else (key, value)
        for key, value in line.overrides
    )
    return replace(line, overrides=overrides)


def collect(directory: Path) -> list[dict[str, Any]]:
    """The results of a sweep's jobs in the order of their numbers; a job without one is `lost`."""
    jobs = sorted(
        (path for path in directory.iterdir() if path.is_dir() and re.match(r"\d+(_|$)", path.name)),
        key=lambda path: int(re.split("_", path.name)[0]),
    )
    rows = []
    for job in jobs:
        try:
            row = read_json(job / FILE_NAME)
        except (OSError, ValueError):
            row = {"status": "lost", "error": {"type": "lost", "message": f"{job} holds no result"}}
        rows.append({"job": job.name, **row})
    return rows
