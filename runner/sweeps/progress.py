"""What is shown while a sweep runs: a line for each job as it ends, and in a terminal how far the whole has come."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from runner.errors import printable
from runner.files.atomic import read_json
from runner.reports.console import print_line
from runner.results import FILE_NAME
from runner.sweeps.plan import Job, Plan, good_result

_INTERVAL = 0.25  # seconds between two looks at the jobs' directories


@contextmanager
def watched(plan: Plan, directory: Path) -> Iterator[None]:
    """Within the block, report each job of `plan` whose result arrives in `directory`, whichever process wrote it."""
    out = Console()
    console = out if out.is_terminal else Console(stderr=True)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(),
    )  # fmt: skip
    before = {job.number: _written(directory / job.directory) for job in plan.jobs}
    done = sum(good_result(directory / job.directory) is not None for job in plan.jobs)
    stop = threading.Event()
    with Progress(
        *columns, console=console, transient=True, refresh_per_second=2, disable=not console.is_terminal
    ) as progress:
        bar = progress.add_task("sweep", total=len(plan.jobs), completed=done)

        def look(waiting: list[Job]) -> list[Job]:
            still = []
            for job in waiting:
                if _written(directory / job.directory) == before[job.number] or not _report(job, directory, out):
                    still.append(job)
                else:
                    progress.advance(bar)
            return still

        def watch() -> None:
            waiting = [job for job in plan.jobs if good_result(directory / job.directory) is None]
            while not stop.wait(_INTERVAL):
                waiting = look(waiting)
            look(waiting)

        thread = threading.Thread(target=watch, name="sweep-watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def _written(directory: Path) -> int | None:
    """When the job's result was written, in nanoseconds; None where there is none."""
    try:
        return (directory / FILE_NAME).stat().st_mtime_ns
    except OSError:
        return None


def _report(job: Job, directory: Path, console: Console) -> bool:
    """Print one job's result; False where it cannot be read (again)."""
    try:
        result = read_json(directory / job.directory / FILE_NAME)
    except (OSError, ValueError):
        return False
    print_line(result, console, number=job.number + 1, job=job.directory)
    if result["status"] == "error":
        print(f"runner: error: {printable(result['error']['message'])}", file=sys.stderr)
    return True
