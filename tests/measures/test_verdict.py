"""The verdict at and around each threshold of conf/verdict.yaml."""

import pytest
from omegaconf import OmegaConf

from runner.metrics.verdict import Thresholds, cosine_status, judge, mse_status, progress
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
