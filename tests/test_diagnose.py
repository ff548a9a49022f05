"""`task=diagnose` from the command line to result.json, on real (tiny) checkpoints."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import runner
from runner.data.text import Data
from runner.errors import ConfigError
from tests.conftest import MIXED, ROOT, npt_tensors, write_base, write_npt


def test_quick_report(run, checkpoint, base):
    outcome = run(f"ckpt={checkpoint}")
    assert (outcome.code, outcome.err) == (0, "")
    for label in ("MSE Loss:", "Cosine Similarity:", "Loss Status:", "Estimated Progress:", "Remaining Work:"):
        assert sum(line.startswith(label) for line in outcome.out.splitlines()) == 1
    result = outcome.result
    assert (result["task"], result["status"], result["format"], result["family"]) == (
        "diagnose",
        "ok",
        "npt_delta",
        "npt",
    )
    assert (result["ckpt"], result["base"], result["reference"]) == (str(checkpoint), str(base), str(base))
    assert (result["step"], result["tier"]) == (100, "quick")
    kinds = {layer["layer"]: (layer["modulation"], layer["np_rank"], layer["num_ranks"]) for layer in result["layers"]}
    assert kinds == MIXED
    assert "mse" not in result["layers"][0]
    assert {check["name"]: check["status"] for check in result["checks"]} == dict.fromkeys(
        ("load", "finite", "control"), "pass"
    )
    assert set(result["verdict"]) == {
        "status",
        "cosine_status",
        "progress",
        "remaining",
        "readiness",
        "reason",
        "recommendation",
    }
    assert f"MSE Loss: {result['metrics']['mse']:.6f}" in outcome.out
    mean = sum(row["mse"] for row in result["per_prompt"]) / 3
    assert result["metrics"]["mse"] == pytest.approx(mean, rel=1e-12)


def test_full_report_and_python_agree(run, checkpoint, base):
    result = run(f"ckpt={checkpoint}", "tier=full", "verbose=true").result
    again = runner.diagnose(checkpoint, tier="full")
    for each in (result, again):
        del each["timing"]
    assert result == again
    assert all(layer["mse"] > 0 for layer in result["layers"])
    assert [row["layers"] for row in result["progressive"]] == [[0], [0, 1], [0, 1, 2]]
    assert result["progressive"][0]["mse"] == result["layers"][0]["mse"]
    assert result["metrics"]["text"]["longest"] == 160  # the model's maximum, under 512
    assert result["metrics"]["text"]["ppl"] > 1
    assert 0 < result["metrics"]["floor"]["mse"] < result["metrics"]["mse"]
    assert result["metrics"]["additivity"] > 0
    greedy = [row for row in result["generation"] if row["temperature"] == 0]
    assert len(greedy) == 4
    assert all(len(row["tokens"]) == len(row["reference_tokens"]) == 32 for row in greedy)


def test_a_weights_file_by_any_name(run, checkpoint, base, tmp_path):
    file = tmp_path / "my weights, [final]=1.pt"
    torch.save(npt_tensors(base, MIXED), file)
    result = run(f"ckpt={file}", f"base={base}").result
    assert result["metrics"] == run(f"ckpt={checkpoint}").result["metrics"]


def test_safetensors_give_the_same_numbers(run, checkpoint, base, tmp_path):
    from safetensors.torch import save_file

    other = tmp_path / "st"
    other.mkdir()
    save_file(npt_tensors(base, MIXED), other / "npt_weights.safetensors")
    result = run(f"ckpt={other}", f"base={base}").result
    assert result["metrics"] == run(f"ckpt={checkpoint}").result["metrics"]


def test_an_exact_copy_of_the_base_is_ready(run, base, tmp_path):
    tensors = {name: torch.zeros_like(t) for name, t in npt_tensors(base, {2: ("dual", 2, 2)}).items()}
    still = write_npt(tmp_path / "still", tensors, base=base)
    result = run(f"ckpt={still}", "tier=full").result
    assert result["metrics"]["mse"] > 0  # an NPT layer leaves the attention output out, so zero weights are no copy
    reference = run(f"ckpt={still}", f"reference={still}").result
    assert reference["metrics"]["mse"] == 0.0
    assert reference["verdict"] is None
    assert any("no verdict" in finding for finding in reference["findings"])


def test_reference_may_be_another_checkpoint(run, checkpoint, base, tmp_path):
    other = write_npt(tmp_path / "other", npt_tensors(base, {1: ("dual", 4, 3)}, seed=9), base=base)
    there = run(f"ckpt={checkpoint}", f"reference={other}").result["metrics"]
    back = run(f"ckpt={other}", f"reference={checkpoint}").result["metrics"]
    assert there["mse"] == pytest.approx(back["mse"], rel=1e-6)
    assert there["kl"] == pytest.approx(back["kl_reverse"], rel=1e-6)


def test_without_comparison(run, checkpoint):
    result = run(f"ckpt={checkpoint}", "accuracy=false").result
    assert result["metrics"] == {} if "metrics" in result else True
    assert result["verdict"] is None
    assert result["checks"][-1]["name"] == "forward"
    assert result["checks"][-1]["status"] == "pass"


def test_logits_that_are_not_finite_are_a_finding(run, base, tmp_path):
    tensors = {name: t * 1e12 for name, t in npt_tensors(base, {1: ("dual", 4, 3)}).items()}
    huge = write_npt(tmp_path / "huge", tensors, base=base)
    outcome = run(f"ckpt={huge}", "tier=full")
    assert outcome.code == 0, outcome.err
    result = outcome.result
    assert result["metrics"]["mse"] is None
    assert result["verdict"]["status"] == "poor"
    assert "layer 1" in result["findings"][0]
    assert "position 0" in result["findings"][0]


def test_stored_dtype_and_precision_are_said(run, checkpoint, base):
    tensors = {name: t.bfloat16() for name, t in npt_tensors(base, MIXED).items()}
    torch.save(tensors, checkpoint / "npt_weights.pt")
    assert "weights are stored as bfloat16" in run(f"ckpt={checkpoint}").result["findings"]


def test_step_in_name_and_state_disagree(run, checkpoint, base):
    torch.save({"global_step": 90}, checkpoint / "training_state.pt")
    result = run(f"ckpt={checkpoint.parent}").result
    assert result["step"] == 90
    assert "the name says step 100, the checkpoint's own state says 90" in result["findings"]


def test_output_file(run, checkpoint, workdir):
    result = run(f"ckpt={checkpoint}", "output=there/report.json").result
    assert json.loads(Path("there/report.json").read_text()) == result


def test_sweep(run, checkpoint, base, workdir):
    for step in (1000, 300):
        write_npt(checkpoint.parent / f"checkpoint-{step}", npt_tensors(base, MIXED, seed=step), base=base, step=step)
    (checkpoint.parent / "notes.txt").write_text("not a checkpoint")
    outcome = run("-m", f"ckpt={checkpoint.parent}", "step=1000,100,-2")
    assert outcome.code == 0, outcome.err
    jobs = sorted(Path("sweeps").glob("*/*/result.json"))
    assert [json.loads(job.read_text())["step"] for job in jobs] == [100, 300, 1000]
    table = [line.split() for line in outcome.out.splitlines() if line.startswith("checkpoint-")]
    assert [row[:2] for row in table] == [
        ["checkpoint-100", "100"],
        ["checkpoint-300", "300"],
        ["checkpoint-1000", "1000"],
    ]
    everything = run(f"ckpt={checkpoint.parent}")
    assert everything.out.count("\n#") == 2
    by_glob = run("-m", f"ckpt={checkpoint.parent}/checkpoint-*")
    assert [line.split()[0] for line in by_glob.out.splitlines() if line.startswith("checkpoint-")] == [
        row[0] for row in table
    ]
    last = run(f"ckpt={checkpoint.parent}", "step=-1")
    assert last.result["step"] == 1000


def test_a_failing_job_does_not_stop_the_others(run, checkpoint, base, workdir):
    broken = write_npt(checkpoint.parent / "checkpoint-200", npt_tensors(base, MIXED), base=base, step=200)
    (broken / "npt_weights.pt").write_bytes(b"PK\x03\x04 nonsense")
    write_npt(checkpoint.parent / "checkpoint-300", npt_tensors(base, MIXED), base=base, step=300)
    outcome = run("-m", f"ckpt={checkpoint.parent}", "step=all")
    assert outcome.code == 3
    states = [json.loads(job.read_text())["status"] for job in sorted(Path("sweeps").glob("*/*/result.json"))]
    assert states == ["ok", "error", "ok"]
    assert "FAILED" in outcome.out


def test_greppable_in_a_pipe_as_a_process(checkpoint, tmp_path):
    command = f"{sys.executable} -m runner ckpt={checkpoint} tracker=none | grep -E '(MSE Loss|Progress)'"
    done = subprocess.run(
        command,
        shell=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["MSE Loss", "Estimated Progress"]
    assert done.stderr == ""


def test_bfloat16_runs_and_control_stays_within_the_floor(run, checkpoint):
    result = run(f"ckpt={checkpoint}", "dtype=bfloat16").result
    assert {check["name"]: check["status"] for check in result["checks"]}["control"] == "pass"


def test_other_depths_share_one_reference(run, base, tmp_path):
    """Two checkpoints whose first NPT layers differ, measured in one process, as each by itself."""
    for step, layers in ((1, {2: ("dual", 2, 2)}), (2, {0: ("single", 2, 1)})):
        write_npt(tmp_path / "r" / f"checkpoint-{step}", npt_tensors(base, layers), base=base, step=step)
    run("-m", f"ckpt={tmp_path / 'r'}", "step=all", "tier=full")
    together = [json.loads(job.read_text())["metrics"] for job in sorted(Path("sweeps").glob("*/*/result.json"))]
    from runner.evaluation.base_models import _bases
    from runner.evaluation.reference import Reference

    for step, metrics in enumerate(together, start=1):
        _bases.clear()
        Reference._computed.clear()
        assert run(f"ckpt={tmp_path / 'r'}", f"step={step}", "tier=full").result["metrics"] == metrics


def test_a_changed_base_is_loaded_anew(run, base, tmp_path):
    own = write_base(tmp_path / "base", seed=3)
    ckpt = write_npt(tmp_path / "npt", npt_tensors(own, MIXED), base=own)
    first = run(f"ckpt={ckpt}").result["metrics"]["mse"]
    write_base(own, seed=4)
    assert run(f"ckpt={ckpt}").result["metrics"]["mse"] != first


def test_a_text_is_one_prompt(run, checkpoint):
    outcome = run(f"ckpt={checkpoint}", "data.prompts=hello")
    assert [row["prompt"] for row in outcome.result["per_prompt"]] == ["hello"]
    with pytest.raises(ConfigError, match=r"data\.prompts must be a list of texts"):
        Data(name="prompts", prompts="hello", layer_prompt="a")
