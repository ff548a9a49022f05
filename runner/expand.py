"""Which jobs a command line means: checkpoint globs, steps and lists written out, or those of an earlier sweep."""

import glob
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from runner.checkpoints.runs import Run, find_run, select, spell, step_in_name
from runner.config import PATH_KEYS, TEXT_KEYS, is_sweep
from runner.errors import ConfigError
from runner.overrides import LIST_KEYS, CommandLine, parse, quoted, split_list, unquoted

if TYPE_CHECKING:
    from runner.sweeps.plan import SweepPlan

# Tasks that go over every checkpoint of a run when no step is named.
OVER_RUNS = ("diagnose", "test")
# What may be another when a sweep goes on: how its jobs run, not what they are.
_FREE = ("hydra/launcher", "hydra.launcher", "hydra.sweeper")
_GLOB = re.compile(r"[*?\[]")


# Presets that compare several checkpoints, and say nothing of one.
_COMPARING = ("compare_runs", "merged_against_separate")
_STEPS = re.compile(r".*,.*|(range|every)\(.*\)|all")


def as_sweep(line: CommandLine) -> CommandLine:
    """`line` with -m where it gives a key several values: what is listed is a sweep, with -m and without.

    A text holds commas of its own, and a path may: `ckpt=A,B` is a list where A and B are there, and `A,B` is not.
    `step=last` is -1.
    """
    given = [
        (key, re.sub(r"\blast\b", "-1", value) if key == "step" and value else value) for key, value in line.overrides
    ]
    line = replace(line, overrides=tuple(given))
    return replace(line, flags=_sweeping(line)) if any(_lists(key, value) for key, value in given) else line


def _lists(key: str, value: str | None) -> bool:
    known = key.lstrip("+")
    if (
        value is None
        or known in TEXT_KEYS
        or known in LIST_KEYS
        or known.startswith("hydra")
        or not _STEPS.fullmatch(value)
    ):
        return False
    if value.startswith("["):  # one value that is a list, as merge.sources
        return known == "step"
    if known in PATH_KEYS:
        parts = [Path(unquoted(part)).expanduser() for part in split_list(value)]
        whole = Path(unquoted(value)).expanduser()
        return len(parts) > 1 and not whole.exists() and all(str(part) == "demo" or part.exists() for part in parts)
    return known == "step" or is_sweep(f"{key}={value}")


def with_demo_base(line: CommandLine, demo_run: Callable[[], Path]) -> CommandLine:
    """`line` with the demonstration's base for `base=demo`, unless there is a directory of that name."""
    if line.get("base") != "demo" or Path("demo").exists():
        return line
    own = str(demo_run() / "base")
    return replace(line, overrides=tuple((key, own if key == "base" else value) for key, value in line.overrides))


def check_preset(line: CommandLine) -> None:
    """Raise ConfigError for a preset that compares checkpoints where only one is given."""
    given = [value for key, value in line.overrides if key == "ckpt"]
    if (name := line.get("experiment")) in _COMPARING and len(split_list((given or ["demo"])[-1] or "")) < 2:
        raise ConfigError(f"experiment={name} compares several checkpoints: give them as ckpt=A,B")


def expand(line: CommandLine, *, demo_run: Callable[[], Path]) -> CommandLine:
    """The command line with checkpoint globs and `step=all`, lists and ranges written out, in numeric order.

    A run directory without a step means all of its steps (for the tasks in OVER_RUNS; the others go over steps with -m
    only). `demo_run()` gives the demonstration's run directory. Raises ConfigError for a step that the run does not
    have, and for a glob without match.
    """
    task, ckpt, step = line.get("task") or "diagnose", line.get("ckpt"), line.get("step")
    if ckpt is not None and _GLOB.search(ckpt) and not Path(ckpt).expanduser().exists():
        line = _expand_glob(line, ckpt)
        ckpt = line.get("ckpt")
    if task not in OVER_RUNS and (step is None or ckpt is None or not line.multirun):
        return line
    if step == "null" or (step is not None and re.fullmatch(r"-?\d+", step) and not line.multirun):
        return line
    if runs := _several_runs(line):
        return _expand_runs(line, [demo_run() if step and str(path) == "demo" else path for path in runs], step)
    path = None if ckpt is None else Path(ckpt).expanduser()
    if step is None:
        run = find_run(path) if path is not None and path.is_dir() else None
        if run is None and task == "test" and path is not None:
            from runner.checkpoints.detect import several

            if inside := several(path):
                return _with_checkpoints(line, inside)
        if run is None or len(run.checkpoints) == 1:
            return line
        return _with_steps(line, run, "all")
    run = find_run(demo_run() if path is None or ckpt == "demo" else path)
    if run is None:
        raise ConfigError(_no_run(step, ckpt))
    return _with_steps(line, run, step)


def steps_of(value: str, run: Run) -> list[int]:
    """The steps that `value` names: `all`, `1000,2000`, `[1000,2000]`; -1 is the last.

    `range(1000,5001)`: those from 1000 on, under 5001, that there are; with an interval, `range(1000,5001,1000)`, each
    of them. `every(5000)`: the multiples of 5000 that there are, and the last step.
    """
    if value == "all":
        return run.steps
    if every := re.fullmatch(r"every\(\s*(\d+)\s*\)", value):
        interval = int(every[1])
        if not interval:
            raise ConfigError(f"step={value}: give the number of steps from one to the next, at least 1")
        return [step for step in run.steps if step % interval == 0 or step == run.steps[-1]]
    match = re.fullmatch(r"range\((.*)\)", value)
    parts = split_list(match[1] if match else value)
    try:
        numbers = [int(part.partition("=")[2] or part) for part in parts]
        if match:
            given = range(*numbers)
            numbers = [step for step in run.steps if step in given] if len(numbers) == 2 else list(given)
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"step={value}: give a number, a list, range(start,stop,step), every(N) or all; "
            f"there are {spell(run.steps)}"
        ) from error
    for number in numbers:
        select(run, number)
    return sorted({run.steps[n] if n < 0 else n for n in numbers})


def _several_runs(line: CommandLine) -> list[Path]:
    """The paths of `ckpt=A,B`; none where it names one path, which may hold commas itself."""
    given = [value for key, value in line.overrides if key == "ckpt"]
    if not given or given[-1] is None or not line.multirun or Path(unquoted(given[-1])).expanduser().exists():
        return []
    parts = [Path(unquoted(part)).expanduser() for part in split_list(given[-1])]
    return parts if len(parts) > 1 else []


def _expand_runs(line: CommandLine, paths: Sequence[Path], step: str | None) -> CommandLine:
    """Several runs, each with those of its own steps that `step` names, as a list of checkpoints.

    Without a step all of them, and what is no run stays as it is.
    """
    found: list[Path] = []
    for path in paths:
        run = find_run(path)
        if run is None and step is not None:
            raise ConfigError(_no_run(step, str(path)))
        found += [path] if run is None else _chosen(run, step or "all")
    return line if found == list(paths) else _with_checkpoints(line, found)


def _no_run(step: str, ckpt: str | None) -> str:
    if ckpt is not None and not Path(ckpt).expanduser().exists():
        return f"ckpt={ckpt}: no such file or directory"
    return f"step={step} needs a run directory as ckpt=; {ckpt} holds no checkpoint-<step> directories"


def _chosen(run: Run, step: str) -> list[Path]:
    """The checkpoints of `run` that `step` names; `all` means each file of a step that has several."""
    if step == "all":
        return [path for _, path in run.checkpoints]
    return [select(run, number) for number in steps_of(step, run)]


def _with_checkpoints(line: CommandLine, paths: Sequence[Path]) -> CommandLine:
    spelled = ",".join(quoted(str(path)) for path in paths)
    kept = [(key, spelled if key == "ckpt" else value) for key, value in line.overrides if key != "step"]
    return replace(line, flags=_sweeping(line), overrides=tuple(kept))


def _with_steps(line: CommandLine, run: Run, step: str) -> CommandLine:
    steps = steps_of(step, run)
    if not steps:
        raise ConfigError(f"step={step}: no step of {run.path} is named; its steps are {spell(run.steps)}")
    if step == "all" and len(run.checkpoints) > len(steps) and line.get("ckpt") not in (None, "demo"):
        return _with_checkpoints(line, _chosen(run, step))
    for number in steps:
        select(run, number)
    overrides = [(key, value) for key, value in line.overrides if key != "step"]
    return replace(line, flags=_sweeping(line), overrides=(*overrides, ("step", ",".join(map(str, steps)))))


def _sweeping(line: CommandLine) -> tuple[str, ...]:
    return line.flags if line.multirun else (*line.flags, "--multirun")


def _matches(pattern: str) -> list[Path]:
    """What `pattern` matches, by step; where some of it has the name of a checkpoint, only that.

    Directories that are there under the very name that was typed are no patterns: a name may hold brackets.
    """
    path = Path(unquoted(pattern)).expanduser()
    there = next((parent for parent in path.parents if parent.exists()), Path())
    paths = map(Path, glob.glob(str(Path(glob.escape(str(there))) / path.relative_to(there))))  # noqa: PTH207 - it may be absolute
    found = sorted(paths, key=lambda path: (str(path.parent), step_in_name(path.name) or 0, path.name))
    return [path for path in found if step_in_name(path.name) is not None] or found


def _named(part: str) -> list[Path]:
    """One part of a list: a path, or what it matches as a pattern."""
    path = Path(unquoted(part)).expanduser()
    return _matches(part) if _GLOB.search(part) and not path.exists() else [path]


def _expand_glob(line: CommandLine, pattern: str) -> CommandLine:
    """The checkpoints that `pattern` matches, by step; one without -m is taken, several are a sweep."""
    named = _matches(pattern)
    if not named and line.multirun:  # a list, some of it patterns
        typed = [value for key, value in line.overrides if key == "ckpt"][-1] or ""
        each = list(map(_named, split_list(typed)))
        named = [path for paths in each for path in paths] if all(each) else []
    if not named:
        raise ConfigError(f"ckpt={pattern}: no such file or directory, and as a pattern it matches nothing")
    if len(named) > 1 and not line.multirun:
        shown = ", ".join(map(str, named[:8])) + (f", … ({len(named)} in all)" if len(named) > 8 else "")
        raise ConfigError(f"ckpt={pattern}: matches several checkpoints; add -m to go over them, or name one: {shown}")
    spelled = ",".join(quoted(str(path)) for path in named)
    overrides = tuple((key, spelled if key == "ckpt" else value) for key, value in line.overrides)
    return replace(line, overrides=overrides)


def resume(line: CommandLine) -> tuple[CommandLine, "SweepPlan"]:
    """The command line of the sweep that `line` names with resume=, and its plan.

    Launchers may be given anew. Raises ConfigError for a directory that is no sweep, and for an option that differs
    from what the sweep was started with.
    """
    from runner.sweeps.plan import read_plan

    directory = Path(line.get("resume") or "").expanduser()
    if not line.multirun:
        raise ConfigError(f"resume={directory} goes on with a sweep: add -m")
    plan = read_plan(directory)
    before = parse(plan.command)
    given = [(key, value) for key, value in line.overrides if key != "resume"]
    for key, value in given:
        if not _is_free(key) and (key, value) not in before.overrides:
            then = before.get(key)
            was = f"the sweep was started with {key}={then}" if then is not None else "the sweep was started without it"
            raise ConfigError(f"resume={directory}: {key}={value} does not fit: {was}; leave it out")
    if str(Path.cwd()) != plan.cwd:
        raise ConfigError(f"resume={directory}: that sweep was started in {plan.cwd}; go there first")
    anew = {key for key, _ in given if _is_free(key)}
    if "hydra/launcher" in anew:
        anew |= {key for key, _ in before.overrides if key.startswith("hydra.launcher.")}
    kept = [(key, value) for key, value in before.overrides if key not in anew and key != "hydra.sweep.dir"]
    added = [(key, value) for key, value in given if _is_free(key)]
    target = [("hydra.sweep.dir", str(directory.absolute()))]
    return replace(before, overrides=(*kept, *added, *target)), plan


def _is_free(key: str) -> bool:
    return any(key.lstrip("+~") == name or key.lstrip("+~").startswith(f"{name}.") for name in _FREE)
