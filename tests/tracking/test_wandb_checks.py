"""The checks of `task=test` in W&B: a table, and the readiness in the summary, as wandb's own reader sees them."""

from pathlib import Path

from wandb_reader import read_runs

from runner.tracking.base import RunIdentity
from runner.tracking.wandb import WandbTracker

RESULT = {
    "task": "test", "status": "ok", "tier": "full", "family": "npt", "overall": "PARTIALLY_READY",
    "metrics": {"score": 0.7, "checks_pass": 1, "checks_warning": 1},
    "checks": [
        {"name": "files", "title": "whole", "integrity": True, "status": "pass", "details": "1 file", "seconds": 0.1,
         "peak_bytes": 1000},
        {"name": "fidelity", "title": "near", "integrity": False, "status": "warning", "details": "mse 0.3",
         "score": 0.7, "recommendation": "train on", "seconds": 0.5, "peak_bytes": 2000, "data": {"mse": 0.3}},
    ],
}  # fmt: skip


def test_checks_are_a_table_and_the_readiness_a_word(a_machine_of_its_own: Path) -> None:
    tracker = WandbTracker(project="proj")
    identity = RunIdentity(task="test", run_name="run7", step=None, series=None, family="npt", tier="full")
    tracker.start(identity, {"task": "test"})
    tracker.record(RESULT)
    tracker.finish(0)
    assert tracker.warnings == []
    (run,) = read_runs(a_machine_of_its_own)
    assert run.summary["overall"] == "PARTIALLY_READY"
    assert run.rows("eval/score", "eval/checks_warning") == [(0.7, 1)]
    table = run.table("tables/checks")
    assert table["columns"] == [
        "ckpt_step", "name", "status", "integrity", "score", "seconds", "peak_bytes", "details", "recommendation",
    ]  # fmt: skip
    assert table["data"] == [
        [None, "files", "pass", True, None, 0.1, 1000, "1 file", None],
        [None, "fidelity", "warning", False, 0.7, 0.5, 2000, "mse 0.3", "train on"],
    ]
