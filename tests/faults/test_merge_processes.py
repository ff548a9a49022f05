"""Merges as whole processes: small and read-only disks, interrupts at any moment, eight writers of one output."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from runner.files.staging import verify
from tests.conftest import ROOT
from tests.machine import SLOW
from tests.merge.sources import ONE, THREE, write_source

pytestmark = [pytest.mark.fault, pytest.mark.timeout(600 * SLOW)]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive"}
# A command line whose question for free space is answered with "plenty": as if others filled the disk after it.
FILLED_LATER = (
    "import shutil, sys; shutil.disk_usage = lambda path: shutil._ntuple_diskusage(1 << 40, 0, 1 << 40); "
    "from runner import cli; sys.exit(cli.run(sys.argv[1:]))"
)


def command(folder: Path, output: Path) -> list[str]:
    return [
        "task=merge", "tracker=none", f"merge.sources=[{folder / 'a'},{folder / 'b'}]", f"merge.output={output}",
        f"hydra.run.dir={folder / 'log'}",
    ]  # fmt: skip


def large(folder: Path) -> None:
    """Two sources of 30 MB each."""
    for name, layer in (("a", 1), ("b", 3)):
        weights = {f"layer_{layer}_np.{m}": torch.ones(s) for m, s in (
            ("W_down", (1000, 2500)), ("W_a_up", (2500, 1000)), ("W_b_up", (2500, 1000)))}  # fmt: skip
        write_source(folder / name, {}, weights=weights, trained=0)


def on_disk(options: str, folder: Path, words: list[str]) -> subprocess.CompletedProcess[str]:
    """Run with a small disk mounted at folder/disk, and list what is left on it."""
    if os.geteuid() != 0 or not shutil.which("unshare"):
        pytest.skip("needs root, to mount a small disk")
    (folder / "disk").mkdir()
    mount = f'mount -t tmpfs -o {options} none "$0" && {{ "$@"; code=$?; ls -A "$0"; exit $code; }}'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", mount, folder / "disk", *words],
        capture_output=True, text=True, env=ENVIRONMENT, check=False,
    )  # fmt: skip
    if "unshare:" in done.stderr or "mount:" in done.stderr:
        pytest.skip("this machine does not let a test mount a small disk")
    return done


@pytest.mark.parametrize(
    ("options", "start", "code", "message"),
    [
        ("size=50m", ["-m", "runner"], 2, "needs 61 MB"),
        ("size=50m", ["-c", FILLED_LATER], 1, "not written: [Errno 28] No space left on device"),
        ("ro", ["-m", "runner"], 1, "not written: [Errno 30] Read-only file system"),
    ],
    ids=["known before", "fills meanwhile", "read-only"],
)
def test_a_disk_that_is_too_small_or_read_only(options, start, code, message, tmp_path):
    large(tmp_path)
    before = {file: file.read_bytes() for name in "ab" for file in (tmp_path / name).iterdir()}
    done = on_disk(options, tmp_path, [sys.executable, *start, *command(tmp_path, tmp_path / "disk" / "out")])
    assert done.returncode == code, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("runner: error: ")
    assert message in line
    assert done.stdout == ""
    assert {file: file.read_bytes() for file in before} == before


def test_eight_writers_at_once_leave_one_sound_output(tmp_path):
    large(tmp_path)
    words = [sys.executable, "-m", "runner", *command(tmp_path, tmp_path / "out")]
    writers = [
        subprocess.Popen(
            [*words, f"hydra.run.dir={tmp_path / str(number)}"],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
        )
        for number in range(8)
    ]  # fmt: skip
    said = [writer.communicate()[1] for writer in writers]
    codes = [writer.returncode for writer in writers]
    assert sorted(codes) == [0, 2, 2, 2, 2, 2, 2, 2], said
    for code, text in zip(codes, said, strict=True):
        if code:
            (line,) = text.splitlines()
            assert "another process is writing it" in line or "exists already" in line
    assert verify(tmp_path / "out") == []
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".out")]


def of_children() -> float:
    """Seconds of processor time that ended children have taken."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def computed(process: subprocess.Popen) -> float:
    """Seconds of processor time so far."""
    times = psutil.Process(process.pid).cpu_times()
    return times.user + times.system


def test_an_interrupt_at_any_moment_is_one_line(tmp_path):
    """From the moment that the command line is read: while torch is imported, while files are written and synced."""
    write_source(tmp_path / "a", ONE)
    write_source(tmp_path / "b", THREE, seed=1)
    words = [sys.executable, "-m", "runner", *command(tmp_path, tmp_path / "out")]
    start = of_children()
    subprocess.run(words, env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL)
    whole = of_children() - start
    ended = []
    for turn in range(24):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        start = of_children()
        running = subprocess.Popen(words, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        # Before a fifth of it the interpreter itself is starting. In processor time: however busy the machine is.
        while running.poll() is None and computed(running) < whole * (0.2 + 0.8 * turn / 24):
            time.sleep(0.002)
        running.send_signal(signal.SIGINT)
        _, said = running.communicate()
        ended.append(running.returncode)
        if running.returncode == 0:  # too late: the first took longer
            whole = min(whole, of_children() - start)
        line = "runner: interrupted; what was finished is kept\n"
        # Once all is done and Python takes itself down, the signal ends it without a word.
        silent = running.returncode == -signal.SIGINT and (tmp_path / "out").exists() and not said
        assert (running.returncode, said) in ((0, ""), (130, line), (-signal.SIGINT, line)) or silent, said
        assert not (tmp_path / "out").exists() or verify(tmp_path / "out") == []
        assert not [path for path in tmp_path.iterdir() if ".partial-" in path.name]
    assert ended.count(130) >= 12
