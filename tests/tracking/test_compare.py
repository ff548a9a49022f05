"""The compare run: what it holds, and that wandb's own reader finds the curves in it."""

from pathlib import Path
from typing import Any

import pytest
from wandb_reader import read_runs

from runner.comparison.comparison import read
from runner.tracking.base import RunIdentity
from runner.tracking.compare import comparison_record
from runner.tracking.wandb import WandbTracker
from tests.comparison.sweeps import result, write_job, write_sweep

FALLING = {step: 40 / step**0.6 for step in (800, 200, 400, 1600, 3200, 6400)}


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Six checkpoints of one run, their jobs not in the order of their steps, and a seventh that failed."""
    sweep = write_sweep(tmp_path / "sweep-1", FALLING, tier="full")
    error = {"type": "CheckpointError", "message": "no such file"}
    write_job(sweep, 6, "x", {"task": "diagnose", "status": "error", "ckpt": "/runs/a/checkpoint-9000", "error": error})
    return sweep


def test_points_ascend_in_step_with_the_layers_beside_them(sweep: Path) -> None:
    rows = [row for row in comparison_record(read(sweep)).rows if "eval/mse" in row]
    assert [(row["checkpoint/step"], row["eval/mse"]) for row in rows] == sorted(FALLING.items())
    assert [row["eval/progress"] for row in rows] == [10] * 6
    assert {key: value for key, value in rows[0].items() if key.startswith("layer_")} == {
        "layer_mse/1": FALLING[200], "layer_cosine/1": 0.98, "layer_kl/1": 0.01,
        "layer_mse/2": FALLING[200], "layer_cosine/2": 0.98, "layer_kl/2": 0.01,
    }  # fmt: skip


def test_the_estimate_is_a_curve_of_its_own_and_stands_in_the_summary(sweep: Path) -> None:
    comparison = read(sweep)
    record = comparison_record(comparison)
    band = [row for row in record.rows if "forecast/median" in row]
    assert [row["forecast/step"] for row in band] == [point[0] for point in comparison.series[0].estimate.band]
    assert all(row["forecast/lower"] <= row["forecast/median"] <= row["forecast/upper"] for row in band)
    assert record.summary["estimate/words"] == comparison.series[0].estimate.words
    assert record.summary["estimate/mse_0.5_status"] == "reached"
    assert (record.summary["best/step"], record.summary["best/mse"]) == (6400, FALLING[6400])
    assert (record.summary["jobs/ok"], record.summary["jobs/failed"]) == (6, 1)
    assert record.summary["headline"].endswith("Of 7 jobs 1 failed.")


def test_the_table_has_a_row_for_each_job_failures_too(sweep: Path) -> None:
    table = comparison_record(read(sweep)).tables["tables/checkpoints"]
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    assert [row["ckpt_step"] for row in rows] == [*FALLING, 9000]
    assert rows[0]["mse"] == FALLING[800]
    assert (rows[0]["series"], rows[0]["verdict"], rows[0]["readiness"]) == ("a · full", "poor", "early")
    assert (rows[6]["status"], rows[6]["error"], rows[6]["mse"], rows[6]["series"]) == (
        "failed",
        "no such file",
        None,
        None,
    )


def test_several_series_keep_apart_under_what_tells_them_apart(tmp_path: Path) -> None:
    for tier in ("quick", "full"):
        for number, step in enumerate((0, 100)):
            found = result(f"/runs/a/checkpoint-{step}", 0.5, tier=tier)
            write_job(tmp_path / "s", number + (tier == "full") * 2, "x", found, ckpt="/runs/a", tier={"name": tier})
    record = comparison_record(read(tmp_path / "s"))
    points = [(row["checkpoint/step"], key) for row in record.rows for key in row if key.startswith("eval/mse")]
    assert points == [(0, "eval/mse/quick"), (0, "eval/mse/full"), (100, "eval/mse/quick"), (100, "eval/mse/full")]
    assert list(record.charts["plots/mse"].lines) == ["quick", "full"]
    assert {"best/step/quick", "best/step/full"} <= set(record.summary)


@pytest.mark.parametrize("names", [("/runs/é", "/runs/ü"), ("/runs/a b", "/runs/a,b")])
def test_series_whose_safe_names_are_the_same_still_keep_apart(tmp_path: Path, names: tuple[str, str]) -> None:
    for number, name in enumerate(names):
        write_job(tmp_path / "s", number, "x", result(f"{name}/checkpoint-1", 0.5), ckpt=name)
    rows = comparison_record(read(tmp_path / "s")).rows
    keys = [key for row in rows for key in row if key.startswith("eval/mse")]
    assert len(set(keys)) == 2
    assert all(key.isascii() and " " not in key and "," not in key for key in keys)


@pytest.mark.parametrize("found", [
    None,
    {"task": "merge", "status": "ok"},
    {"task": "diagnose", "status": "ok", "metrics": {"mse": 0.5}, "ckpt": "gpt.pt"},
    {"task": "diagnose", "status": "ok", "metrics": {"mse": None}, "ckpt": "/runs/a/checkpoint-5", "step": 5},
    {"task": "test", "status": "ok", "overall": "READY", "checks": [], "ckpt": "/runs/a/checkpoint-5", "step": 5},
])  # fmt: skip
def test_a_sweep_without_curves_still_has_its_table(tmp_path: Path, found: dict[str, Any] | None) -> None:
    write_job(tmp_path / "s", 0, "x", found, ckpt="somewhere")
    record = comparison_record(read(tmp_path / "s"))
    assert not [key for row in record.rows for key in row if key.startswith("eval/mse")]
    assert len(record.tables["tables/checkpoints"].rows) == 1
    assert record.charts == {}


def test_the_run_draws_curves(sweep: Path, a_machine_of_its_own: Path) -> None:
    record = comparison_record(read(sweep))
    tracker = WandbTracker()
    tracker.start(RunIdentity(task="compare", run_name="a", series="sweep-1"), {"task": "compare"})
    tracker.record({"task": "compare", "status": "ok"}, record)
    tracker.finish(0)
    assert tracker.warnings == []

    (run,) = read_runs(a_machine_of_its_own)
    assert (run.header["job_type"], run.header["run_group"]) == ("compare", "sweep-1")
    assert run.rows("checkpoint/step", "eval/mse", "layer_mse/2") == [(s, m, m) for s, m in sorted(FALLING.items())]
    wanted = {"eval/*": "checkpoint/step", "layer_mse/*": "checkpoint/step", "forecast/*": "forecast/step"}
    assert {key: run.axes[key] for key in wanted} == wanted
    assert (run.config["family"], run.config["runs"]) == ("npt", ["a"])
    assert run.summary["eval/mse"] == FALLING[6400]
    assert run.summary["headline"] == record.summary["headline"]
    assert run.table("tables/checkpoints")["nrows"] == 7
    lines = run.table("plots/mse_table")
    assert lines["data"][0] == [200, "a · full", FALLING[200]]
