"""Jobs of submitit: the sweep waits for all of them, whatever becomes of some, and none runs on after an interrupt.

Hydra's submitit launcher gives up at the first job without a result, has no limit for the jobs that run on this
machine, and leaves jobs alone after Ctrl-C. So its jobs are submitted here, with submitit's own executor: the launcher
is what each of them calls.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn
from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import BaseSubmititLauncher, SlurmLauncher
from submitit import AutoExecutor, Job

_LOOK = 0.5  # seconds between two looks for results
_ASK = 15.0  # seconds between two questions to the cluster: it forgets a job some minutes after its end
_GRACE = 5.0  # seconds that a shared disk has to show the result of a job that has ended
# Parameters of the launcher by themselves; all clusters share those of BaseQueueConf, others get the cluster's prefix.
_SHARED = {field.name for field in fields(BaseQueueConf)} - {"submitit_folder"}


def run_jobs(
    launcher: BaseSubmititLauncher, overrides: Sequence[Sequence[str]], numbers: Sequence[int]
) -> list[JobReturn | str]:
    """Run a job for each of `overrides` and wait for all: what it returned, or why it returned nothing.

    Slurm gets one array. On this machine no more than `hydra.launcher.jobs_at_once` run at a time (null: all).
    """
    parameters = dict(launcher.params)
    at_once = parameters.pop("jobs_at_once", None)
    folder = Path(parameters.pop("submitit_folder"))
    cluster = "slurm" if isinstance(launcher, SlurmLauncher) else "local"
    executor = AutoExecutor(
        folder, cluster=cluster, **{f"{cluster}_max_num_timeout": parameters.pop("max_num_timeout", 0)}
    )
    executor.update_parameters(
        **{name if name in _SHARED else f"{cluster}_{name}": value for name, value in parameters.items()}
    )
    state = Singleton.get_state()
    calls = [
        (list(words), "hydra.sweep.dir", number, f"job_id_for_{number}", state)
        for words, number in zip(overrides, numbers, strict=True)
    ]

    def submit(rows: Sequence[tuple[Any, ...]]) -> list[Job[JobReturn]]:
        with _stderr_to(folder.parent / "controllers.log"), _share_of_cores(at_once):
            return executor.map_array(launcher, *zip(*rows, strict=True))

    groups = [calls] if at_once is None else [[call] for call in calls]
    with _accounting():
        return _wait([partial(submit, group) for group in groups], at_once)


def _wait(waiting: list[Callable[[], list[Job[JobReturn]]]], at_once: int | None) -> list[JobReturn | str]:
    """Submit all, no more than `at_once` at a time, and wait for all; cancel what runs when that is interrupted."""
    jobs: list[Job[JobReturn]] = []
    outcomes: dict[int, JobReturn | str] = {}
    ended: dict[int, float] = {}
    asked = time.monotonic()
    try:
        while waiting or len(outcomes) < len(jobs):
            while waiting and (at_once is None or len(jobs) - len(outcomes) < at_once):
                jobs += waiting.pop(0)()
            ask = time.monotonic() - asked > _ASK
            for index, job in enumerate(jobs):
                if index in outcomes or not job.done(force_check=ask):
                    continue
                if ask:  # one question is about all jobs
                    ask, asked = False, time.monotonic()
                since = time.monotonic() - ended.setdefault(index, time.monotonic())
                if job.task(0).paths.result_pickle.exists() or since > _GRACE:
                    outcomes[index] = _outcome(job.task(0))
            time.sleep(_LOOK)
    except BaseException:
        _cancel(jobs)
        raise
    return [outcomes[index] for index in range(len(jobs))]


def _outcome(job: Job[JobReturn]) -> JobReturn | str:
    """What the job returned; for one that did not return, why, as far as is known."""
    if not job.paths.result_pickle.exists():
        return (
            f"its process ended without a result ({job.state}): killed, out of memory or out of time; "
            f"its output: {job.paths.stderr}"
        )
    if job.exception() is None:
        return job.result()
    return f"ended in an error before its task began; its output: {job.paths.stderr}"


def _cancel(jobs: Sequence[Job[JobReturn]]) -> None:
    """Cancel what has not ended, so that nothing runs on unseen."""
    left = [job for job in jobs if not job.done()]
    for job in left:
        job.cancel(check=False)
    if left:
        what = "job that was waiting or running is" if len(left) == 1 else "jobs that were waiting or running are"
        print(f"runner: {len(left)} {what} cancelled", file=sys.stderr)


@contextmanager
def _stderr_to(path: Path) -> Iterator[None]:
    """Within the block, processes that are started write their errors to `path`: submitit's local controllers print a
    traceback when they are interrupted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stderr.flush()
    before = os.dup(2)
    try:
        with path.open("ab") as file:
            os.dup2(file.fileno(), 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(before, 2)
        os.close(before)


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
def _accounting() -> Iterator[None]:
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
    return asked.returncode == 0
