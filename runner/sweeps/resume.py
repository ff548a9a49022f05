"""`-m resume=SWEEP_DIR`: the command line that finishes a sweep in its own directory.

What a sweep leaves in its tracker when its jobs are done: the run that draws the curves, and the panels.
"""

import sys
from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig

from runner.comparison.comparison import Comparison
from runner.errors import ConfigError, printable
from runner.overrides import CommandLine, parse
from runner.run import tracker_of
from runner.sweeps.plan import Plan, read_plan
from runner.tracking.base import Tracker
from runner.tracking.compare import log_comparison
from runner.tracking.panels import HOW_TO_INSTALL, installed

# What may be another the second time: how the jobs run, not what they are.
_FREE = ("hydra/launcher", "hydra.launcher", "hydra.sweeper")


def resume(line: CommandLine) -> tuple[CommandLine, Plan]:
    """The command line of the sweep that `line` names with resume=, and its plan.

    Launchers may be given anew. Raises ConfigError for a directory that is no sweep, and for an option that differs
    from what the sweep was started with.
    """
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


def record(comparison: Comparison, directory: Path, config: DictConfig) -> None:
    """Log `comparison` with the tracker of the sweep's composed `config`, and say where it went.

    The sweep's own files are written by then. Whatever goes wrong is a warning: it costs no job.
    """
    warnings: list[str] = []
    try:
        tracker = tracker_of(config)
        warnings = tracker.warnings
        log_comparison(comparison, tracker)
        if tracker.location:
            print(f"W&B: {printable(tracker.location)}")
            _keep_panels(comparison, tracker, directory)
    except Exception as error:  # also of a library that is not ours
        warnings.append(f"W&B: the comparison is not all there ({type(error).__name__}: {error})")
    for warning in warnings:
        print(f"runner: warning: {printable(warning)}", file=sys.stderr)


def _keep_panels(comparison: Comparison, tracker: Tracker, directory: Path) -> None:
    if not installed():
        print(f"Panels: none; {HOW_TO_INSTALL} adds them")
        return
    from runner.tracking.panels import FILE_NAME, keep

    kept = keep(comparison, tracker, directory / FILE_NAME)
    print(f"Panels: {printable(kept['view']['url'] if 'view' in kept else directory / FILE_NAME)}")
