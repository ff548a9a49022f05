"""Runs on a stand-in for the server, and on one that hangs, refuses, answers nonsense or dies."""

import json
import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from server import Server, use
from wandb_reader import read_runs

from runner.tracking import wandb as wandb_module
from runner.tracking.base import RunIdentity
from runner.tracking.wandb import WandbTracker
from tests.machine import LIMIT, SLOW

SECONDS = 1.5 * SLOW  # what a hanging server or service costs; the work on this disk is done within it


def tracker(init_timeout: float = LIMIT, **fields: Any) -> WandbTracker:
    return WandbTracker(init_timeout=init_timeout, finish_timeout=SECONDS, **fields)


def hurry(run: WandbTracker) -> None:
    """From here on it waits no longer than SECONDS for an answer."""
    run.init_timeout = SECONDS


@pytest.mark.parametrize("said", [None, "online"])
def test_a_run_arrives(
    said: str | None,
    server: Server,
    identity: RunIdentity,
    result: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if said:
        monkeypatch.setenv("WANDB_MODE", said)
    run = WandbTracker(project="proj")
    run.start(identity, {"seed": 0})
    run.log({"train/step": 10, "train/loss": 0.5})
    run.record(result)
    run.finish(0)

    assert run.warnings == []
    ((identifier, sent),) = server.runs.items()
    assert run.location == f"{server.url}/team/proj/runs/{identifier}"
    names = {"project": "proj", "displayName": "diagnose/run7@2000", "groupName": "sweep-1", "jobType": "diagnose"}
    assert {key: sent[key] for key in names} == names
    assert json.loads(sent["config"])["ckpt_step"]["value"] == 2000
    points = [(row["checkpoint/step"], row["eval/mse"]) for row in server.history if "eval/mse" in row]
    assert points == [(2000, 0.25)]
    assert [row["layer/mse"] for row in server.history if "layer/index" in row] == [0.05, 0.2]
    assert [row["train/loss"] for row in server.history if "train/step" in row] == [0.5]
    assert (server.summary["verdict"], server.summary["readiness"]) == ("fair", "continue")
    assert server.exit_codes == [0]
    table = json.loads(server.files["/artifact/tables/per_layer.table.json"])
    assert table["data"][0] == [2000, 1, "dual", 8, 0.05, 0.99, 0.01]
    assert "checkpoint-run7" in server.committed
    assert "npt_weights.pt" in json.loads(server.files["/manifest/checkpoint-run7"])["contents"]


def test_offline_asks_nothing_of_the_server(server: Server, identity: RunIdentity, result: dict[str, Any]) -> None:
    run = tracker(mode="offline")
    run.start(identity, {})
    run.record(result)
    run.finish(0)
    assert server.operations == []
    assert run.warnings == []


def test_wandb_offline_in_the_settings_of_the_user_is_kept(server: Server, identity: RunIdentity) -> None:
    settings = Path.home() / ".config" / "wandb" / "settings"
    settings.parent.mkdir(parents=True)
    settings.write_text("[default]\nmode = offline\n")
    run = tracker()
    run.start(identity, {})
    run.finish(0)
    assert server.operations == []
    assert run.warnings == []
    assert run.location is not None
    assert "offline-run-" in run.location


@pytest.mark.parametrize("mode", ["hang", "refuse", "garbage", "denied"])
def test_a_server_that_cannot_be_used_costs_a_warning_once(
    mode: str,
    a_machine_of_its_own: Path,
    identity: RunIdentity,
    result: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    warnings = []
    with Server(mode) as server:
        use(server, monkeypatch)
        for _ in range(2):
            server.asked.clear()
            run = tracker(SECONDS)
            run.start(identity, {})
            run.record(result)
            run.finish(0)
            warnings.append(run.warnings)
            assert run.location is not None
            assert "offline-run-" in run.location
        assert not server.asked.is_set()  # the second time

    (warning,), second = warnings
    assert warning.startswith("W&B: logged offline, the server could not be used (")
    assert "\n" not in warning
    assert second == []
    runs = read_runs(a_machine_of_its_own)
    assert [run.rows("checkpoint/step", "eval/mse") for run in runs] == [[(2000, 0.25)]] * 2
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("mode", ["hang", "garbage", "error", "empty"])
def test_a_server_that_fails_during_the_run(
    mode: str,
    server: Server,
    a_machine_of_its_own: Path,
    identity: RunIdentity,
    result: dict[str, Any],
    capfd: pytest.CaptureFixture[str],
) -> None:
    server.break_after("UpsertBucket", mode)
    run = tracker()
    run.start(identity, {})
    assert run.warnings == []
    hurry(run)
    run.record(result)
    run.finish(0)
    (warning,) = run.warnings
    assert warning.startswith("W&B: not everything was logged (")
    assert run.location is not None
    assert "wandb sync" in run.location
    (kept,) = read_runs(a_machine_of_its_own)
    assert kept.rows("checkpoint/step", "eval/mse") == [(2000, 0.25)]
    assert wandb_module._PROCESS.unreachable
    assert capfd.readouterr() == ("", "")


def test_a_refused_upload_of_rows_alone_is_said(server: Server, identity: RunIdentity) -> None:
    server.break_after("UpsertBucket", "denied")
    run = tracker()
    run.start(identity, {})
    hurry(run)
    run.log({"train/step": 1, "train/loss": 0.5})
    run.finish(0)
    (warning,) = run.warnings
    assert "Fatal error while uploading data" in warning


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_a_service_that_dies_or_hangs(
    blow: signal.Signals,
    server: Server,
    a_machine_of_its_own: Path,
    identity: RunIdentity,
    result: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = tracker()
    run.start(identity, {})
    (service,) = services()
    os.kill(service, blow)
    hurry(run)
    run.record(result)
    run.finish(0)
    (warning,) = run.warnings
    assert warning.startswith("W&B: not everything was logged (")
    assert services() == []

    after = tracker()
    after.start(identity, {})
    after.record(result)
    after.finish(0)
    assert after.warnings == []
    assert read_runs(a_machine_of_its_own)[-1].rows("eval/mse") == [(0.25,)]
    assert capfd.readouterr() == ("", "")


def services() -> list[int]:
    """Process ids of the wandb services that this process has started, itself or through wandb's own process."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "wandb-core" in " ".join(process.cmdline()):
                found.append(process.pid)
    return found
