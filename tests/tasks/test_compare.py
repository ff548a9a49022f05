"""`task=compare` from the command line, and the end of a real sweep."""

import csv
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from runner.comparison.comparison import read
from runner.comparison.export import to_csv, to_dict
from runner.reports.compare import checkpoint_rows, failures, fitting, summary
from runner.reports.console import print_line
from runner.sweeps.command import conclude
from tests.comparison.sweeps import result, write_job, write_sweep
from tests.conftest import MIXED, npt_tensors, write_npt
from tests.reports.cases import CASES

FILES = ("html", "json", "csv", "png", "svg")


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Eight checkpoints of one run, a failed and a lost job."""
    path = write_sweep(tmp_path / "sweep", {1000 * i: 0.9 / i for i in range(1, 9)})
    write_job(path, 8, "x", {"task": "diagnose", "status": "error", "ckpt": "/runs/a/checkpoint-9000",
                             "error": {"type": "CheckpointError", "message": "cut off"}})  # fmt: skip
    write_job(path, 9, "x", None)
    return path


def test_the_report_has_failures_first_then_what_the_curve_says_and_where_the_page_is(run, sweep):
    outcome = run("task=compare", f"sweep={sweep}")
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    assert lines[0] == "Failed: 8_x: cut off"
    assert lines[1] == "Lost: 9_x: started, but left no result"
    assert lines[2].startswith("Comparison: Training works;")
    assert "Of 10 jobs 1 failed, 1 lost." in lines[2]
    assert any(line.startswith("Readiness: Not yet") and "Estimate: mse < 0.1: " in line for line in lines)
    assert f"Page: {sweep}/comparison.html" in lines
    assert sum(line.startswith("checkpoint-") for line in lines) == 8
    assert all((sweep / f"comparison.{kind}").stat().st_size > 500 for kind in FILES)
    assert outcome.result["series"][0]["estimate"]["targets"][0]["status"] == "reached"
    assert outcome.result["jobs"] == {"all": 10, "ok": 8}


def test_several_sweeps_are_compared_in_the_runs_own_directory(run, sweep, tmp_path):
    other = write_sweep(tmp_path / "other", {1000: 0.5, 2000: 0.4}, run="/runs/b")
    outcome = run("task=compare", f"sweep=[{sweep},{other}]")
    assert outcome.code == 0
    page = Path(outcome.result["files"]["html"])
    assert page.parent.name.endswith("_compare")
    assert [series["label"] for series in outcome.result["series"]] == ["a", "b"]
    assert not (sweep / "comparison.html").exists()


def test_rows_of_one_checkpoint_are_told_apart_by_what_was_swept(tmp_path):
    for number, dtype in enumerate(("float32", "bfloat16")):
        found = result("/runs/a/checkpoint-100", 0.3)
        write_job(tmp_path, number, "x", found, ckpt="/runs/a", step=100, dtype=dtype, tier={"name": "quick"})
    rows = checkpoint_rows(summary(read(tmp_path))["checkpoints"], drawn=False)
    assert [row["variant"] for row in rows] == ["dtype=float32", "dtype=bfloat16"]
    assert "tier" not in rows[0]


@pytest.mark.parametrize(("words", "said"), [
    ([], "sweep= is needed"),
    (["sweep=nowhere"], "no such directory"),
    (["sweep=a,b"], "several are a list: sweep=[A,B]"),
    (["sweep=empty"], "no job folders"),
    (["sweep=[]"], "sweep= is needed"),
])  # fmt: skip
def test_what_is_no_sweep_is_one_line_and_exit_code_2(run, words, said):
    Path("empty").mkdir()
    outcome = run("task=compare", *words)
    assert outcome.code == 2
    assert said in outcome.err
    assert outcome.err.count("\n") == 1


def test_where_nothing_can_be_written_a_sweep_warns_and_keeps_its_results(sweep, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("runner.files.atomic.tempfile.mkstemp", full)
    outcome = conclude(sweep)
    captured = capsys.readouterr()
    assert len(outcome.done) == 8
    assert "runner: warning: " in captured.err
    assert "comparison.json: cannot be written: No space left on device" in captured.err
    assert "checkpoint-8000" in captured.out
    assert "Page:" not in captured.out


def test_a_real_sweep_ends_with_its_comparison(run, tmp_path, base):
    for step, scale in ((100, 0.2), (200, 0.1)):
        write_npt(tmp_path / "run" / f"checkpoint-{step}", npt_tensors(base, MIXED, scale=scale), base=base, step=step)
    (tmp_path / "run" / "checkpoint-300").mkdir()
    outcome = run("-m", f"ckpt={tmp_path}/run", "step=all")
    assert outcome.code == 3
    [page] = Path("sweeps").glob("*/comparison.html")
    assert f"Page: {page}" in outcome.out
    assert "Of 3 jobs 1 failed" in outcome.out
    content = json.loads(page.with_suffix(".json").read_text())
    assert [point["step"] for point in content["series"][0]["points"]] == [100, 200]
    assert [job["status"] for job in content["jobs"]] == ["ok", "ok", "failed"]
    assert content["jobs"][0]["metrics"]["mse"] > content["jobs"][1]["metrics"]["mse"] > 0


def test_the_table_as_csv_has_one_row_a_job_and_no_formulas(sweep):
    write_job(sweep, 10, "x", result("/runs/a/checkpoint-9500", 0.1, tier="=cmd()", format="-x"))
    rows = list(csv.DictReader(io.StringIO(to_csv(read(sweep)))))
    assert [row["status"] for row in rows] == ["ok"] * 8 + ["failed", "lost", "ok"]
    assert (rows[0]["step"], float(rows[0]["mse"]), rows[0]["verdict.progress"]) == ("1000", 0.9, "10")
    assert (rows[10]["tier"], rows[10]["format"]) == ("'=cmd()", "'-x")


def test_the_json_holds_every_figure_and_is_strict(sweep):
    content = json.loads(json.dumps(to_dict(read(sweep)), allow_nan=False))
    assert content["jobs"][3]["metrics"]["mse"] == 0.9 / 4
    assert content["headline"]["level"] == "warn"
    assert set(content["series"][0]["answers"]) == {"working", "ready", "layer", "best"}


def test_a_narrow_terminal_gets_fewer_columns():
    job = {"checkpoint": "checkpoint-22000", "run": "r", "tier": "quick", "variant": "", "step": 22000, "mse": 0.1, "cosine": 0.9,
           "kl": 0.1, "top1": 0.5, "status": "good", "progress": 90, "readiness": "basic"}  # fmt: skip
    rows = checkpoint_rows([job], drawn=True)
    for width in (200, 78, 60, 50):
        fitted = fitting(rows, width, gap=1)
        widths = [max(len(name), len(str(cell))) + 1 for name, cell in fitted[0].items()]
        assert sum(widths) <= width
        assert {"checkpoint", "step", "mse", "cosine", "readiness"} <= set(fitted[0])
    assert len(fitting(rows, 200, gap=1)[0]) == 9
    assert fitting([], 10, gap=1) == []


def test_rows_keep_their_run_and_checkpoint_in_80_columns():
    name = "llama-3.2-1b_npt_triple_rank64_layer{}_lr1e-4/checkpoints"
    jobs = [{"checkpoint": "checkpoint-22000", "run": name.format(i), "tier": tier, "variant": "dtype=bfloat16", "step": 22000,
             "mse": 0.1, "cosine": 0.9, "kl": 0.1, "top1": 0.5, "status": "good", "progress": 90, "readiness": "basic"}
            for i in (1, 2) for tier in ("quick", "full")]  # fmt: skip
    fitted = fitting(checkpoint_rows(jobs, drawn=True), 74, gap=2)
    assert sum(max(len(key), *(len(str(row[key])) for row in fitted)) + 2 for key in fitted[0]) <= 76
    assert [(row["run"], row["tier"]) for row in fitted] == [
        ("…layer1_…", "quick"), ("…layer1_…", "full"), ("…layer2_…", "quick"), ("…layer2_…", "full")]  # fmt: skip


def test_a_job_whose_checks_fail_says_which_and_why():
    said = io.StringIO()
    checks = [{"name": "keys", "status": "pass"}, {"name": "model", "status": "fail", "details": "no base model"}]
    for rows in (checks, [*checks, {"name": "router", "status": "fail", "details": "x"}]):
        print_line({"status": "ok", "ckpt": "/a/b", "checks": rows}, Console(file=said, width=200), number=1)
    assert said.getvalue().splitlines() == [
        "#1 b: 1 check failed: model (no base model)",
        "#1 b: 2 checks failed: model, router",
    ]


def test_a_job_that_ends_well_is_one_line_with_its_figures():
    found = result("/runs/a/checkpoint-100", 0.25)
    said = io.StringIO()
    print_line(found, Console(file=said, width=200), number=3)
    assert said.getvalue().startswith("#3 checkpoint-100: mse 0.2500, cosine ")
    assert said.getvalue().rstrip().endswith(found["verdict"]["status"])


def test_a_sweep_of_tests_shows_which_checks_failed(run, tmp_path):
    outcome = run("task=compare", f"sweep={CASES['checks_only'](tmp_path / 's')}")
    lines = outcome.out.splitlines()
    assert lines[lines.index("tests") + 1].split() == [
        "checkpoint", "tier", "pass", "warning", "fail", "skipped", "overall", "details"]  # fmt: skip
    assert lines[lines.index("tests") + 3].split() == [
        "checkpoint-200",
        "full",
        "1",
        "0",
        "1",
        "0",
        "NOT_READY",
        "keys",
    ]


def test_many_failures_of_one_kind_share_a_line():
    rows = [{"job": f"{i}_x", "status": "never_started", "message": "it was planned"} for i in range(9)]
    assert failures(rows) == [("never started", "9 jobs, 0_x … 8_x: it was planned")]
    assert len(failures(rows[:3])) == 3


def test_jobs_without_a_verdict_have_no_columns_for_it(tmp_path):
    write_job(tmp_path / "s", 0, "x", result("/runs/gpt/checkpoint-100", 0.5, verdict=None))
    rows = checkpoint_rows(summary(read(tmp_path / "s"))["checkpoints"], drawn=False)
    assert list(rows[0]) == ["checkpoint", "step", "mse", "cosine", "kl", "top1"]


def test_the_report_counts_what_failed_its_checks(run, tmp_path):
    outcome = run("task=compare", f"sweep={CASES['checks_only'](tmp_path / 's')}")
    assert outcome.result["headline"]["level"] == "bad"
    assert outcome.result["jobs"] == {"all": 2, "ok": 0, "failed_checks": 2}
    assert "Jobs: 0 of 2 ok, 2 with failed checks" in outcome.out.splitlines()
