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
    assert early.words.startswith("Not yet at step 200: mse 0.5.")
    assert early.more == (
        "Estimate: mse < 0.5, mse < 0.1, mse < 0.05: too few points (2; an estimate needs 6).",
        "Rule of thumb: fine-tuning needed (<1k steps).",
    )


def test_without_a_verdict_none_is_invented(tmp_path):
    write_job(tmp_path / "s", 0, "x", result("/runs/moe/checkpoint-100", 0.5, verdict=None))
    found = insights(read(tmp_path / "s").series[0])
    assert (found.ready.level, found.working.level) == ("unknown", "unknown")


def test_the_worst_layer_is_that_of_the_last_checkpoint_that_has_figures(tmp_path):
    sweep = tmp_path / "s"
    rows = [{"layer": 1, "mse": 0.02}, {"layer": 2, "mse": 0.3}, {"layer": 3, "mse": None}, {"layer": [4], "mse": 9}]
    for number, step in enumerate((100, 200)):
        earlier = result(f"/runs/a/checkpoint-{step}", 0.9, tier="full", layers=[{**row, "mse": 1} for row in rows])
        write_job(sweep, number, "x", earlier, tier={"name": "full"})
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


def checks(*failed, integrity=True, names=("files", "keys", "finite")):
    return [
        {"name": name, "status": "fail" if name in failed else "pass", "integrity": integrity, "details": "x"}
        for name in names
    ]


def checked_jobs(path, count, *failed):
    for number in range(count):
        write_job(path, number, "x", {"task": "test", "status": "ok", "ckpt": f"/runs/a/checkpoint-{number + 1}00",
                                      "step": 100 * (number + 1), "tier": "quick", "checks": checks(*failed),
                                      "passed": not failed})  # fmt: skip
    return path


def test_a_sweep_of_tests_says_first_what_failed(tmp_path):
    found = headline(read(checked_jobs(tmp_path / "bad", 4, "keys")))
    assert (found.level, found.words) == ("bad", "4 jobs checked. Checks failed in 4 of 4 jobs: keys (4).")
    found = headline(read(checked_jobs(tmp_path / "good", 4)))
    assert (found.level, found.words) == ("good", "4 jobs checked, no check failed.")


def test_one_failed_check_takes_the_green_from_a_good_curve(tmp_path):
    sweep = write_sweep(tmp_path / "s", curve(0.9, 0.3, 0.08))
    assert headline(read(sweep)).level == "good"
    write_job(sweep, 3, "x", {"task": "test", "status": "ok", "ckpt": "/runs/a/checkpoint-200", "step": 200,
                              "checks": checks("finite"), "passed": False})  # fmt: skip
    found = headline(read(sweep))
    assert (found.level, "Checks failed in 1 of 4 jobs: finite." in found.words) == ("warn", True)


def test_a_damaged_checkpoint_is_neither_best_nor_ready(tmp_path):
    sweep = write_sweep(tmp_path / "s", curve(0.9, 0.3, 0.08, 0.05))
    # Another job of the sweep found the damage.
    write_job(sweep, 4, "x", {"task": "test", "status": "ok", "ckpt": "/runs/a/checkpoint-400", "step": 400,
                              "checks": checks("finite"), "passed": False})  # fmt: skip
    compared = read(sweep)
    found = insights(compared.series[0])
    assert found.best.words.startswith("checkpoint-300: mse 0.08")
    assert "Left out, as an integrity check failed: checkpoint-400." in found.best.words
    assert found.ready.level == "bad"
    assert "best is checkpoint-300." in headline(compared).words


def test_a_poor_score_is_no_damage(tmp_path):
    sweep = write_sweep(tmp_path / "s", curve(0.9, 0.3))
    write_job(sweep, 2, "x", {"task": "test", "status": "ok", "ckpt": "/runs/a/checkpoint-200", "step": 200,
                              "checks": checks("fidelity", integrity=False, names=("fidelity",)), "passed": True})  # fmt: skip
    assert insights(read(sweep).series[0]).best.words.startswith("checkpoint-200")


def test_the_best_checkpoint_is_that_of_all_curves(tmp_path):
    sweep = write_sweep(tmp_path / "s", curve(0.9, 0.3))
    for number, (step, mse) in enumerate(((100, 0.01), (200, 0.5)), 2):  # close once, and then away
        write_job(sweep, number, "x", result(f"/runs/b/checkpoint-{step}", mse))
    words = headline(read(sweep)).words
    assert words.startswith("Closest of 2 curves is a:")
    assert words.endswith("best is checkpoint-100 of b.")


def test_checkpoints_that_share_only_a_folder_are_ranked(tmp_path):
    for number, (name, mse) in enumerate((("merged", 0.3), ("finetuned", 0.1), ("old", 0.2))):
        found = result("/models/checkpoint-100", mse) | {"ckpt": f"/models/{name}", "step": 100 * (number + 1)}
        write_job(tmp_path / "named", number, "x", found)
    compared = read(tmp_path / "named")
    assert (compared.series, [job.checkpoint for job in compared.ranking]) == ((), ["finetuned", "old", "merged"])
    said = headline(compared).words
    assert said.startswith("Closest is finetuned (mse 0.1, cosine 0.9700), then old (mse 0.2")
    assert "no curve" in said


@pytest.mark.parametrize("changed", [
    {"layers": [{"layer": 3, "modulation": "triple", "np_rank": 4, "num_ranks": 1}]},
    {"layers": [{"layer": i, "modulation": "triple", "np_rank": 8, "num_ranks": 1} for i in (1, 2)]},
    {"layers": [{"layer": i, "modulation": "dual", "np_rank": 4, "num_ranks": 1} for i in (1, 2)]},
    {"base": "/models/other"},
])  # fmt: skip
def test_a_checkpoint_of_another_make_is_not_in_the_curve(tmp_path, changed):
    sweep = write_sweep(tmp_path / "s", curve(0.9, 0.3))
    write_job(sweep, 2, "x", result("/runs/a/checkpoint-300", 0.01) | changed)
    compared = read(sweep)
    assert [series.steps for series in compared.series] == [[100, 200]]
    assert [job.step for job in compared.ranking] == [300]
    write_job(sweep, 3, "x", result("/runs/a/checkpoint-400", 0.01) | changed)  # two are a curve of their own
    both = read(sweep).series
    assert [series.steps for series in both] == [[100, 200], [300, 400]]
    assert len({series.label for series in both}) == 2
