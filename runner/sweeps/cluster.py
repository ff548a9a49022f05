"""Waiting for submitit's jobs: all of them, whatever becomes of some, and none is left running after an interrupt.

Stands for Slurm's `sacct` on a cluster without accounting: the states of jobs as `scontrol` knows them.

submitit asks `sacct -o JobID,State,NodeList --parsable2 -j 12 -j 13`. scontrol forgets a job some minutes after its
end (MinJobAge); one that is asked for and forgotten is said to be COMPLETED, so that nobody waits for it.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from submitit import Job
from submitit.core.core import Executor

_LOOK = 0.5  # seconds between two looks for results
_ASK = 15.0  # seconds between two questions to the cluster: it forgets a job some minutes after its end
_GRACE = 5.0  # seconds that a shared disk has to show the result of a job that has ended


@dataclass(frozen=True, kw_only=True)
class _Answer:
    """What the launcher asks of a job that has ended."""

    value: JobReturn

    def results(self) -> list[JobReturn]:
        """The answer of the job's one task."""
        return [self.value]


@contextmanager
def waiting_for_all(at_once: int | None) -> Iterator[None]:
    """Within the block submitit's executors wait for every job, and a job without a result is an answer that says why
    instead of an exception that leaves the others alone. `at_once`: how many run at a time; None: all go to the
    cluster together."""
    original = Executor.map_array

    def map_array(executor: Executor, function: Callable[..., Any], *arguments: Iterable[Any]) -> list[Any]:
        def start(*lists: Iterable[Any]) -> list[Job[JobReturn]]:
            with _stderr_to(Path(executor.folder).parent / "controllers.log"), _share_of_cores(at_once):
                return original(executor, function, *lists)

        if at_once is None:
            return _run([partial(start, *arguments)], None)
        return _run([partial(start, *([value] for value in row)) for row in zip(*arguments, strict=True)], at_once)

    Executor.map_array = map_array  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Executor.map_array = original  # type: ignore[method-assign]


@contextmanager
def _stderr_to(path: Path) -> Iterator[None]:
    """Within the block, processes that are started write their errors to `path`: submitit's local controllers print a
    traceback when they are interrupted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with path.open("ab") as file:
            os.dup2(file.fileno(), 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)


@contextmanager
def _share_of_cores(among: int | None) -> Iterator[None]:
    """Within the block, processes that are started take their share of this machine's cores: all of them each would
    make all of them slow. Who has set OMP_NUM_THREADS has decided."""
    if among is None or "OMP_NUM_THREADS" in os.environ:
        yield
        return
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // among))
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]


@contextmanager
def accounting() -> Iterator[None]:
    """Within the block there is a `sacct`: where the cluster keeps no accounting, ours stands first on PATH."""
    if shutil.which("sbatch") is None or _has_accounting():
        yield
        return
    before = os.environ["PATH"]
    with tempfile.TemporaryDirectory() as directory:
        script = Path(directory) / "sacct"
        program = Path(__file__).with_name("sacct.py")
        script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(program))} "$@"\n')
        script.chmod(0o755)
        os.environ["PATH"] = f"{directory}{os.pathsep}{before}"
        try:
            yield
        finally:
            os.environ["PATH"] = before


def _has_accounting() -> bool:
    if shutil.which("sacct") is None:
        return False
    asked = subprocess.run(["sacct", "-n", "-j", "1"], capture_output=True, text=True, check=False, timeout=60)
    return asked.returncode == 0 and "disabled" not in asked.stderr


def _run(starts: Sequence[Callable[[], list[Job[JobReturn]]]], at_once: int | None) -> list[_Answer]:
    """Start all, no more than `at_once` at a time, and wait for all; cancel what runs when that is interrupted."""
    jobs: list[Job[JobReturn]] = []
    answers: dict[int, _Answer] = {}
    ended: dict[int, float] = {}
    waiting, asked = list(starts), time.monotonic()
    try:
        while waiting or len(answers) < len(jobs):
            while waiting and (at_once is None or len(jobs) - len(answers) < at_once):
                jobs += waiting.pop(0)()
            ask = time.monotonic() - asked > _ASK
            for index, job in enumerate(jobs):
                if index in answers or not job.done(force_check=ask):
                    continue
                if ask:  # one question is about all jobs
                    ask, asked = False, time.monotonic()
                since = time.monotonic() - ended.setdefault(index, time.monotonic())
                if _task(job).paths.result_pickle.exists() or since > _GRACE:
                    answers[index] = _Answer(value=_answer(job))
            time.sleep(_LOOK)
    except BaseException:
        _cancel(jobs)
        raise
    return [answers[index] for index in range(len(jobs))]


def _task(job: Job[JobReturn]) -> Job[JobReturn]:
    return job.task(0)


def _answer(job: Job[JobReturn]) -> JobReturn:
    """What the job returned; for one that did not return, why, as far as is known."""
    task = _task(job)
    if task.paths.result_pickle.exists():
        error = task.exception()
        if error is None:
            return task.results()[0]
        lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith(("---", "You can"))]
        return _without_result(f"ended in an error before its task began: {lines[-2] if len(lines) > 2 else lines[-1]}")
    state = task.get_info().get("State") or "gone"
    return _without_result(
        f"its process ended without a result ({state}): killed, out of memory or out of time; "
        f"its output: {task.paths.stderr}"
    )


def _without_result(reason: str) -> JobReturn:
    return JobReturn(status=JobStatus.COMPLETED, _return_value=reason)


def _cancel(jobs: Sequence[Job[JobReturn]]) -> None:
    """Cancel what has not ended, so that nothing runs on unseen."""
    left = [job for job in jobs if not job.done()]
    for job in left:
        job.cancel(check=False)
    if left:
        what = (
            "1 job that was waiting or running is"
            if len(left) == 1
            else f"{len(left)} jobs that were waiting or running are"
        )
        print(f"runner: {what} cancelled", file=sys.stderr)


def table(wanted: Sequence[str], listing: str) -> str:
    """The answer for the job ids `wanted`, from what `scontrol show job --oneliner` prints."""
    rows, seen = [], set()
    for line in listing.splitlines():
        values = dict(re.findall(r"(?:^|\s)([A-Za-z]+)=(\S*)", line))
        job = values.get("ArrayJobId") or values.get("JobId")
        if job not in wanted:
            continue
        task = values.get("ArrayTaskId")
        name = job if task is None else f"{job}_{task}" if task.isdigit() else f"{job}_[{task}]"
        rows.append(f"{name}|{values.get('JobState', 'UNKNOWN')}|{values.get('NodeList', '')}")
        seen.add(job)
    rows += [f"{job}|COMPLETED|" for job in wanted if job not in seen]
    return "\n".join(["JobID|State|NodeList", *rows])


def main(words: Sequence[str]) -> int:
    """Print the table for the ids that follow each -j."""
    wanted = [word for before, word in pairwise(words) if before == "-j"]
    asked = subprocess.run(
        ["scontrol", "show", "job", "--oneliner"], capture_output=True, text=True, check=False, timeout=60
    )
    if asked.returncode:
        print(asked.stderr.strip() or "scontrol failed", file=sys.stderr)
        return asked.returncode
    print(table(wanted, asked.stdout))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
