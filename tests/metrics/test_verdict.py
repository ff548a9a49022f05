"""The verdict at and around each threshold of conf/verdict.yaml."""

import pytest
import yaml
from omegaconf import OmegaConf

from runner.checks import quality
from runner.comparison.insights import trend
from runner.metrics import verdict
from runner.metrics.verdict import Thresholds, cosine_status, judge, mse_status, progress
from runner.tasks.test import overall
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def thresholds():
    values = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "verdict.yaml"))
    values.pop("_target_")
    return Thresholds(**values)


@pytest.mark.parametrize(
    ("mse", "status"),
    [(0.0, "excellent"), (0.0499, "excellent"), (0.05, "good"), (0.0999, "good"), (0.1, "fair"), (0.4999, "fair"),
     (0.5, "poor"), (9.0, "poor"), (None, "poor")],
)  # fmt: skip
def test_mse_status(mse, status, thresholds):
    assert mse_status(mse, thresholds) == status


@pytest.mark.parametrize(
    ("cosine", "status"),
    [(1.0, "excellent"), (0.9501, "excellent"), (0.95, "good"), (0.9, "good"), (0.8999, "moderate"), (0.8, "moderate"),
     (0.7999, "poor"), (-1.0, "poor"), (None, "poor")],
)  # fmt: skip
def test_cosine_status(cosine, status, thresholds):
    assert cosine_status(cosine, thresholds) == status


@pytest.mark.parametrize(
    ("mse", "percent", "words"),
    [(1.888, 10, ">10k steps"), (1.0, 10, ">10k steps"), (0.9999, 30, "5k-10k"), (0.5, 30, "5k-10k"), (0.35, 70, "1k-5k"),
     (0.1, 70, "1k-5k"), (0.085, 90, "<1k"), (0.05, 90, "<1k"), (0.0499, 100, "complete"), (0.0, 100, "complete")],
)  # fmt: skip
def test_progress(mse, percent, words, thresholds):
    found, remaining = progress(mse, thresholds)
    assert found == percent
    assert words in remaining


@pytest.mark.parametrize(
    ("mse", "cosine", "layers", "readiness"),
    [
        (0.01, 0.99, [0.01] * 8 + [0.5] * 2, "production"),
        (0.01, 0.99, [0.01] * 7 + [0.5] * 3, "basic"),  # 70 % is not more than 70 %
        (0.01, 0.99, [0.01, None], "basic"),
        (0.01, 0.99, None, "basic"),
        (0.01, 0.94, [0.01], "basic"),
        (0.05, 0.99, [0.01], "basic"),
        (0.1, 0.99, [0.01], "continue"),
        (0.09, 0.9, [0.01], "continue"),
        (0.4, 0.71, None, "continue"),
        (0.4, 0.7, None, "early"),
        (0.5, 0.99, None, "early"),
        (None, None, None, "early"),
    ],
)
def test_readiness(mse, cosine, layers, readiness, thresholds):
    verdict = judge(mse, cosine, thresholds, layer_mses=layers)
    assert verdict["readiness"] == readiness
    assert verdict["reason"]
    assert verdict["recommendation"]


def test_words_for_a_wrong_magnitude(thresholds):
    verdict = judge(1.29, 0.966, thresholds)
    assert "direction right, magnitude wrong" in verdict["reason"]
    assert "learning rate" in verdict["recommendation"]
    assert "initialisation" in judge(2.0, 0.1, thresholds)["recommendation"]


def test_missing_layer_figures_are_asked_for(thresholds):
    assert "run tier=full" in judge(0.01, 0.99, thresholds)["reason"]


def test_generations_are_part_of_the_reason(thresholds):
    rows = [{"agreement": 0.5, "repetition": 0.6, "reference_repetition": 0.1}]
    reason = judge(0.01, 0.99, thresholds, layer_mses=[0.0], generations=rows)["reason"]
    assert "50% of the tokens (under 90%)" in reason
    assert "repeat themselves" in reason


@pytest.fixture
def other_thresholds(monkeypatch, tmp_path):
    """Called with changed values: conf/verdict.yaml with these instead."""
    values = yaml.safe_load((ROOT / "conf" / "verdict.yaml").read_text())

    def write(**changed):
        (tmp_path / "verdict.yaml").write_text(yaml.safe_dump({**values, **changed}, sort_keys=False))
        monkeypatch.setattr(verdict, "config_directory", lambda: tmp_path)
        verdict.thresholds.cache_clear()

    yield write
    verdict.thresholds.cache_clear()


def test_the_file_is_the_one_source_of_every_threshold(other_thresholds):
    rows = [{"status": "warning", "integrity": False, "score": 0.7}]
    points = [(100, 1.0), (200, 0.7)]
    words = (quality.grade(0.08, 0.96), quality.word_of(0.7), overall(rows), trend(points).level)
    assert words == ("PASS", "WARNING", "PARTIALLY_READY", "good")
    other_thresholds(
        quality={"PASS": {"mse": 0.01, "cosine": 0.99}, "WARNING": {"mse": 0.05, "cosine": 0.9}},
        quality_score={"PASS": 0.6, "WARNING": 0.1},
        overall={"READY": 0.65, "PARTIALLY_READY": 0.1},
        trend={"steady": 0.75, "gain": 0.95, "turned": 1.5, "fallen": 0.5},
    )
    words = (quality.grade(0.08, 0.96), quality.word_of(0.7), overall(rows), trend(points).level)
    assert words == ("FAIL", "PASS", "READY", "warn")
