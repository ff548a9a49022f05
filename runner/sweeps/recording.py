"""What a sweep leaves in its tracker when its jobs are done: the run that draws the curves, and the panels."""

import sys
from pathlib import Path

from omegaconf import DictConfig

from runner.comparison.comparison import Comparison
from runner.errors import printable
from runner.run import tracker_of
from runner.tracking.base import Tracker
from runner.tracking.compare import log_comparison
from runner.tracking.panels import HOW_TO_INSTALL, installed


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
    from runner.tracking.panels_file import FILE_NAME, keep

    kept = keep(comparison, tracker, directory / FILE_NAME)
    print(f"Panels: {printable(kept['view']['url'] if 'view' in kept else directory / FILE_NAME)}")
