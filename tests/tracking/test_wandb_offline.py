"""Runs on this machine's disk, read back with wandb's own reader."""

import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from wandb_reader import read_runs, run_files

from runner.tracking import wandb as wandb_module
from runner.tracking.base import RunIdentity
from runner.tracking.wandb import WandbTracker

CONFIG = {"seed": 0, "task": "diagnose", "family": {"name": "auto"}, "tier": {"name": "full", "measures": ["load"]}}


def test_a_run_holds_what_was_logged(
    a_machine_of_its_own: Path, identity: RunIdentity, result: dict[str, Any], checkpoint: Path
) -> None:
    tracker = WandbTracker(project="proj", entity="team")
    tracker.start(identity, CONFIG)
    tracker.log({"train/step": 10, "train/loss": 0.5})
    tracker.log({"train/step": 20, "train/loss": 0.25})
    tracker.record(result)
    tracker.finish(0)
    assert tracker.warnings == []

    (run,) = read_runs(a_machine_of_its_own)
    assert run.exit_code == 0
    wanted = {
        "project": "proj",
        "entity": "team",
        "display_name": "diagnose/run7@2000",
        "run_group": "sweep-1",
        "job_type": "diagnose",
        "tags": ["npt", "full"],
    }
    assert {key: run.header[key] for key in wanted} == wanted
    assert run.axes == {
        "checkpoint/step": None,
        "eval/*": "checkpoint/step",
        "merge/*": "checkpoint/step",
        "layer/index": None,
        "layer/*": "layer/index",
        "train/step": None,
        "train/*": "train/step",
    }
    config = {key: value for key, value in run.config.items() if key != "_wandb"}
    assert config == {
        "seed": 0,
        "tier": {"name": "full", "measures": ["load"]},
        "family_options": {"name": "auto"},
        "task": "diagnose",
        "family": "npt",
        "format": "npt_delta",  # found in the checkpoint, after the run was started
        "series": "sweep-1",
        "ckpt_step": 2000,
    }
    assert run.rows("train/step", "train/loss") == [(10, 0.5), (20, 0.25)]
    assert run.rows("checkpoint/step", "eval/mse", "eval/cosine", "eval/kl", "eval/progress", "eval/text_ppl") == [
        (2000, 0.25, 0.9, 0.125, 70, 3.5)
    ]
    assert run.rows("layer/index", "layer/mse", "layer/cosine") == [(1, 0.05, 0.99), (3, 0.2, 0.95)]
    words = {"status": "ok", "verdict": "fair", "readiness": "continue", "eval/mse": 0.25}
    assert {key: run.summary[key] for key in words} == words

    layers = run.table("tables/per_layer")
    assert layers["columns"] == ["ckpt_step", "layer", "modulation", "np_rank", "mse", "cosine", "kl"]
    assert layers["data"][1] == [2000, 3, "triple", 4, 0.2, 0.95, 0.02]
    prompts = run.table("tables/per_prompt")
    assert prompts["data"] == [[2000, 'say "a, b"', 5, 0.2, 0.91], [2000, "2 + 2", 4, 0.3, None]]

    (artifact,) = [artifact for artifact in run.artifacts if artifact["type"] == "checkpoint"]
    assert artifact["name"] == "checkpoint-run7"
    assert set(artifact["aliases"]) == {"latest", "step-2000"}
    references = {entry["path"]: entry["ref"] for entry in artifact["manifest"]["contents"]}
    assert references == {name: f"{checkpoint.as_uri()}/{name}" for name in ("npt_weights.pt", "config.json")}


def test_everything_lies_in_one_folder_and_nothing_is_left_behind(
    a_machine_of_its_own: Path, tmp_path: Path, identity: RunIdentity, result: dict[str, Any]
) -> None:
    before = dict(os.environ), sys.exit, sys.excepthook
    tracker = WandbTracker()
    tracker.start(identity, CONFIG)
    tracker.record(result)
    tracker.finish(0)
    assert (dict(os.environ), sys.exit, sys.excepthook) == before
    assert list((tmp_path / "home").iterdir()) == []
    assert [path.name for path in a_machine_of_its_own.iterdir()] == ["outputs"]
    assert [path.name for path in (a_machine_of_its_own / "outputs").iterdir()] == ["wandb"]
    (file,) = run_files(a_machine_of_its_own / "outputs")
    folder = file.parent.relative_to(a_machine_of_its_own)
    assert tracker.location == f"{folder} (upload it with: wandb sync {folder})"
    assert str(folder).startswith("outputs/wandb/offline-run-")


def test_what_other_threads_print_meanwhile_is_not_lost(
    identity: RunIdentity, capfd: pytest.CaptureFixture[str]
) -> None:
    done, printed = threading.Event(), []

    def work() -> None:
        while not done.wait(0.002):
            printed.append(os.write(1, b"x"))

    thread = threading.Thread(target=work)
    thread.start()
    tracker = WandbTracker()
    tracker.start(identity, CONFIG)
    tracker.finish(0)
    done.set()
    thread.join()
    assert capfd.readouterr().out == "x" * len(printed)


def test_a_folder_of_another_name_and_outside(tmp_path: Path, identity: RunIdentity) -> None:
    tracker = WandbTracker(dir=str(tmp_path / "with space"), name="mine")
    tracker.start(identity, CONFIG)
    tracker.finish(0)
    (run,) = read_runs(tmp_path)
    assert run.file.parent.parent == tmp_path / "with space" / "wandb"
    assert run.header["display_name"] == "mine"
    assert tracker.location is not None
    assert tracker.location.endswith(f"wandb sync '{run.file.parent}')")


def test_jobs_of_one_process_are_runs_of_their_own_also_after_a_failure(
    a_machine_of_its_own: Path, identity: RunIdentity, result: dict[str, Any]
) -> None:
    lost = WandbTracker()
    lost.start(identity, CONFIG)
    lost.log({"train/step": 1, "train/loss": 9.0})  # and then the job dies without `finish`
    for step in (3000, 1000):
        tracker = WandbTracker()
        tracker.start(RunIdentity(task="diagnose", run_name="run7", step=step), CONFIG)
        tracker.record({**result, "step": step, "metrics": {"mse": step / 1000}})
        tracker.finish(0)
        assert tracker.warnings == []
    lost.log({"train/step": 2, "train/loss": 8.0})

    runs = read_runs(a_machine_of_its_own)
    assert [run.exit_code for run in runs] == [1, 0, 0]
    assert [run.rows("checkpoint/step", "eval/mse") for run in runs] == [[], [(3000, 3.0)], [(1000, 1.0)]]
    assert [run.rows("train/step", "train/loss") for run in runs] == [[(1, 9.0)], [], []]
    assert [run.header["display_name"] for run in runs[1:]] == ["diagnose/run7@3000", "diagnose/run7@1000"]


def test_the_same_job_again_is_another_attempt(a_machine_of_its_own: Path, identity: RunIdentity) -> None:
    for _ in range(3):
        tracker = WandbTracker()
        tracker.start(identity, CONFIG)
        tracker.finish(0)
    first, second, third = [run.header["run_id"] for run in read_runs(a_machine_of_its_own)]
    assert (second, third) == (f"{first}-2", f"{first}-3")
    assert not set(first) & set(":;,#?/'\"")


def test_a_failed_job_is_a_failed_run(a_machine_of_its_own: Path, identity: RunIdentity) -> None:
    tracker = WandbTracker()
    tracker.start(identity, CONFIG)
    error = {"type": "CheckpointError", "message": "no layers found"}
    tracker.record({"task": "diagnose", "status": "error", "ckpt": "gone", "error": error})
    tracker.finish(2)
    (run,) = read_runs(a_machine_of_its_own)
    assert (run.exit_code, run.summary["status"], run.summary["error"]) == (2, "error", "no layers found")
    assert run.artifacts == []
    assert tracker.warnings == []


def test_without_a_start_nothing_happens(a_machine_of_its_own: Path, result: dict[str, Any]) -> None:
    tracker = WandbTracker()
    tracker.log({"train/step": 1})
    tracker.record(result)
    tracker.finish(0)
    assert list(a_machine_of_its_own.iterdir()) == []
    assert (tracker.warnings, tracker.location) == ([], None)


@pytest.mark.parametrize(
    ("said", "offline_runs", "warnings"),
    [
        ("disabled", 0, []),
        ("dryrun", 1, []),
        ("online", 1, ["W&B: logged offline, no credential (WANDB_API_KEY, or `wandb login`)"]),
        ("bogus", 1, ["W&B: WANDB_MODE=bogus is not online, offline or disabled: logged offline"]),
    ],
)
def test_wandb_mode_is_honoured(
    said: str,
    offline_runs: int,
    warnings: list[str],
    a_machine_of_its_own: Path,
    identity: RunIdentity,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WANDB_MODE", said)
    tracker = WandbTracker()
    tracker.start(identity, CONFIG)
    tracker.finish(0)
    assert os.environ["WANDB_MODE"] == said
    assert len(list(a_machine_of_its_own.rglob("offline-run-*"))) == offline_runs
    assert tracker.warnings == warnings
    assert not wandb_module._PROCESS.unreachable


def test_a_folder_that_cannot_be_made_is_one_warning(
    a_machine_of_its_own: Path, identity: RunIdentity, result: dict[str, Any]
) -> None:
    (a_machine_of_its_own / "outputs").write_text("a file")
    tracker = WandbTracker()
    tracker.start(identity, CONFIG)
    tracker.record(result)
    tracker.finish(0)
    (warning,) = tracker.warnings
    assert warning.startswith("W&B: this run is not logged there ([Errno 20] Not a directory")
    assert tracker.location is None


def test_a_row_that_wandb_refuses_is_one_warning(a_machine_of_its_own: Path, identity: RunIdentity) -> None:
    tracker = WandbTracker()
    tracker.start(identity, CONFIG)
    tracker.log({3: 1.0})  # type: ignore[dict-item]
    tracker.log({"train/step": 1})
    tracker.finish(0)
    (warning,) = tracker.warnings
    assert warning.startswith("W&B: not everything was logged (")
    (run,) = read_runs(a_machine_of_its_own)
    assert run.exit_code == 0
