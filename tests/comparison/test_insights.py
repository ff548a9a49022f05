"""What a curve says in words, and that it does not say more."""

import pytest

from runner.comparison.comparison import read
from runner.comparison.insights import headline, insights
from tests.comparison.sweeps import result, write_job, write_sweep


def curve(*mses):
    return {100 * (i + 1): mse for i, mse in enumerate(mses)}


@pytest.mark.parametrize(("mses", "level", "words"), [
    ((0.9, 0.5, 0.3, 0.2), "good", "Yes: the mse fell from 0.9 at step 100 to 0.2 at step 400"),
    ((0.9, 0.5), "good", "only 2 checkpoints"),
    ((0.5, 0.49), "warn", "Unclear yet: the mse fell from 0.5 at step 100 to 0.49 at step 200, 2% (only 2 checkpoints)."),
    ((0.5,), "unknown", "Cannot tell from one checkpoint"),
    ((0.1, 0.2, 0.4, 0.9), "bad", "No: the mse went from 0.1 at step 100 to 0.9"),
    ((0.5, 0.5, 0.5, 0.5), "bad", "No: the mse went"),
    ((0.0, 0.0, 0.0, 0.0), "good", "Nothing is left to learn: the mse is below 0.05 at each step"),
    ((0.01, 0.012, 0.011, 0.013), "good", "Nothing is left to learn"),
    ((0.01, 0.02, 0.03, 0.06), "bad", "No: the mse went"),
    ((0.9, 0.5, 0.2, 0.1, 0.3, 0.4), "warn", "lowest at step 400 (0.1), now 0.4"),
    ((0.9, 0.5, 0.2, 0.1, 0.4), "warn", "the mse was 0.1 at step 400 and is 0.4 at step 500; one point"),
    ((0.9, 0.3, 0.2, *[0.201, 0.199, 0.202] * 8), "warn", "hardly any more since step 300"),
    ((0.9, 0.3, 0.03, *[0.0301, 0.0299, 0.0302] * 8), "good", "Yes"),
    ((0.5, 0.4, 0.6, 0.4, 0.45), "warn", "up and down"),
    ((0.9, 0.6, 0.3, 0.21, 0.2, 0.2, 0.199, 0.2, 0.198), "warn", "hardly any more since step 500"),
    ((0.9, 0.1, 0.04, 0.03, 0.03, 0.03), "good", "Yes"),
    ((0.9, 0.5, None, 0.3, None, 0.2), "warn", "0.2 at step 600. There is no finite mse at steps 300, 500."),
    ((0.9, 0.5, None), "bad", "at step 300 there is no finite mse"),
])  # fmt: skip
def test_whether_training_works(tmp_path, mses, level, words):
    found = insights(read(write_sweep(tmp_path / "s", curve(*mses))).series[0])
    assert found.working.level == level
    assert words in found.working.words


def test_readiness_repeats_the_verdict_and_says_since_when(tmp_path):
    found = insights(read(write_sweep(tmp_path / "s", curve(0.9, 0.09, 0.2, 0.08, 0.07))).series[0])
    assert found.ready.words.startswith("For basic use since step 400: at step 500, mse 0.07")
    early = insights(read(write_sweep(tmp_path / "t", curve(0.9, 0.5))).series[0]).ready
    assert early.words.startswith("Not yet: mse 0.5.")
    assert early.more == (
        "Estimate: mse < 0.5, mse < 0.1, mse < 0.05: too few points (2; an estimate needs 6).",
        "Rule of thumb: fine-tuning needed (<1k steps).",
    )


def test_without_a_verdict_none_is_invented(tmp_path):
    write_job(tmp_path / "s", 0, "x", result("/runs/moe/checkpoint-100", 0.5, verdict=None))
    found = insights(read(tmp_path / "s").series[0])
    assert (found.ready.level, found.working.level) == ("unknown", "unknown")


def test_the_worst_layer_is_that_of_the_last_checkpoint_that_has_figures(tmp_path):
    sweep = write_sweep(tmp_path / "s", curve(0.9, 0.5), tier="full")
    rows = [{"layer": 1, "mse": 0.02}, {"layer": 2, "mse": 0.3}, {"layer": 3, "mse": None}, {"layer": [4], "mse": 9}]
    write_job(sweep, 2, "x", result("/runs/a/checkpoint-300", 0.4, tier="full", layers=rows), tier={"name": "full"})
    found = insights(read(sweep).series[0]).layer
    assert found.words == "Layer 2, mse 0.3 alone (next: layer 1, 0.02), at step 300; 1 of 2 layers is not below 0.1."
    assert "tier=full" in insights(read(write_sweep(tmp_path / "q", curve(0.5))).series[0]).layer.words


def test_the_best_checkpoint_is_not_called_clearly_better_when_prompts_disagree(tmp_path):
    sweep = tmp_path / "s"
    for number, mses in enumerate([(0.1, 0.3), (0.2, 0.1)]):
        prompts = [{"prompt": str(i), "mse": mse} for i, mse in enumerate(mses)]
        found = result(f"/runs/a/checkpoint-{number + 1}00", sum(mses) / 2, per_prompt=prompts)
        write_job(sweep, number, "x", found)
    words = insights(read(sweep).series[0]).best.words
    assert words.startswith("checkpoint-200: mse 0.15")
    assert "checkpoint-100 (0.2) is closer on 1 of 2 prompts: not clearly worse" in words


def test_the_headline_names_what_is_missing(tmp_path):
    sweep = write_sweep(tmp_path / "s", curve(0.9, 0.3, 0.08))
    assert headline(read(sweep)).words == "Training works; ready for basic use; best is checkpoint-300."
    write_job(sweep, 3, "x", None)
    found = headline(read(sweep))
    assert (found.level, found.words.endswith("Of 4 jobs 1 lost.")) == ("warn", True)
    write_job(tmp_path / "none", 0, "x", None)
    assert headline(read(tmp_path / "none")).words == "No job left a result: of 1 jobs 1 lost."
    write_job(tmp_path / "merge", 0, "x", {"task": "merge", "status": "ok", "ckpt": "/m"})
    assert "there is no curve" in headline(read(tmp_path / "merge")).words


def test_figures_without_a_comparison_are_no_failure(tmp_path):
    text = {"text": {"ppl": 12.0, "tokens": 40}}
    write_job(
        tmp_path / "s", 0, "x", result("/runs/gpt/checkpoint-100", None, metrics=text, verdict=None, per_prompt=[])
    )
    write_job(tmp_path / "s", 1, "x", {"task": "test", "status": "ok", "ckpt": "/runs/a/checkpoint-1", "step": 1,
                                       "metrics": {"score": 0.9}})  # fmt: skip
    [series] = read(tmp_path / "s").series
    assert (series.run, insights(series).working.level) == ("gpt", "unknown")
    assert headline(read(tmp_path / "s")).level == "unknown"


def test_of_several_curves_the_closest_speaks(tmp_path):
    sweep = write_sweep(tmp_path / "s", curve(0.9, 0.3))
    write_job(sweep, 2, "x", result("/runs/b/checkpoint-100", 0.05))
    assert headline(read(sweep)).words.startswith("Closest of 2 curves is b: one checkpoint shows no trend")
