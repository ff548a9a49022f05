"""The estimate of a series as the comparison hands it on."""

import json

from runner.comparison.comparison import estimate, read
from tests.comparison.sweeps import result, write_job, write_sweep


def test_a_falling_series_has_a_band_and_words_for_each_open_target():
    steps = list(range(1000, 9000, 1000))
    found = estimate(steps, [40 / step**0.6 for step in steps])
    assert found.words.startswith("mse < 0.1: ")
    assert "mse < 0.05: " in found.words
    assert found.band[0][0] == 1000
    assert all(lower <= median <= upper for _, lower, median, upper in found.band)
    assert [target["target"] for target in found.details["targets"]] == [0.5, 0.1, 0.05]
    json.dumps(found.details, allow_nan=False)


def test_refusals_are_words_without_a_band():
    found = estimate([100, 200], [0.9, 0.8])
    assert found.words == "mse < 0.5, mse < 0.1, mse < 0.05: too few points (2; an estimate needs 6)."
    assert found.band == ()


def test_points_before_a_change_of_the_learning_rate_are_not_fitted(tmp_path):
    mses = {step: 40 / step**0.6 for step in range(1000, 9000, 1000)}
    for step in mses:
        folder = tmp_path / "run" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"learning_rate": 1e-3 if step < 6000 else 1e-4}))
    found = read(write_sweep(tmp_path / "s", mses, run=str(tmp_path / "run"))).series[0].estimate
    assert "too few points (3 since the training changed before step 6,000; an estimate needs 6)" in found.words
    (tmp_path / "run" / "checkpoint-1000" / "config.json").write_text("{")
    for step in range(6000, 9000, 1000):
        (tmp_path / "run" / f"checkpoint-{step}" / "config.json").unlink()
    assert read(tmp_path / "s").series[0].estimate.band != ()


def test_only_series_with_verdicts_are_estimated(tmp_path):
    assert read(write_sweep(tmp_path / "s", {100: 0.5})).series[0].estimate is not None
    write_job(tmp_path / "gpt", 0, "x", result("/runs/gpt/checkpoint-100", 0.5, verdict=None))
    assert read(tmp_path / "gpt").series[0].estimate is None
