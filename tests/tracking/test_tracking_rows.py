import json
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from runner.errors import ConfigError
from runner.tracking.base import RunIdentity, Tracker, flat_config, run_id
from runner.tracking.rows import eval_row, layer_rows, summary, tables
from runner.tracking.wandb import WandbTracker


def test_the_point_has_every_number_flat(result: dict[str, Any]) -> None:
    assert eval_row(result, 2000) == {
        "checkpoint/step": 2000,
        "eval/mse": 0.25,
        "eval/cosine": 0.9,
        "eval/kl": 0.125,
        "eval/top1": 0.75,
        "eval/text_ppl": 3.5,
        "eval/progress": 70,
    }


def test_without_figures_there_is_no_point() -> None:
    assert eval_row({"task": "inspect", "status": "ok"}, 2000) == {}
    assert eval_row({"metrics": {"mse": float("nan"), "ok": True}}, 2000) == {}
    assert "checkpoint/step" not in eval_row({"metrics": {"mse": 0.5}}, None)


def test_only_measured_layers_are_rows(result: dict[str, Any]) -> None:
    result["layers"].append({"layer": 4, "modulation": "dual"})
    assert layer_rows(result) == [
        {"layer/index": 1, "layer/mse": 0.05, "layer/cosine": 0.99, "layer/kl": 0.01},
        {"layer/index": 3, "layer/mse": 0.2, "layer/cosine": 0.95, "layer/kl": 0.02},
    ]


def test_tables_carry_the_step_and_every_column(result: dict[str, Any]) -> None:
    result["layers"][1]["sources"] = ["a", "b"]
    made = tables(result, 2000)
    assert list(made) == ["tables/per_layer", "tables/per_prompt"]
    layers = made["tables/per_layer"]
    assert layers.columns == ["ckpt_step", "layer", "modulation", "np_rank", "mse", "cosine", "kl", "sources"]
    assert layers.rows[0] == [2000, 1, "dual", 8, 0.05, 0.99, 0.01, None]
    assert layers.rows[1][-1] == '["a", "b"]'
    assert tables({"layers": []}, 2000) == {}


def test_the_summary_of_a_merge() -> None:
    merged = {
        "status": "ok",
        "found_layers": [11, 13],
        "keys": 12,
        "parameters": 4096,
        "sources": {"11": "run_a", "13": "run_b"},
    }
    assert summary(merged) == {
        "status": "ok",
        "merge/layers": [11, 13],
        "merge/keys": 12,
        "merge/parameters": 4096,
        "merge/sources": ["run_a", "run_b"],
    }


def test_the_summary_of_a_failed_job() -> None:
    failed = {"task": "diagnose", "status": "error", "error": {"type": "CheckpointError", "message": "no such file"}}
    assert summary(failed) == {"status": "error", "error": "no such file"}


def test_the_name_and_the_tags() -> None:
    whole = RunIdentity(task="diagnose", run_name="run7", step=0, family="npt", format="auto", tier="quick")
    assert whole.name == "diagnose/run7@0"
    assert whole.tags == ("npt", "quick")
    assert RunIdentity(task="train", run_name="run8").name == "train/run8"


def test_the_id_depends_on_task_step_and_config_and_holds_safe_characters() -> None:
    identity = RunIdentity(task="my:task/#1", run_name="r", step=5)
    first = run_id(identity, {"a": 1, "b": {"c": 2}})
    assert first == run_id(identity, {"b": {"c": 2}, "a": 1})
    assert first.startswith("my_task_1-5-")
    assert not set(first) & set(":;,#?/'\"")
    others = [
        run_id(identity, {"a": 1, "b": {"c": 3}}),
        run_id(RunIdentity(task="my:task/#1", run_name="r", step=6), {"a": 1, "b": {"c": 2}}),
        run_id(RunIdentity(task="other", run_name="r", step=5), {"a": 1, "b": {"c": 2}}),
    ]
    assert len({first, *others}) == 4


def test_the_flat_keys_win_and_options_are_kept(identity: RunIdentity) -> None:
    config = {"seed": 0, "task": "diagnose", "family": {"name": "npt", "device_map": None}}
    assert flat_config(identity, config) == {
        "seed": 0,
        "task": "diagnose",
        "family": "npt",
        "family_options": {"name": "npt", "device_map": None},
        "format": None,
        "ckpt_step": 2000,
        "series": "sweep-1",
    }
    assert json.dumps(config) == json.dumps({"seed": 0, "task": "diagnose", "family": config["family"]})


@pytest.mark.parametrize(("name", "kind"), [("wandb", WandbTracker), ("none", Tracker)])
def test_each_yaml_builds_its_tracker(name: str, kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    config = OmegaConf.load(Path(__file__).parents[2] / "conf" / "tracker" / f"{name}.yaml")
    assert isinstance(instantiate(config), kind)
    if name == "wandb":
        assert (config.project, config.dir, config.mode) == ("runner", "outputs/wandb", "auto")
        monkeypatch.setenv("WANDB_PROJECT", "mine")
        monkeypatch.setenv("WANDB_DIR", "elsewhere")
        assert (config.project, config.dir) == ("mine", "elsewhere/wandb")


def test_the_null_tracker_has_nothing_to_say(identity: RunIdentity, result: dict[str, Any]) -> None:
    tracker = Tracker()
    tracker.start(identity, {})
    tracker.log({"train/step": 1})
    tracker.record(result)
    tracker.finish(0)
    assert tracker.location is None
    assert tracker.warnings == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mode": "on"}, "tracker.mode must be one of auto, online, offline, not 'on'"),
        ({"project": ""}, "tracker.project must be a text, not ''"),
        ({"project": "a/b"}, "tracker.project: at most 128 characters, none of / \\ # ? % :"),
        ({"dir": None}, "tracker.dir must be a text, not None"),
        ({"entity": 3}, "tracker.entity must be a text or null, not 3"),
        ({"init_timeout": 0}, "tracker.init_timeout must be a number of seconds above 0, not 0"),
        ({"finish_timeout": True}, "tracker.finish_timeout must be a number of seconds above 0, not True"),
    ],
)
def test_values_of_another_kind_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        WandbTracker(**values)
    assert str(raised.value) == message
