"""`task=inspect`: headers only, for every format, fast whatever the size."""

import json
import os
import subprocess
import sys

import pytest
import torch

import runner
from runner.checkpoints.checkpoint import plain
from tests.conftest import MIXED, ROOT, npt_tensors, write_gpt, write_npt


def test_npt_delta(run, checkpoint, base):
    outcome = run("task=inspect", f"ckpt={checkpoint}", "verbose=true")
    assert (outcome.code, outcome.err) == (0, "")
    result = outcome.result
    tensors = npt_tensors(base, MIXED)
    assert (result["format"], result["family"], result["step"], result["base"]) == ("npt_delta", "npt", 100, str(base))
    assert result["keys"] == len(tensors) == len(result["tensors"])
    assert (
        result["parameters"]
        == sum(t.numel() for t in tensors.values())
        == sum(x["parameters"] for x in result["layers"])
    )
    assert result["bytes"] == 4 * result["parameters"]
    assert result["dtypes"] == {"float32": len(tensors)}
    assert [part["component"] for part in result["components"]] == ["layer_0_np", "layer_1_np", "layer_2_np"]
    assert result["training"]["learning_rates"] == 1e-3
    assert "layer_2_np.W_b_up_down.4" in outcome.out
    assert runner.inspect(checkpoint)["components"] == result["components"]


def test_what_is_missing_or_unknown_is_shown_not_refused(run, checkpoint, base):
    tensors = npt_tensors(base, MIXED)
    del tensors["layer_1_np.W_b_up_up.2"]
    tensors["stray"] = torch.zeros(3)
    torch.save(tensors, checkpoint / "npt_weights.pt")
    result = run("task=inspect", f"ckpt={checkpoint}").result
    assert (result["missing_keys"], result["unknown_keys"]) == (["layer_1_np.W_b_up_up.2"], ["stray"])
    assert [layer["layer"] for layer in result["layers"]] == [0, 2]
    assert run(f"ckpt={checkpoint}").code == 2


def test_run_directory(run, checkpoint, base):
    write_npt(checkpoint.parent / "checkpoint-1000", npt_tensors(base, {1: ("dual", 2, 2)}), base=base, step=1000)
    broken = write_npt(checkpoint.parent / "checkpoint-300", npt_tensors(base, MIXED), base=base)
    (broken / "npt_weights.pt").write_bytes(b"")
    (checkpoint.parent / "notes.txt").write_text("x")
    outcome = run("task=inspect", f"ckpt={checkpoint.parent}")
    assert outcome.code == 0, outcome.err
    result = outcome.result
    assert result["steps"] == [100, 300, 1000]
    assert [row.get("layers") for row in result["checkpoints"]] == [[0, 1, 2], None, [1]]
    assert "empty" in result["checkpoints"][1]["error"]
    assert result["ignored"] == ["notes.txt"]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("npt/single_rank1", {"format": "npt_delta", "family": "npt", "keys": 6}),
        ("npt/dual_rank4", {"format": "npt_delta", "step": 1700, "keys": 48}),
        ("npt/mixed_layers", {"format": "npt_delta"}),
        ("npt/second_spelling/npt_weights.pt", {"format": "npt_delta", "keys": 6}),
        ("npt/base", {"format": "hf", "family": "hf", "keys": 39}),
        ("npt_full/pytorch_bin", {"format": "npt_full", "step": 502, "modulation_scale": 1.0}),
        (
            "gpt/small",
            {
                "format": "gpt_small",
                "vocab_size": 512,
                "num_layers": 12,
                "num_heads": 1,
                "model_dim": 128,
                "step": 22550,
            },
        ),
        ("gpt/medium", {"format": "gpt_medium", "num_layers": 16, "keys": 53, "val_loss": 1.2727}),
        ("moe/two_experts", {"format": "lora_moe", "family": "lora_moe", "experts": 2, "top_k": 1}),
        ("moe/three_experts_top2", {"format": "lora_moe", "experts": 3, "top_k": 2}),
        ("moe/two_experts/peft_adapters/expert_0/expert_0", {"format": "peft", "family": "hf"}),
        ("npt_full/sharded_no_tokenizer", {"format": "npt_full", "step": 501}),
    ],
)
def test_golden(path, expected, golden):
    result = runner.inspect(golden(path))
    assert {name: result.get(name) for name in expected} == expected


HEAVY = ("torch", "transformers", "wandb", "peft", "safetensors", "numpy", "matplotlib", "rich", "tokenizers")


@pytest.mark.parametrize("what", ["a pickle", "safetensors", "a run", "a GPT"])
def test_nothing_heavy_is_imported(what, tmp_path, base, checkpoint):
    path = {"a pickle": tmp_path / "weights.pt", "safetensors": base, "a run": checkpoint.parent}.get(what, tmp_path)
    if what == "a pickle":
        torch.save(npt_tensors(base, MIXED), path)
    if what == "a run":
        write_npt(checkpoint.parent / "checkpoint-1000", npt_tensors(base, MIXED), base=base, step=1000)
    if what == "a GPT":
        path = write_gpt(tmp_path, "small")
    code = (
        "import sys; from runner.cli import run; code = run(sys.argv[1:]); "
        f"print([m for m in {HEAVY} if m in sys.modules], file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "task=inspect", f"ckpt={path}", "tracker=none"], cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr.strip()) == (0, "[]")


def test_plain_cuts_what_is_long_and_names_what_is_foreign():
    assert plain({"a": torch.zeros(2, 3), "b": [1, None, 2.5], 3: "x"}) == {
        "a": "float32 [2, 3]",
        "b": [1, None, 2.5],
        "3": "x",
    }
    assert plain("x" * 5000).endswith("(5000 characters)")
    nested: list = []
    nested.append(nested)
    json.dumps(plain(nested))
