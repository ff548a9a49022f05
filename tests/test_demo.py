"""The demonstration that comes with the package: what it shows, how a user sees it, and what it is made of."""

import json
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from runner.checkpoints.runs import find_run
from runner.families.npt import EquivalenceSettings
from runner.families.npt.demo import DemoSettings
from runner.installation import demo_run
from tests.conftest import ROOT

FIGURES = json.loads((ROOT / "runner" / "demo" / "figures.json").read_text())
STEPS = [row["step"] for row in FIGURES["steps"]]


def sizes_of(directory: Path) -> dict[str, int]:
    return {str(file.relative_to(directory)): file.stat().st_size for file in directory.rglob("*") if file.is_file()}


def test_the_first_command_shows_what_is_recorded_and_writes_nothing_elsewhere(run, workdir, monkeypatch):
    monkeypatch.setenv("HOME", str(workdir / "home"))
    before = sizes_of(demo_run())
    outcome = run()
    assert outcome.code == 0, outcome.err
    last = FIGURES["steps"][-1]
    assert f"MSE Loss: {last['mse']:.6f}" in outcome.out
    assert outcome.result["step"] == STEPS[-1]
    assert "findings" not in outcome.result
    assert not (workdir / "home").exists()
    assert sizes_of(demo_run()) == before


def test_the_curve_is_the_one_recorded(run):
    outcome = run("-m", "step=all")
    assert outcome.code == 0, outcome.err
    results = sorted(
        (json.loads(file.read_text()) for file in Path("sweeps").glob("*/*/result.json")), key=lambda row: row["step"]
    )
    assert [result["step"] for result in results] == STEPS
    for result, row in zip(results, FIGURES["steps"], strict=True):
        for name in ("mse", "cosine", "kl", "top1"):
            assert result["metrics"][name] == pytest.approx(row[name], rel=1e-3), (row["step"], name)
        for name in ("status", "cosine_status", "progress", "readiness"):
            assert result["verdict"][name] == row[name], row["step"]
    table = [line.split() for line in outcome.out.splitlines() if line.startswith("checkpoint-")]
    assert [row[1] for row in table] == [str(step) for step in STEPS]


def test_it_is_a_training_that_works():
    assert len(STEPS) == 8
    assert FIGURES["steps"][0]["status"] == "poor"
    assert FIGURES["steps"][-1]["status"] in ("good", "excellent")
    assert FIGURES["steps"][-1]["mse"] == min(row["mse"] for row in FIGURES["steps"])


def test_each_layer_alone_is_good(run):
    outcome = run("tier=full")
    assert outcome.code == 0, outcome.err
    assert outcome.result["verdict"]["readiness"] in ("basic", "production")
    assert all(layer["mse"] < 0.5 for layer in outcome.result["layers"])


def test_its_settings_are_those_of_the_recipe():
    settings, recorded = json.loads(json.dumps(asdict(DemoSettings()))), FIGURES["settings"]
    later = {name: settings["npt"].pop(name) for name in settings["npt"].keys() - recorded["npt"].keys()}
    assert recorded == settings
    defaults = {field.name: field.default for field in fields(EquivalenceSettings)}
    assert later == json.loads(json.dumps({name: defaults[name] for name in later})), "a key that came later changes it"
    for _, path in find_run(demo_run()).checkpoints:
        config = json.loads((path / "config.json").read_text())
        assert {name: config[name] for name in settings["npt"]} == settings["npt"]
        assert config["model_name"] == "../base"
    base = json.loads((demo_run() / "base" / "config.json").read_text())
    assert (base["hidden_size"], base["vocab_size"]) == (
        settings["base"]["hidden_size"],
        settings["base"]["vocab_size"],
    )


def test_it_is_small_and_the_files_are_those_that_were_written(run):
    sizes = sizes_of(ROOT / "runner" / "demo")
    assert sum(sizes.values()) <= 8_000_000
    for step in STEPS:
        outcome = run("task=verify", f"step={step}")
        assert outcome.code == 0, outcome.err


def test_training_goes_on_from_its_last_checkpoint_which_alone_has_the_moments(run):
    runs = demo_run()
    short = (f"train.max_steps={STEPS[-1] + 2}", "train.np_rank=16", "train.num_ranks=2")
    outcome = run("task=train", "data=world", *short, f"train.resume_from={runs}")
    assert outcome.code == 0, outcome.err
    outcome = run("task=train", "data=world", *short, f"train.resume_from={runs}/checkpoint-{STEPS[0]}")
    assert outcome.code == 2
    assert "not all of them are there" in outcome.err


def test_a_missing_demonstration_is_one_line(run, monkeypatch, tmp_path):
    monkeypatch.setattr("runner.installation.__file__", str(tmp_path / "confdir.py"))
    (tmp_path / "conf").symlink_to(ROOT / "conf")
    outcome = run()
    assert outcome.code == 2
    assert "the installation has no demonstration" in outcome.err
