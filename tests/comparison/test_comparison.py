"""What a sweep's folders say, read back."""

import json

import pytest

from runner.comparison.comparison import display_names, read, without_shared_ends
from runner.errors import ConfigError
from tests.comparison.sweeps import result, write_job, write_sweep


def test_the_jobs_are_rows_in_numeric_order_and_one_ascending_curve(tmp_path):
    write_sweep(tmp_path / "s", {step: 1 / step for step in range(1200, 0, -100)})
    found = read(tmp_path / "s")
    assert [job.name.partition("_")[0] for job in found.jobs] == [str(i) for i in range(12)]
    assert [(s.run, s.tier, s.variant) for s in found.series] == [("a", "quick", "")]
    assert found.series[0].steps == list(range(100, 1300, 100))
    assert found.series[0].values("mse") == [1 / step for step in range(100, 1300, 100)]
    assert found.jobs[0].log == tmp_path / "s" / "0_checkpoint-1200" / "runner.log"
    assert found.jobs[0].seconds == 0.5
    assert list(found.differences) == ["step"]


def test_failed_lost_and_never_started_are_told_apart(tmp_path):
    sweep = write_sweep(tmp_path / "s", {100: 0.5})
    write_job(sweep, 1, "x", {"task": "diagnose", "status": "error", "ckpt": "/runs/a/checkpoint-200",
                              "error": {"type": "CheckpointError", "message": "two\nlines \x1b[31m"}})  # fmt: skip
    write_job(sweep, 2, "x", None, ckpt="/runs/a", step=300, tier={"name": "full"})
    plan = [{"number": 3, "directory": "3_x", "overrides": ["ckpt=/runs/a", "step=400", "tier=quick"], "reason": "no room"},
            {"number": 4, "directory": "../4_x"}, 5]  # fmt: skip
    (sweep / "sweep.json").write_text(json.dumps({"jobs": plan}))
    found = read(sweep)
    assert [job.status for job in found.jobs] == ["ok", "failed", "lost", "never_started"]
    assert [job.step for job in found.jobs] == [100, 200, 300, 400]
    assert [job.run for job in found.jobs] == ["a"] * 4
    assert found.jobs[1].error == {"type": "CheckpointError", "message": "two\\nlines \\x1b[31m"}
    assert found.jobs[3].tier == "quick"
    assert [job.error["message"] for job in found.jobs[2:]] == ["started, but left no result", "no room"]
    assert (len(found.done), len(found.failures)) == (1, 3)


@pytest.mark.parametrize("content", ["{", "[]", '{"status": "ok", "metrics": [1], "layers": 3, "error": "x", "step": true}',
                                     '{"status": "ok", "step": "12", "metrics": {"mse": NaN, "cosine": "high"}}'])  # fmt: skip
def test_a_damaged_or_odd_result_is_a_row_too(tmp_path, content):
    job = write_job(tmp_path / "s", 0, "x", None)
    (job / "result.json").write_text(content)
    found = read(tmp_path / "s")
    assert found.jobs[0].status == ("ok" if "ok" in content else "lost")
    assert found.jobs[0].metric("mse") is None
    assert found.jobs[0].metric("cosine") is None


def test_tiers_runs_and_variants_are_separate_curves(tmp_path):
    sweep, number = tmp_path / "s", 0
    for dtype in ("float32", "bfloat16"):
        for tier in ("quick", "full"):
            for step in (100, 200):
                found = result(f"/runs/a/checkpoint-{step}", 0.1, tier=tier)
                write_job(sweep, number, "x", found, ckpt="/runs/a", step=step, dtype=dtype, tier={"name": tier})
                number += 1
    write_job(sweep, number, "x", result("/runs/b/checkpoint-100", 0.1), ckpt="/runs/b", step=100, dtype="float32")
    labels = [series.label for series in read(sweep).series]
    assert labels == ["a · quick · dtype=float32", "a · quick · dtype=bfloat16", "a · full · dtype=float32",
                      "a · full · dtype=bfloat16", "b · quick"]  # fmt: skip


def test_long_names_lose_what_all_of_them_share():
    run = "llama-3.2-1b_npt_triple_rank64_layer{}_lr1e-4_seed{}/checkpoints · full"
    labels = [run.format(number, 2 * number) for number in (1, 2, 12)]
    assert without_shared_ends(labels) == [
        "…layer1_lr1e-4_seed2/…",
        "…layer2_lr1e-4_seed4/…",
        "…layer12_lr1e-4_seed24/…",
    ]
    same_start = ["a" * 50, "a" * 50 + " and more", "a" * 50 + " and other"]
    assert len(set(without_shared_ends(same_start))) == 3
    assert all(without_shared_ends(same_start))
    assert without_shared_ends(["runs/a", "runs/b"]) == ["runs/a", "runs/b"]


def test_several_sweeps_over_one_run_are_joined_where_they_do_not_overlap(tmp_path):
    first = write_sweep(tmp_path / "one", {100: 0.5, 200: 0.4})
    second = write_sweep(tmp_path / "two", {300: 0.3})
    again = write_sweep(tmp_path / "three", {200: 0.2})
    assert [(s.label, s.steps) for s in read([first, second]).series] == [("a · quick", [100, 200, 300])]
    assert [(s.label, s.steps) for s in read([first, again]).series] == [("one", [100, 200]), ("three", [200])]
    assert len(read([first, first]).jobs) == 2


def test_a_version_with_more_thresholds_goes_on_with_the_curve(tmp_path):
    for number, thresholds in enumerate(({"layer_mse": 0.1}, {"layer_mse": 0.1, "trend": {"steady": 0.75}})):
        found = result(f"/runs/a/checkpoint-{100 + number}", 0.5)
        write_job(tmp_path, number, "x", found, ckpt="/runs/a", step=100 + number, verdict=thresholds)
    assert [series.steps for series in read(tmp_path).series] == [[100, 101]]
    assert "verdict.trend.steady" in read(tmp_path).differences


def test_a_job_without_step_or_figures_is_in_no_curve(tmp_path):
    write_job(tmp_path / "s", 0, "x", {"task": "merge", "status": "ok", "ckpt": "/out/merged"})
    found = read(tmp_path / "s")
    assert (found.series, found.jobs[0].run) == ((), "merged")


def test_runs_of_one_name_are_told_apart():
    assert display_names(["/a/run", "/b/run", "/b/other", ""]) == {
        "/a/run": "a/run", "/b/run": "b/run", "/b/other": "other", "": ""}  # fmt: skip


def test_what_is_no_sweep_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for path, words in {"missing": "no such directory", "file": "no directory", "empty": "no job folders"}.items():
        with pytest.raises(ConfigError, match=words):
            read(tmp_path / path)
    with pytest.raises(ConfigError, match="names no directory"):
        read([])
