"""Sweeps that are cut short: a worker killed, the parent interrupted, a full disk, a time limit. What was finished is
kept and told, and the sweep goes on from there."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.endless import ENDLESS, let_work, start, written_scene
from tests.machine import LIMIT, SLOW, wait_for

pytestmark = [pytest.mark.fault, pytest.mark.timeout(600 * SLOW)]


@pytest.fixture
def scene(tmp_path: Path, base: Path) -> Iterator[Path]:
    with written_scene(tmp_path, base, 4) as directory:
        yield directory


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=2 * LIMIT)
    return process.returncode, out, err


def sweep_of(scene: Path) -> Path:
    (found,) = (scene / "sweeps").iterdir()
    return found


def workers(parent: subprocess.Popen) -> list[psutil.Process]:
    """The processes in which the jobs of `parent` run."""
    below = psutil.Process(parent.pid).children(recursive=True)
    return [p for p in below if "popen_loky_posix" in " ".join(p.cmdline()) or "submitit.core._submit" in p.cmdline()]


def started(scene: Path, number: int) -> bool:
    """Whether the job trains: its log is written then."""
    return bool(list(scene.glob(f"sweeps/*/{number}_*/.hydra/overrides.yaml")))


def statuses(scene: Path) -> list[str]:
    found = []
    plan = json.loads((sweep_of(scene) / "sweep.json").read_text())
    for job in plan["jobs"]:
        directory = sweep_of(scene) / job["directory"]
        if (directory / "result.json").exists():
            found.append(json.loads((directory / "result.json").read_text())["status"])
        else:
            found.append("lost" if directory.exists() else "never started")
    return found


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_a_killed_worker_is_told_and_the_rest_runs(scene, launcher):
    process = start(scene, f"hydra/launcher={launcher}", *ENDLESS, "train.max_steps=9000000,9000001,2")
    wait_for(lambda: started(scene, 0) and started(scene, 1))
    for worker in workers(process):
        worker.kill()
    code, _, err = finish(process)
    assert (code, statuses(scene)) == (3, ["lost", "lost", "ok"]), err
    assert "-m resume=" in err
    reasons = [job.get("reason", "") for job in json.loads((sweep_of(scene) / "sweep.json").read_text())["jobs"]]
    assert ["killed" in reason for reason in reasons] == [True, True, False]

    finished = next(sweep_of(scene).glob("2_*/result.json")).stat().st_mtime_ns
    marks = {file: file.stat().st_mtime_ns for file in sweep_of(scene).glob("*/.hydra/overrides.yaml")}
    again = start(scene, f"resume={sweep_of(scene)}", "hydra/launcher=basic")
    wait_for(lambda: any(file.stat().st_mtime_ns != mark for file, mark in marks.items()))
    let_work(scene)
    again.send_signal(signal.SIGINT)
    code, _, err = finish(again)
    assert (code, "1 of 3 jobs" in err) == (130, True), err
    assert next(sweep_of(scene).glob("2_*/result.json")).stat().st_mtime_ns == finished


@pytest.mark.parametrize("whole_group", [True, False], ids=["terminal", "kill"])
@pytest.mark.parametrize("launcher", ["basic", "joblib", "submitit_local"])
def test_an_interrupt_keeps_what_is_finished_and_leaves_nothing_running(scene, launcher, whole_group):
    process = start(scene, f"hydra/launcher={launcher}", *ENDLESS, "train.max_steps=2,9000000,3")
    wait_for(lambda: started(scene, 1) and statuses(scene)[0] == "ok")
    let_work(scene)
    below = psutil.Process(process.pid).children(recursive=True)
    if whole_group:
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130, err
    assert statuses(scene)[:2] == ["ok", "lost"]
    assert f"{statuses(scene).count('ok')} of 3 jobs are finished and kept" in err
    assert "python -m runner -m resume=" in err
    assert "Traceback" not in err
    wait_for(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in below))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_keeps_what_is_finished_and_the_sweep_goes_on_when_there_is_room(scene):
    small = scene / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", str(small)], check=True)
    try:
        code, _, err = finish(start(scene, "ckpt=run", "step=all", f"hydra.sweep.dir={small}/sweep"))
        assert code == 3, err
        assert "No space left on device" in err
        assert "Traceback" not in err
        plan = json.loads((small / "sweep" / "sweep.json").read_text())
        done = [json.loads(f.read_text())["status"] for f in sorted((small / "sweep").glob("*/result.json"))]
        assert 0 < done.count("ok") < len(plan["jobs"]) == 4
        subprocess.run(["mount", "-o", "remount,size=4m", str(small)], check=True)
        code, out, err = finish(start(scene, f"resume={small}/sweep"))
        assert code == 0, err
        assert out.count("\n#") + out.startswith("#") == 4 - done.count("ok")
        assert len(list((small / "sweep").glob("*/result.json"))) == 4
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_job_that_runs_out_of_time_says_so(scene):
    words = [
        "hydra/launcher=submitit_local",
        "hydra.launcher.timeout_min=1",
        *ENDLESS,
        "train.max_steps=9000000,2",
    ]
    code, _, err = finish(start(scene, *words))
    assert (code, statuses(scene)) == (3, ["error", "ok"]), err
    assert "out of time: stopped by the launcher's limit; give it more with hydra.launcher.timeout_min=" in err
