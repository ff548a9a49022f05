"""Sweeps in processes of their own, with jobs that run until a test stops them."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.conftest import MIXED, ROOT, npt_tensors, write_npt
from tests.machine import SLOW, wait_for

# A job that runs until it is stopped.
ENDLESS = "task=train data=text data.path=words.txt base=base train.save_every=10000000 train.warmup_steps=1 train.sequence_length=32".split()


@contextmanager
def written_scene(directory: Path, base: Path, count: int) -> Iterator[Path]:
    """`directory` with a run of `count` checkpoints and a text to train on; nothing works in it any more afterwards."""
    for step in range(100, 100 * count + 1, 100):
        tensors = npt_tensors(base, MIXED, seed=step)
        write_npt(directory / "run" / f"checkpoint-{step}", tensors, base=base, step=step)
    (directory / "base").symlink_to(base)
    (directory / "words.txt").write_text("the cat sat on the mat and looked at the dog\n" * 200)
    try:
        yield directory
    finally:
        for process in processes_in(directory):
            process.kill()


def processes_in(directory: Path) -> list[psutil.Process]:
    """The Python processes whose current directory this is."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(directory) and "python" in process.name() and process.pid != os.getpid():
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def start(scene: Path, *words: str) -> subprocess.Popen:
    """`runner -m` with these words, in a session of its own."""
    # The same number of threads everywhere: it decides about the last bits.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "runner", "-m", *words, "tracker=none"],
        cwd=scene, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def let_work(scene: Path) -> None:
    """Until what runs in `scene` has computed for longer than its imports take."""
    before = _computed(scene)
    wait_for(lambda: _computed(scene) > before + 2 * SLOW, "nothing computes")


def _computed(scene: Path) -> float:
    """Seconds of processor time."""
    times = [process.cpu_times() for process in processes_in(scene)]
    return sum(each.user + each.system for each in times)
