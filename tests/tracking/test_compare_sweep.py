"""Real sweeps over tiny checkpoints, and what of them stands in W&B: on this machine's disk, on a server, and synced."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from server import Server
from wandb_reader import read_runs

from runner import cli
from runner.comparison.comparison import Comparison, read
from runner.sweeps import command as recording
from runner.sweeps.command import record
from tests.comparison.sweeps import write_sweep
from tests.conftest import ROOT, npt_tensors, write_npt
from tests.machine import LIMIT, SLOW

# A server that works answers within this; one that hangs costs it.
LIMITS = (f"tracker.init_timeout={2 * SLOW}", f"tracker.finish_timeout={2 * SLOW}")


@pytest.fixture
def trained(tmp_path: Path, base: Path) -> Path:
    """A run of three checkpoints, the last of them damaged."""
    run = tmp_path / "run8"
    for step in (100, 200, 300):
        write_npt(run / f"checkpoint-{step}", npt_tensors(base, {0: ("dual", 2, 1)}, seed=step), base=base, step=step)
    (run / "checkpoint-300" / "npt_weights.pt").write_bytes(b"PK not a zip file")
    return run


def sweep_directory() -> Path:
    (directory,) = Path("sweeps").iterdir()
    return directory


def test_a_sweep_is_one_group_that_ends_with_a_run_that_draws_its_curve(
    trained: Path, a_machine_of_its_own: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["-m", f"ckpt={trained}", "step=all", "tier=full", "tier.measures=[load,logits,isolation]"]) == 3
    said = capfd.readouterr()
    assert "warning" not in said.err
    sweep = sweep_directory()
    *jobs, last = read_runs(a_machine_of_its_own)
    assert [run.header["job_type"] for run in (*jobs, last)] == ["diagnose", "diagnose", "compare"]
    assert {run.header["run_group"] for run in (*jobs, last)} == {run.config["series"] for run in jobs} == {sweep.name}
    own = [point for run in jobs for point in run.rows("checkpoint/step", "eval/mse", "eval/kl")]
    assert [step for step, *_ in own] == [100, 200]
    assert last.rows("checkpoint/step", "eval/mse", "eval/kl") == own
    assert [row[0] for row in last.rows("layer_mse/0")] == [run.rows("layer/mse")[0][0] for run in jobs]
    assert last.table("tables/checkpoints")["nrows"] == 3
    assert (last.summary["jobs/ok"], last.summary["jobs/failed"], last.exit_code) == (2, 1, 0)
    assert f"W&B: outputs/wandb/{last.file.parent.name} (upload all runs with: wandb sync outputs/wandb/off" in said.out
    assert f"Panels: {sweep / 'panels.json'}" in said.out
    assert json.loads((sweep / "panels.json").read_text())["name"] == f"runner: {sweep.name}"

    assert cli.run(["task=compare", f"sweep={sweep.absolute()}"]) == 0
    again = read_runs(a_machine_of_its_own)[-1]
    assert again.header["run_id"] == f"{last.header['run_id']}-2"
    assert (again.header["run_group"], again.history[0]["eval/mse"]) == (sweep.name, last.history[0]["eval/mse"])


@pytest.fixture
def finished(tmp_path: Path) -> Comparison:
    """A sweep whose jobs are done."""
    return read(write_sweep(tmp_path / "sweep-1", {100: 0.5, 200: 0.4}))


def end_of_sweep(comparison: Comparison, tracker: str, **fields: Any) -> None:
    config = OmegaConf.create({"tracker": {"_target_": f"runner.tracking.{tracker}", **fields}})
    record(comparison, comparison.directories[0], config)


def test_without_the_extra_it_is_said_and_there_are_no_panels(
    finished: Comparison, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    end_of_sweep(finished, "wandb.WandbTracker")
    said = capfd.readouterr()
    assert said.out.endswith("Panels: none; pip install -e '.[panels]' in runner's checkout adds them\n")
    assert said.err == ""
    assert not (finished.directories[0] / "panels.json").exists()


def test_with_no_tracker_nothing_is_said_of_wandb(finished: Comparison, capfd: pytest.CaptureFixture[str]) -> None:
    end_of_sweep(finished, "base.Tracker")
    assert capfd.readouterr() == ("", "")
    assert not (finished.directories[0] / "panels.json").exists()


@pytest.mark.parametrize(("part", "error"), [
    ("log_comparison", KeyError("spec")), ("_write_panels", OSError(28, "No space left on device")),
])  # fmt: skip
def test_whatever_breaks_at_the_end_is_one_warning(
    part: str,
    error: Exception,
    finished: Comparison,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def broken(*_: Any) -> None:
        raise error

    monkeypatch.setattr(recording, part, broken)
    end_of_sweep(finished, "wandb.WandbTracker")
    (warning,) = capfd.readouterr().err.splitlines()
    assert type(error).__name__ in warning
    end_of_sweep(finished, "wandb.WandbTracker", mode="elsewhere")
    assert "tracker.mode must be one of" in capfd.readouterr().err


def test_a_sweep_arrives_online(trained: Path, server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(trained / "checkpoint-300")
    assert cli.run(["-m", f"ckpt={trained}", "step=all", "tracker.project=proj"]) == 0
    said = capfd.readouterr()
    assert "warning" not in said.err
    sweep = sweep_directory()
    kinds = [(run["jobType"], run["groupName"]) for run in server.runs.values()]
    assert kinds == [("diagnose", sweep.name)] * 2 + [("compare", sweep.name)]
    points = [row["checkpoint/step"] for row in server.history if "eval/mse" in row]
    assert points == [100, 200, 100, 200]
    table = json.loads(server.files["/artifact/tables/checkpoints.table.json"])
    assert [row[table["columns"].index("ckpt_step")] for row in table["data"]] == [100, 200]
    assert "/artifact/plots/mse_table.table.json" in server.files
    (view,) = server.views.values()
    assert (view["entityName"], view["projectName"], view["displayName"]) == ("team", "proj", f"runner: {sweep.name}")
    assert f"Panels: {server.url}/team/proj?nw=" in said.out


@pytest.mark.fault
@pytest.mark.parametrize(("after", "mode"), [
    ("UpsertBucket", "hang"), ("UpsertBucket", "garbage"), ("CommitArtifact", "hang"), ("CommitArtifact", "error"),
    ("GetDefaultEntity", "hang"), ("GetDefaultEntity", "empty"),
])  # fmt: skip
def test_a_server_that_fails_on_the_way_costs_a_warning_and_no_job(
    after: str, mode: str, trained: Path, server: Server, a_machine_of_its_own: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    server.break_after(after, mode)
    words = ["-m", f"ckpt={trained}/checkpoint-100,{trained}/checkpoint-200", *LIMITS]
    assert cli.run(words) == 0
    said = capfd.readouterr()
    (warning,) = said.err.strip().splitlines()
    assert warning.startswith("runner: warning: W&B: ")
    sweep = sweep_directory()
    assert f"Panels: {sweep / 'panels.json'}" in said.out
    kept = read_runs(a_machine_of_its_own)
    assert [run.header["job_type"] for run in kept] == ["diagnose", "diagnose", "compare"]
    assert kept[-1].rows("checkpoint/step") == [(100,), (200,)]


@pytest.mark.fault
def test_a_kill_after_the_comparison_is_logged_loses_nothing(finished: Comparison, a_machine_of_its_own: Path) -> None:
    code = """
import os, signal, sys
from pathlib import Path
from runner.comparison.comparison import read
from runner.tracking.compare import log_comparison
from runner.tracking.wandb import WandbTracker
WandbTracker.finish = lambda self, exit_code: os.kill(os.getpid(), signal.SIGKILL)
log_comparison(read(Path(sys.argv[1])), WandbTracker())
"""
    command = [sys.executable, "-c", code, str(finished.directories[0])]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=LIMIT, check=False)
    assert done.returncode == -signal.SIGKILL
    (run,) = read_runs(a_machine_of_its_own)
    assert run.rows("checkpoint/step", "eval/mse") == [(100, 0.5), (200, 0.4)]
    assert run.table("tables/checkpoints")["nrows"] == 2
    assert run.summary["best/step"] == 200


@pytest.mark.fault
def test_the_command_that_is_printed_uploads_an_offline_sweep(
    trained: Path, server: Server, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["-m", f"ckpt={trained}", "step=all", "tracker.mode=offline"]) == 3
    assert server.operations == []
    command = re.search(r"upload all runs with: (wandb sync .*)\)", capfd.readouterr().out)
    assert command is not None
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        command[1],
        shell=True,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(run["jobType"] for run in server.runs.values()) == ["compare", "diagnose", "diagnose"]
    assert {run["groupName"] for run in server.runs.values()} == {sweep_directory().name}
    assert sorted(row["checkpoint/step"] for row in server.history if "eval/mse" in row) == [100, 100, 200, 200]
    assert json.loads(server.files["/artifact/tables/checkpoints.table.json"])["data"][2][1] == "failed"
    assert "/artifact/plots/mse_table.table.json" in server.files
    assert server.committed.count("checkpoint-run8") == 2
