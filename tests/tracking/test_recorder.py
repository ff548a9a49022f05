"""Runs that are recorded after their command has ended: whatever is killed meanwhile, the record is made, and once."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from wandb_reader import read_runs

from runner.tracking import recorder
from runner.tracking.base import RunIdentity
from runner.tracking.wandb import WandbTracker, record_left
from tests.conftest import ROOT
from tests.machine import LIMIT, wait_for


def is_recorded() -> bool:
    """Whether something was left and is not any more."""
    pending = Path("outputs/wandb") / recorder.PENDING
    return pending.is_dir() and not list(pending.iterdir())


def left_by(identity: RunIdentity, result: dict[str, Any], tracker: WandbTracker) -> None:
    """What a command that is killed before it starts its recorder leaves."""
    tracker.leave(identity, {"seed": 0}, result, 1, Path("runner.log"))


@pytest.mark.parametrize("end", [None, signal.SIGHUP, signal.SIGKILL], ids=["done", "its terminal closed", "killed"])
def test_a_single_run_is_recorded_by_a_process_that_outlives_it(
    end: signal.Signals | None, a_machine_of_its_own: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "runner", "task=verify", "ckpt=demo"]
    process = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    said = ""
    while not said.splitlines() or not said.splitlines()[-1].startswith("W&B: run verify-"):
        line = process.stdout.readline()
        assert line, process.stderr and process.stderr.read()
        said += line
    if end is not None:
        os.killpg(process.pid, end)
    out, err = process.communicate(timeout=LIMIT)
    assert (out, err) == ("", "")
    assert said.splitlines()[-2].startswith("Result: ")
    wait_for(is_recorded, "the run is not recorded")
    (run,) = read_runs(a_machine_of_its_own)
    assert (run.header["job_type"], run.summary["status"], run.exit_code) == ("verify", "ok", 0)
    assert run.header["run_id"] in said
    (log,) = Path("outputs").rglob("runner.log")
    assert f"{run.header['run_id']} (upload it with: wandb sync outputs/wandb/offline-run-" in log.read_text()
    assert list((tmp_path / "home").iterdir()) == []


def test_what_a_killed_recorder_began_is_recorded_once(
    a_machine_of_its_own: Path, identity: RunIdentity, result: dict[str, Any]
) -> None:
    left_by(identity, result, WandbTracker())
    left_by(identity, {**result, "step": 3000}, WandbTracker(name="other"))
    second, first = sorted(Path("outputs/wandb/pending").iterdir())  # the same job again is "-2"
    begun = Path("outputs/wandb") / f"offline-run-20260101_000000-{first.stem}"
    begun.mkdir()
    record_left("outputs/wandb")
    assert is_recorded()
    assert not begun.exists()
    runs = read_runs(a_machine_of_its_own)
    assert sorted(run.header["run_id"] for run in runs) == [first.stem, second.stem]
    assert [run.exit_code for run in runs] == [1, 1]
    assert [run.rows("checkpoint/step", "eval/mse") for run in runs] == [[(2000, 0.25)], [(3000, 0.25)]]
    record_left("outputs/wandb")
    assert len(read_runs(a_machine_of_its_own)) == 2


def test_what_goes_wrong_with_the_record_stands_in_the_run_s_log(
    identity: RunIdentity, result: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    left_by(identity, result, WandbTracker())
    record_left("outputs/wandb")
    assert "logged offline, no credential" in Path("runner.log").read_text()


def test_a_disabled_tracker_leaves_nothing(
    a_machine_of_its_own: Path, identity: RunIdentity, result: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    left_by(identity, result, WandbTracker())
    assert list(a_machine_of_its_own.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_said_at_once(
    a_machine_of_its_own: Path, identity: RunIdentity, result: dict[str, Any]
) -> None:
    (a_machine_of_its_own / "outputs").write_text("a file")
    tracker = WandbTracker()
    left_by(identity, result, tracker)
    (warning,) = tracker.warnings
    assert warning.startswith("W&B: this run is not logged there ([Errno 20] Not a directory")
