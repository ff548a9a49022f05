"""The command line with -m, from its first job to its exit code: the sweep, its comparison, what the tracker keeps."""

import gc
import shlex
import sys
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console

from runner.comparison.comparison import Comparison, read
from runner.errors import printable
from runner.overrides import CommandLine
from runner.reports.compare import print_comparison, write_files
from runner.run import hand_to_hydra, sweep_job, tracker_of
from runner.sweeps.plan import SweepPlan
from runner.sweeps.sweeper import Sweep, register
from runner.tracking.base import Tracker
from runner.tracking.compare import log_comparison
from runner.tracking.panels import HOW_TO_INSTALL, installed


def run_sweep(line: CommandLine, resumed: SweepPlan | None) -> int:
    """Run a sweep, then compare what its jobs left; the exit code. Ctrl-C says what is kept and how to go on."""
    sweep = Sweep(line=line, resumed=resumed)
    register(sweep)
    try:
        hand_to_hydra(line, sweep_job)
    except KeyboardInterrupt:
        if sweep.directory is None:
            raise
        good, count = sweep.finished()
        print(f"runner: interrupted: {good} of {count} jobs are finished and kept", file=sys.stderr)
        if good:
            conclude(sweep.directory)
        print(f"runner: the others: {_resuming(sweep.directory)}", file=sys.stderr)
        return 130
    if sweep.directory is None or sweep.config is None:  # Hydra had only to show something
        return 0
    gc.freeze()  # the collector need not go through what the jobs imported while the comparison imports its own
    comparison = conclude(sweep.directory)
    record(comparison, sweep.directory, sweep.config)
    if not comparison.failures:
        return 3 if any(job.passed is False for job in comparison.jobs) else 0
    print(f"runner: what has no result: {_resuming(sweep.directory)}", file=sys.stderr)
    return 3


def _resuming(directory: Path) -> str:
    """The command that goes on with a sweep, to be pasted into a shell."""
    return f"python -m runner -m {shlex.quote(f'resume={directory}')}"


def conclude(directory: Path) -> Comparison:
    """What a sweep ends with: its jobs compared, the files beside them, the curve on the terminal.

    A file that cannot be written is a warning: what the jobs left is there. Raises ConfigError where no job was begun.
    """
    comparison = read(directory)
    print_comparison(comparison, write_files(comparison, directory), Console())
    return comparison


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
            _write_panels(comparison, tracker, directory)
    except Exception as error:  # also of a library that is not ours
        warnings.append(f"W&B: the comparison is not all there ({type(error).__name__}: {error})")
    for warning in warnings:
        print(f"runner: warning: {printable(warning)}", file=sys.stderr)


def _write_panels(comparison: Comparison, tracker: Tracker, directory: Path) -> None:
    if not installed():
        print(f"Panels: none; {HOW_TO_INSTALL} adds them")
        return
    from runner.tracking.panels import FILE_NAME, write_panels

    written = write_panels(comparison, tracker, directory / FILE_NAME)
    print(f"Panels: {printable(written['view']['url'] if 'view' in written else directory / FILE_NAME)}")
