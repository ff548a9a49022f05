"""The workspace of comparison panels: what is in it, where it is kept, and that W&B cannot break it."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from server import Server

from runner.comparison.comparison import Comparison, read
from runner.tracking import wandb as wandb_module
from runner.tracking.base import Tracker
from runner.tracking.compare import comparison_record
from runner.tracking.panels import write_panels
from runner.tracking.wandb import WandbTracker
from tests.comparison.sweeps import result, write_job, write_sweep
from tests.machine import SLOW

FALLING = {step: 40 / step**0.6 for step in (200, 400, 800, 1600, 3200, 6400)}


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    return read(write_sweep(tmp_path / "sweep-1", FALLING, tier="full"))


def section(kept: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The panels of one section."""
    (panels,) = [
        each["panels"] for each in kept["spec"]["section"]["panelBankConfig"]["sections"] if each["name"] == name
    ]
    return panels


def test_a_sweep_has_all_kinds_of_panels_over_flat_keys_that_its_runs_log(
    comparison: Comparison, tmp_path: Path
) -> None:
    kept = write_panels(comparison, Tracker(), tmp_path / "panels.json")
    assert kept["name"] == "runner: sweep-1"
    assert "view" not in kept
    curves = [panel["config"] for panel in section(kept, "Checkpoints")]
    assert curves[0]["metrics"] == ["eval/mse"]
    assert curves[0]["yLogScale"]
    assert {curve["xAxis"] for curve in curves} == {"checkpoint/step"}
    assert {curve["groupBy"] for curve in curves} == {"series.value"}
    (layers, cosines) = (panel["config"]["metrics"] for panel in section(kept, "Layers"))
    assert layers == ["layer_mse/1", "layer_mse/2"]
    (estimate,) = (panel["config"] for panel in section(kept, "Estimate"))
    assert estimate["xAxis"] == "forecast/step"

    logged = {key for row in comparison_record(comparison).rows for key in row}
    drawn = {key for curve in curves for key in curve["metrics"]} | {*layers, *cosines, *estimate["metrics"]}
    assert drawn <= logged
    kinds = [panel["viewType"] for panel in section(kept, "Comparison")]
    assert kinds == ["Bar Chart", "Scatter Plot", "Parallel Coordinates Plot", "Run Comparer", "Weave"]
    (filtered,) = kept["spec"]["section"]["runSets"][0]["filters"]["filters"]
    assert (filtered["key"], filtered["value"]) == ({"section": "config", "name": "series"}, ["sweep-1"])
    assert json.loads((tmp_path / "panels.json").read_text()) == kept


def test_several_series_are_lines_of_one_plot_each_with_what_it_has(tmp_path: Path) -> None:
    for number, tier in enumerate(("quick", "full")):
        write_job(
            tmp_path / "s=1 +", number, "x", result("/r/checkpoint-1", 0.5, tier=tier), ckpt="/r", tier={"name": tier}
        )
    kept = write_panels(read(tmp_path / "s=1 +"), Tracker(), tmp_path / "panels.json")
    mse = section(kept, "Checkpoints")[0]["config"]
    assert (mse["metrics"], mse.get("groupBy")) == (["eval/mse/quick", "eval/mse/full"], None)
    assert section(kept, "Layers")[0]["config"]["metrics"] == ["layer_mse/1/full", "layer_mse/2/full"]
    assert kept["name"] == "runner: s 1"  # W&B refuses symbols in it


def test_figures_over_text_have_a_curve_of_their_own(tmp_path: Path) -> None:
    found = result("/r/checkpoint-1", 0.5)
    found["metrics"]["text"] = {"ppl_ratio": 1.5}
    write_job(tmp_path / "s", 0, "x", found, ckpt="/r")
    comparison = read(tmp_path / "s")
    keys = [
        key
        for panel in section(write_panels(comparison, Tracker(), tmp_path / "p.json"), "Checkpoints")
        for key in panel["config"]["metrics"]
    ]
    assert keys[-1] == "eval/text_ppl_ratio"
    assert comparison_record(comparison).rows[0]["eval/text_ppl_ratio"] == 1.5


def test_a_sweep_without_curves_has_panels_too(tmp_path: Path) -> None:
    write_job(tmp_path / "s", 0, "x", None)
    kept = write_panels(read(tmp_path / "s"), Tracker(), tmp_path / "panels.json")
    assert [each["name"] for each in kept["spec"]["section"]["panelBankConfig"]["sections"]] == ["Comparison"]


def test_online_it_is_saved_and_made_again_in_its_place(
    server: Server, comparison: Comparison, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trackers = [WandbTracker(project="proj"), WandbTracker(project="proj"), WandbTracker(project="other", entity="us")]
    first, again, elsewhere = (write_panels(comparison, each, tmp_path / "panels.json") for each in trackers)
    assert [each.warnings for each in trackers] == [[], [], []]
    assert first["view"] == again["view"]
    assert first["view"]["url"].startswith(f"{server.url}/team/proj?nw=")
    assert elsewhere["view"]["url"].startswith(f"{server.url}/us/other?nw=")
    assert [(view["entityName"], view["projectName"]) for view in server.views.values()] == [
        ("team", "proj"),
        ("us", "other"),
    ]
    sent = next(iter(server.views.values()))
    assert sent["displayName"] == "runner: sweep-1"
    titles = [panel["config"]["chartTitle"] for panel in section({"spec": json.loads(sent["spec"])}, "Checkpoints")]
    assert titles[:2] == ["MSE of the logits", "Cosine of the logits"]
    assert json.loads((tmp_path / "panels.json").read_text()) == elsewhere
    assert capfd.readouterr() == ("", "")


def test_it_is_saved_where_the_runs_are(
    server: Server, comparison: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_ENTITY", "lab")
    kept = write_panels(comparison, WandbTracker(), tmp_path / "panels.json")
    assert (kept["entity"], server.views["view-1"]["entityName"]) == ("lab", "lab")


@pytest.mark.parametrize("mode", ["hang", "garbage", "denied"])
def test_a_server_that_cannot_be_used_costs_one_warning(
    mode: str, server: Server, comparison: Comparison, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    server.break_after("GetDefaultEntity", mode)
    tracker = WandbTracker(init_timeout=1.5 * SLOW)
    for _ in range(2):
        assert "view" not in write_panels(comparison, tracker, tmp_path / "panels.json")
    (warning,) = tracker.warnings
    assert warning.startswith("W&B: the panels are not saved there (")
    assert "\n" not in warning
    assert wandb_module._PROCESS.unreachable
    assert section(json.loads((tmp_path / "panels.json").read_text()), "Checkpoints")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"view": 3}', '{"entity": "team", "project": "runner", "view": {"id": 1}}']
)
def test_a_damaged_file_is_written_anew(content: str, comparison: Comparison, tmp_path: Path) -> None:
    (tmp_path / "panels.json").write_text(content)
    assert "view" not in write_panels(comparison, WandbTracker(mode="offline"), tmp_path / "panels.json")


def test_the_task_writes_beside_the_sweep_or_beside_its_result(run: Callable[..., Any], tmp_path: Path) -> None:
    sweeps = [write_sweep(tmp_path / name, {100: 0.5, 200: 0.4}) for name in ("one", "two, three")]
    done = run("task=panels", f"sweep={sweeps[1]}")
    assert (done.code, done.err) == (0, "")
    assert f"File: {sweeps[1]}/panels.json" in done.out
    assert "Panels: Checkpoints (" in done.out
    done = run("task=panels", f"sweep=[{sweeps[0]},'{sweeps[1]}']")
    assert (done.code, done.err) == (0, "")
    assert done.result["sweep"] == [str(sweep) for sweep in sweeps]
    assert Path(done.result["file"]).name == "panels.json"
    assert not (sweeps[0] / "panels.json").exists()


@pytest.mark.parametrize(("words", "said"), [
    ([], "sweep= is needed"), (["sweep=nowhere"], "no such directory"), (["sweep=."], "no sweep"),
])  # fmt: skip
def test_what_is_no_sweep_is_said_in_one_line(run: Callable[..., Any], words: list[str], said: str) -> None:
    done = run("task=panels", *words)
    assert done.code == 2
    assert said in done.err
    assert done.err.count("\n") == 1


def test_without_the_extra_it_is_named(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    done = run("task=panels", "sweep=.")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "pip install -e '.[panels]' in runner's checkout" in done.err
