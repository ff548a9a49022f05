"""`task=test` from the command line: what is run, what is said, what is left, and the exit code."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from runner.checks import memory
from runner.reports import tasks as reports
from runner.tasks.test import overall
from tests.checkpoints.test_toy_format import toy  # noqa: F401 - a fixture
from tests.conftest import ROOT, npt_tensors, write_base, write_npt
from tests.gpt_files import random_state, script_file
from tests.lora_files import write_adapter, write_moe

HEAVY = ("torch", "transformers", "peft", "wandb")


def checks(outcome) -> dict[str, str]:
    return {row["name"]: row["status"] for row in outcome.result["checks"]}


@pytest.mark.parametrize("words", [[], ["family=lora_moe"], ["format=gpt_small"]])
def test_quick_looks_at_the_machine(run, words):
    outcome = run("task=test", *words)
    assert (outcome.code, outcome.err) == (0, "")
    assert checks(outcome) == dict.fromkeys(("versions", "peft", "safetensors", "formats", "writable"), "pass")
    for line in ("Tier: quick", "Checks: 5 pass", "Passed: yes"):
        assert line in outcome.out.splitlines()
    assert "ckpt" not in outcome.result
    assert all(row["seconds"] >= 0 and row["peak_bytes"] > 0 for row in outcome.result["checks"])
    assert not list(Path("outputs").rglob("scratch"))


def test_quick_imports_nothing_heavy(tmp_path, base):
    light = write_moe(tmp_path / "moe", base)
    (light / "skill_library.pt").unlink()
    paths = [light, write_adapter(tmp_path / "adapter", base), base]
    code = (
        "import json, sys; from runner.cli import run; "
        "codes = [run(['task=test', 'tracker=none', *words]) for words in json.loads(sys.argv[1])]; "
        f"print(codes, [m for m in {HEAVY} if m in sys.modules], file=sys.stderr)"
    )
    commands = [[], *([f"ckpt={path}"] for path in paths)]
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(commands)], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]},
    )  # fmt: skip
    assert done.stderr.strip() == "[0, 0, 0, 0] []"
    assert done.stdout.count("Passed: yes") == 4


@pytest.mark.parametrize("family", ["auto", "lora_moe", "gpt"])
def test_minimal_builds_saves_and_looks(run, family):
    outcome = run("task=test", "tier=minimal", f"family={family}", *(["experts=3"] if family == "lora_moe" else []))
    assert (outcome.code, outcome.err) == (0, "")
    assert set(checks(outcome).values()) <= {"pass", "skipped"}
    assert {"built", "files", "keys", "shapes", "size", "loading", "hashes", "finite"} <= checks(outcome).keys()
    assert outcome.result["family"] == {"auto": "npt"}.get(family, family)
    assert "model" not in checks(outcome)
    assert not list(Path("outputs").rglob("scratch")), "nothing is left"
    if family == "lora_moe":
        assert "3 in config, router and directories" in outcome.out


def test_keep_leaves_a_checkpoint_that_opens_by_itself(run):
    outcome = run("task=test", "tier=minimal", "family=lora_moe", "keep=true")
    path = Path(outcome.result["ckpt"])
    assert f"Kept: {path}" in outcome.out.splitlines()
    assert run("task=inspect", f"ckpt={path}").code == 0
    assert run("task=test", f"ckpt={path}").code == 0


def test_minimal_over_a_base_of_ones_own(run, base):
    outcome = run("task=test", "tier=minimal", "family=npt", f"base={base}")
    assert outcome.code == 0
    assert "layers 1: dual, k 2; 2: dual, k 2" in outcome.out


def test_a_failed_integrity_check_is_exit_code_1_and_shows_once(run, checkpoint):
    tensors = torch.load(checkpoint / "npt_weights.pt", weights_only=True)
    del tensors["layer_0_np.W_a_up"]
    torch.save(tensors, checkpoint / "npt_weights.pt")
    outcome = run("task=test", "tier=minimal", f"ckpt={checkpoint}")
    assert (outcome.code, outcome.err) == (1, "")
    assert [name for name, status in checks(outcome).items() if status == "fail"] == ["keys"]
    assert "missing layer_0_np.W_a_up" in outcome.out
    assert "Passed: NO" in outcome.out.splitlines()
    assert any(line.startswith("Recommendation (keys): ") for line in outcome.out.splitlines())


def test_a_base_of_another_size_is_one_fault(run, checkpoint, tmp_path):
    other = write_base(tmp_path / "other", hidden=64)
    outcome = run("task=test", "tier.checks=[base,loading,model,forward]", f"ckpt={checkpoint}", f"base={other}")
    assert checks(outcome) == {"base": "fail", "loading": "pass", "model": "skipped", "forward": "skipped"}


def test_a_reader_that_leaves_early_does_not_change_the_exit_code(checkpoint, tmp_path):
    (checkpoint / "npt_weights.pt").write_bytes(b"damaged")
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "runner", "task=test", "tracker=none", f"ckpt={checkpoint}"], cwd=tmp_path, check=False,
        stdout=writing, stderr=subprocess.PIPE, text=True,
        env={"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]},
    )  # fmt: skip
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def test_strict_counts_warnings(run):
    words = ("task=test", "tier.checks=[versions,writable]", "tier.max_size_mb=1e12")
    outcome = run(*words)
    assert (outcome.code, checks(outcome)["writable"]) == (0, "warning")
    assert run(*words, "strict=true").code == 1


def test_what_cannot_be_read_fails_the_check_of_files(run, tmp_path):
    file = tmp_path / "some.pt"
    file.write_bytes(b"PK\x03\x04" + b"x" * 200)
    outcome = run("task=test", f"ckpt={file}")
    assert (outcome.code, checks(outcome)["files"]) == (1, "fail")
    assert "truncated" in outcome.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ckpt=nowhere"], "nowhere: no such file or directory"),
        (["ckpt=empty"], "holds no checkpoint that is known; it holds notes.txt"),
        (["step=3"], "step=3 needs a run directory as ckpt="),
        (["tier=minimal", "experts=0"], "experts=0: must be at least 1"),
        (["tier=minimal", "family=hf"], "nothing is added to a plain model"),
        (["tier=minimal", "family=gpt", "base=x"], "a gpt is complete by itself"),
        (["tier.checks=[structur]"], "'structur' is unknown"),
        (["tier.checks=[loadin]"], "did you mean 'loading'?"),
        (["tier.checks=[]"], "tier=quick checks nothing: it is for task=diagnose"),
        (["tier.checks=[files]"], "its checks are of a checkpoint; give one as ckpt="),
        (["tier.max_size_mb=-1"], "tier.max_size_mb=-1"),
        (["tier=mnimal"], "did you mean 'minimal'?"),
        (["tier=minimal", "experts=4"], "experts=4 is how many are built: with family=lora_moe, and without ckpt="),
        (["--config-dir", "nowhere"], "--config-dir nowhere: no such directory"),
    ],
)
def test_misuse_is_one_line_and_exit_code_2(run, words, message):
    Path("empty").mkdir()
    Path("empty/notes.txt").write_text("")
    outcome = run("task=test", *words)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert message in outcome.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["base=./nowhere"], "base=./nowhere: no such directory"),
        (["base=empty"], "base=empty: is no model: it needs config.json and weights"),
        (["tier.checks=[model,forward]", "tokenizer=./nowhere"], "tokenizer=./nowhere: no such file"),
    ],
)
def test_a_mistake_beside_a_checkpoint_is_no_failed_check(run, checkpoint, words, message):
    Path("empty").mkdir()
    Path("empty/config.json").write_text("{}")
    outcome = run("task=test", f"ckpt={checkpoint}", *words)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert message in outcome.err


def test_a_family_that_the_checkpoint_is_not(run, checkpoint):
    outcome = run("task=test", "family=gpt", f"ckpt={checkpoint}")
    assert (outcome.code, "is of the family npt" in outcome.err) == (2, True)


def test_a_tier_without_measures_is_not_for_diagnose(run, checkpoint):
    outcome = run("tier=minimal", f"ckpt={checkpoint}")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "tier=minimal measures nothing: it is for task=test" in outcome.err


def test_a_tier_of_ones_own(run, checkpoint, tmp_path):
    (tmp_path / "own" / "tier").mkdir(parents=True)
    (tmp_path / "own" / "tier" / "mine.yaml").write_text(
        "_target_: runner.config.Tier\nname: mine\nchecks: [pollution, size]\n"
    )
    outcome = run("--config-dir", str(tmp_path / "own"), "task=test", "tier=mine", f"ckpt={checkpoint}")
    assert (outcome.code, checks(outcome)) == (0, {"pollution": "pass", "size": "pass"})


TARGET = "_target_: runner.config.Tier\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("checks: [files]\n", "tier: its YAML has no _target_; begin it as those of conf/tier/ begin"),
        (f"{TARGET}name: mine\ncheck: [files]\n", "tier.check is unknown; did you mean 'checks'?"),
        (f"{TARGET}checks: [files]\n", "tier.name is needed: its YAML does not say it"),
        (f"{TARGET}name: mine\nchecks: fidelity\n", "none of its checks (fidelity) applies to family gpt"),
        (f"{TARGET}name: mine\nchecks: [fidelity]\n", "none of its checks (fidelity) applies to family gpt"),
    ],
)
def test_a_tier_of_ones_own_that_is_none(run, tmp_path, content, message):
    (tmp_path / "own" / "tier").mkdir(parents=True)
    (tmp_path / "own" / "tier" / "mine.yaml").write_text(content)
    file = script_file(tmp_path / "state_step000300.pt", random_state("small"))
    outcome = run("--config-dir", str(tmp_path / "own"), "task=test", "tier=mine", f"ckpt={file}")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert message in outcome.err


def test_a_format_of_ones_own(run, toy):  # noqa: F811
    words = ["--config-dir", str(toy / "conf"), "task=test", "format=toy", f"ckpt={toy / 'ckpt'}"]
    for tier in ("quick", "minimal"):
        outcome = run(*words, f"tier={tier}")
        assert (outcome.code, outcome.err) == (0, "")
        assert {"files", "size", "loading"} <= checks(outcome).keys()
    content = torch.load(toy / "ckpt" / "toy.pt", weights_only=True)
    torch.save({**content, "extra": torch.ones(2)}, toy / "ckpt" / "toy.pt")
    outcome = run(*words)
    assert (outcome.code, checks(outcome)["loading"]) == (1, "fail")


def test_the_cap_on_the_size_is_the_tiers(run, base, tmp_path):
    path = write_moe(tmp_path / "moe", base)
    assert run("task=test", f"ckpt={path}").code == 0
    outcome = run("task=test", f"ckpt={path}", "tier.max_size_mb=0.01")
    assert (outcome.code, checks(outcome)["size"]) == (1, "fail")
    assert "more than max_size_mb=0.01" in outcome.out


def test_where_it_would_not_fit_nothing_is_started(run, checkpoint, monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: 1 << 20)
    monkeypatch.setattr(memory, "resident_bytes", lambda: 1 << 20)
    outcome = run("task=test", "tier=full", f"ckpt={checkpoint}")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "tier=full would need about 0.5 GB of memory, and 0.0 GB are there; take tier=minimal" in outcome.err
    assert run("task=test", "tier=minimal", f"ckpt={checkpoint}").code == 0


def test_a_run_directory_is_a_sweep_over_its_checkpoints(run, base, tmp_path):
    for step in (200, 100):
        write_npt(tmp_path / "run" / f"checkpoint-{step}", npt_tensors(base, {0: ("dual", 2, 2)}), base=base, step=step)
    outcome = run("task=test", f"ckpt={tmp_path / 'run'}", "junit=reports/")
    assert outcome.code == 0
    assert sorted(path.name for path in Path("reports").iterdir()) == [
        "TEST-run-checkpoint-100-quick-0.xml", "TEST-run-checkpoint-200-quick-1.xml",
    ]  # fmt: skip
    found = [json.loads(path.read_text()) for path in sorted(Path("sweeps").rglob("result.json"))]
    assert [Path(each["ckpt"]).name for each in found] == ["checkpoint-100", "checkpoint-200"]
    assert all(each["passed"] for each in found)
    (tmp_path / "run" / "checkpoint-100" / "npt_weights.pt").write_bytes(b"damaged")
    outcome = run("task=test", f"ckpt={tmp_path / 'run'}")
    assert outcome.code == 3, "a sweep in which tests failed"
    assert "files" in outcome.out


def test_a_directory_of_checkpoints_of_any_names_is_a_sweep_over_them(run, base, tmp_path):
    write_moe(tmp_path / "kept" / "mixture", base)
    write_npt(tmp_path / "kept" / "single", npt_tensors(base, {0: ("single", 2, 1)}), base=base)
    (tmp_path / "kept" / "notes.txt").write_text("")
    outcome = run("task=test", f"ckpt={tmp_path / 'kept'}")
    assert outcome.code == 0
    assert [line.split()[0] for line in outcome.out.splitlines() if " quick " in line] == ["mixture", "single"]


def test_families_of_one_sweep_have_junit_files_of_their_own(run):
    words = ["-m", "task=test", "tier=minimal", "tier.checks=[built,pollution]", "family=gpt,npt", "junit=reports/"]
    refused = run(*words[:-1], "junit=one.xml")
    assert (refused.code, "give a directory (a name with / at its end)" in refused.err) == (2, True)
    assert run(*words).code == 0
    assert sorted(path.name for path in Path("reports").iterdir()) == [
        "TEST-runner-gpt-minimal-0.xml", "TEST-runner-npt-minimal-1.xml",
    ]  # fmt: skip


def test_jobs_that_differ_in_another_key_have_junit_files_of_their_own(run):
    assert run("-m", "task=test", "dtype=float32,bfloat16", "junit=reports/").code == 0
    assert sorted(path.name for path in Path("reports").iterdir()) == [
        "TEST-runner-machine-quick-0.xml", "TEST-runner-machine-quick-1.xml",
    ]  # fmt: skip


def test_the_inputs_are_not_touched(run, base, tmp_path):
    path = write_moe(tmp_path / "moe", base)
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*")}
    shutil.copytree(path, tmp_path / "copy")
    run("task=test", "tier=minimal", f"ckpt={path}")
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*")} == before


@pytest.mark.parametrize(
    ("scores", "failing", "word"),
    [
        ([], False, None), ([0.81], False, "READY"), ([0.8], False, "PARTIALLY_READY"),
        ([1.0, 0.3], False, "PARTIALLY_READY"), ([0.6], False, "NOT_READY"), ([1.0], True, "NOT_READY"),
        ([None], True, "NOT_READY"), ([None], False, None),
    ],
)  # fmt: skip
def test_readiness_is_the_mean_score(scores, failing, word):
    rows = [{"name": "q", "integrity": False, "status": "warning", "score": score} for score in scores]
    rows = [{name: value for name, value in row.items() if value is not None} for row in rows]
    rows.append({"name": "i", "integrity": True, "status": "fail" if failing else "pass"})
    assert overall(rows) == word


@pytest.mark.parametrize(
    ("integrity", "metrics", "line"),
    [
        ("fail", {}, "NOT_READY (an integrity check failed)"),
        ("fail", {"score": 1.0}, "NOT_READY (an integrity check failed, mean score 1.00)"),
        ("pass", {"score": 1.0}, "READY (mean score 1.00)"),
    ],
)
def test_the_overall_word_comes_with_its_reason(integrity, metrics, line):
    row = {"name": "i", "integrity": True, "status": integrity, "seconds": 0.0, "peak_bytes": 1, "details": ""}
    result = {"checks": [row], "metrics": metrics, "overall": line.split()[0], "passed": integrity == "pass"}
    assert ("Overall", line) in [fact[:2] for fact in reports.test_facts(result)]
