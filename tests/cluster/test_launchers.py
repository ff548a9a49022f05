"""The same sweep under each launcher, and what becomes of jobs that a cluster loses."""

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.endless import ENDLESS, let_work, processes_in, start, written_scene
from tests.machine import LIMIT, SLOW, wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600 * SLOW)]

SMALL = ["hydra.launcher.cpus_per_task=1", "hydra.launcher.mem_gb=1"]


@pytest.fixture
def scene(tmp_path: Path, base: Path) -> Iterator[Path]:
    with written_scene(tmp_path, base, 3) as directory:
        yield directory


def sweep(scene: Path, *words: str) -> tuple[int, str, Path]:
    """Exit code, standard error and directory of one sweep."""
    before = set((scene / "sweeps").glob("*"))
    process = start(scene, *words)
    _, err = process.communicate(timeout=4 * LIMIT)
    (directory,) = set((scene / "sweeps").iterdir()) - before
    return process.returncode, err, directory


def figures(directory: Path) -> list[dict]:
    results = [json.loads(file.read_text()) for file in sorted(directory.glob("*/result.json"))]
    return [{key: result[key] for key in ("step", "metrics", "per_prompt", "verdict")} for result in results]


def reasons(directory: Path) -> list[str]:
    return [job.get("reason", "") for job in json.loads((directory / "sweep.json").read_text())["jobs"]]


def test_the_same_numbers_under_each_launcher_on_one_machine(scene):
    (code, err, serial) = sweep(scene, "ckpt=run", "step=all")
    assert code == 0, err
    assert len(figures(serial)) == 3
    for launcher in ("joblib", "submitit_local"):
        code, err, directory = sweep(scene, "ckpt=run", "step=all", f"hydra/launcher={launcher}")
        assert code == 0, err
        assert figures(directory) == figures(serial)


def test_the_same_numbers_on_slurm(scene, slurm):
    _, _, serial = sweep(scene, "ckpt=run", "step=all")
    code, err, directory = sweep(scene, "ckpt=run", "step=all", "hydra/launcher=submitit_slurm", *SMALL)
    assert code == 0, err
    assert figures(directory) == figures(serial)


def test_a_partition_that_is_not_there(scene, slurm):
    words = ["ckpt=run", "step=all", "hydra/launcher=submitit_slurm", *SMALL]
    code, err, directory = sweep(scene, *words, "hydra.launcher.partition=nowhere")
    assert code == 3
    assert err.count("NEVER STARTED") == 3
    assert all("invalid partition specified: nowhere" in reason for reason in reasons(directory))
    process = start(scene, f"resume={directory}", "hydra.launcher.partition=main")
    _, err = process.communicate(timeout=4 * LIMIT)
    assert process.returncode == 0, err
    assert reasons(directory) == ["", "", ""]


def test_a_killed_job_and_one_out_of_time_leave_the_others_alone(scene, slurm):
    words = [*ENDLESS, "hydra/launcher=submitit_slurm", *SMALL, "hydra.launcher.timeout_min=2"]
    process = start(scene, *words, "train.max_steps=9000000,9000001,2")
    wait_for(lambda: list(scene.glob("sweeps/*/0_*/.hydra/overrides.yaml")))
    jobs = [each for each in processes_in(scene) if "submitit.core._submit" in each.cmdline()]
    (killed,) = [each for each in jobs if each.environ().get("SLURM_ARRAY_TASK_ID") == "0"]
    killed.kill()
    _, err = process.communicate(timeout=4 * LIMIT)
    (directory,) = (scene / "sweeps").iterdir()
    assert process.returncode == 3, err
    assert not list(directory.glob("0_*/result.json"))
    assert "its process ended without a result (FAILED)" in reasons(directory)[0]
    timed_out = json.loads(next(directory.glob("1_*/result.json")).read_text())
    assert "out of time" in timed_out["error"]["message"]
    assert json.loads(next(directory.glob("2_*/result.json")).read_text())["status"] == "ok"
    assert "LOST 0_" in err


def test_an_interrupt_cancels_what_is_on_the_cluster(scene, slurm):
    words = [*ENDLESS, "hydra/launcher=submitit_slurm", *SMALL]
    process = start(scene, *words, "train.max_steps=2,9000000,9000001")
    wait_for(lambda: list(scene.glob("sweeps/*/0_*/result.json")) and list(scene.glob("sweeps/*/1_*/.hydra")))
    let_work(scene)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=4 * LIMIT)
    assert process.returncode == 130, err
    assert "1 of 3 jobs are finished and kept" in err
    assert "2 jobs that were waiting or running are cancelled" in err
    assert "Traceback" not in err

    def queue() -> str:
        return subprocess.run(["squeue", "-h"], capture_output=True, text=True, check=True).stdout.strip()

    wait_for(lambda: queue() == "")
