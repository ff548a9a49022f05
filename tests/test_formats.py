"""Every golden checkpoint opens by itself and computes through `runner.load` and `task=diagnose`."""

import json
import os
import subprocess
import sys

import pytest
import torch

import runner
from runner.data.shards import write_shard
from tests.conftest import ROOT


@pytest.mark.parametrize("name", ["small", "medium"])
def test_gpt_logits(name, golden):
    expected = torch.load(golden / "gpt" / name / "expected.pt", weights_only=True)
    model = runner.load(golden / "gpt" / name)
    with torch.inference_mode():
        logits = model(expected["tokens"][None]).logits[0]
    torch.testing.assert_close(logits[expected["rows"]], expected["logits"], atol=1e-3, rtol=0)


def test_gpt_in_its_stored_dtype(golden, tmp_path):
    """In a process of its own: oneDNN chooses its instructions once, before the first product."""
    code = (
        "import sys, torch, runner; from pathlib import Path; g = Path(sys.argv[1]); "
        "e = torch.load(g / 'expected.pt', weights_only=True); m = runner.load(g, dtype='stored'); "
        "out = m(e['tokens'][None]).logits[0][e['rows']].float(); "
        "print(float((out - e['logits_bf16'].float()).abs().mean()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(golden / "gpt" / "medium")], cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    if "avx512" not in torch.backends.cpu.get_cpu_capability().lower():
        pytest.skip("the golden bfloat16 logits were made with AVX512 instructions")
    assert float(done.stdout) < 1e-2


def test_moe_logits(golden):
    expected = json.loads((golden / "moe" / "expected.json").read_text())["two_experts"]
    model = runner.load(golden / "moe" / "two_experts", base=golden / "npt" / "base")
    with torch.inference_mode():
        output = model(torch.tensor([expected["ids"]]))
    torch.testing.assert_close(output.logits[0, -1], torch.tensor(expected["logits_last"]), atol=1e-4, rtol=0)
    assert output.expert_weights.argmax(-1)[0].tolist() == expected["routing"]


def test_moe_with_its_experts_off_is_the_base(golden, run):
    words = [f"ckpt={golden / 'moe' / 'two_experts'}", f"base={golden / 'npt' / 'base'}", "family=lora_moe"]
    assert run(*words, "family.experts=false").result["metrics"]["mse"] == 0.0
    on = run(*words).result
    assert on["metrics"]["mse"] > 0.1
    assert on["verdict"] is None
    dense = run(*words, "family.top_k=2").result
    assert dense["metrics"]["mse"] != on["metrics"]["mse"]
    assert run(*words, "family.top_k=3").code == 2


def test_a_plain_adapter_over_its_base(golden, run):
    path = golden / "moe" / "two_experts" / "peft_adapters" / "expert_0" / "expert_0"
    result = run(f"ckpt={path}", f"base={golden / 'npt' / 'base'}").result
    assert (result["format"], result["metrics"]["mse"] > 0) == ("peft", True)


def test_gpt_against_another_gpt_and_on_shards(golden, run, tmp_path):
    small, medium = golden / "gpt" / "small", golden / "gpt" / "medium"
    tokens = torch.load(small / "expected.pt", weights_only=True)["tokens"]
    shard = tmp_path / "val_000000.bin"
    write_shard(shard, tokens.tolist())
    result = run(f"ckpt={small}", f"reference={medium}", "data=shards", f"data.path={shard}").result
    assert result["metrics"]["mse"] > 1
    assert any("no tokenizer" in finding for finding in result["findings"])
    assert result["metrics"]["text"]["tokens"] == len(tokens)
    alone = run(f"ckpt={small}", "data=shards", f"data.path={shard}").result
    assert alone["metrics"]["text"]["loss"] == pytest.approx(result["metrics"]["text"]["loss"], rel=1e-9)
    model = runner.load(small)
    with torch.inference_mode():
        logits = model(tokens[None]).logits[0]
    loss = torch.nn.functional.cross_entropy(logits[:-1].double(), tokens[1:])
    assert alone["metrics"]["text"]["loss"] == pytest.approx(float(loss), rel=1e-6)
    same = run(f"ckpt={small}", f"reference={small}").result["metrics"]
    assert (same["mse"], same["kl"], same["top1"]) == (0.0, 0.0, 1.0)


def test_a_wrong_family_or_format_is_refused(golden, run):
    assert "is of the family gpt" in run(f"ckpt={golden / 'gpt' / 'small'}", "family=npt").err
    assert run(f"ckpt={golden / 'gpt' / 'small'}", "format=gpt_medium").code == 2
    assert run(f"ckpt={golden / 'npt' / 'dual_rank4'}", "format=lora_moe").code == 2
