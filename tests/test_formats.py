"""Every golden checkpoint opens by itself and computes through `runner.load` and `task=diagnose`."""

import os
import re
import subprocess
import sys

import pytest
import torch

import runner
from tests.conftest import MIXED, ROOT, golden_numbers, npt_tensors
from tests.shard_files import write_shard


def test_what_a_trainer_leaves_beside_npt_weights_is_no_weights(run, base, tmp_path):
    """NPT weights under another name than their own: diagnose and test take the same file for the weights."""
    from transformers import TrainingArguments

    path = tmp_path / "checkpoint-5"
    path.mkdir()
    torch.save(npt_tensors(base, MIXED), path / "weights.pt")
    torch.save(TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True), path / "training_args.bin")
    torch.save({"cpu": torch.get_rng_state(), "python": (3, (1, 2))}, path / "rng_state.pth")
    for words in (["task=diagnose"], ["task=test"], ["task=test", "tier=minimal"]):
        outcome = run(*words, f"ckpt={path}", f"base={base}")
        assert (outcome.code, outcome.err) == (0, "")
        assert outcome.result["format"] == "npt_delta"
    assert run("task=inspect", f"ckpt={path}").code == 0


@pytest.mark.parametrize("task", ["diagnose", "test"])
def test_a_file_of_any_other_name_that_cannot_be_read_is_named(task, run, base, tmp_path):
    """What could be the weights is not passed over."""
    path = tmp_path / "checkpoint-5"
    path.mkdir()
    torch.save(npt_tensors(base, MIXED), path / "weights.pt")
    (path / "other.bin").write_bytes(b"\x80\x04N.")
    outcome = run(f"task={task}", f"ckpt={path}", f"base={base}")
    assert outcome.code == {"diagnose": 2, "test": 1}[task]
    assert "other.bin: a plain Python pickle, not written by torch.save" in outcome.err + outcome.out


def test_shards_are_read_as_far_as_is_asked(run, gpts, workdir):
    write_shard(workdir / "a.bin", list(range(200)))
    words = [f"ckpt={gpts('small')}", f"reference={gpts('small')}", "data=shards"]
    outcome = run(*words, "data.path=a.bin", "data.max_tokens=100", "tier.sequence_length=64")
    text = outcome.result["metrics"]["text"]
    assert (text["documents"], text["tokens"], text["longest"]) == (2, 100, 64)
    outcome = run(*words[:2], "data.max_tokens=100")
    assert outcome.code == 2
    assert "data.max_tokens belongs to another data than the one chosen" in outcome.err


def test_text_in_the_quick_tier_has_the_length_that_is_asked(run, checkpoint, base, workdir):
    (workdir / "text.txt").write_text("a long line of words " * 40)
    outcome = run(f"ckpt={checkpoint}", "data=text", "data.path=text.txt", "tier=quick", "tier.sequence_length=24")
    assert (outcome.code, outcome.result["metrics"]["text"]["longest"]) == (0, 24)


@pytest.mark.parametrize("name", ["small", "medium"])
def test_gpt_logits(name, golden):
    expected = torch.load(golden(f"gpt/{name}") / "expected.pt", weights_only=True)
    model = runner.load(golden(f"gpt/{name}"))
    with torch.inference_mode():
        logits = model(expected["tokens"][None]).logits[0]
    torch.testing.assert_close(logits[expected["rows"]], expected["logits"], atol=1e-3, rtol=0)


def test_gpt_in_its_stored_dtype(golden, tmp_path):
    """In a process of its own: oneDNN chooses its instructions once, before the first product."""
    if "avx512" not in torch.backends.cpu.get_cpu_capability().lower():
        pytest.skip("the golden bfloat16 logits were made with AVX512 instructions")
    code = (
        "import sys, torch, runner; from pathlib import Path; g = Path(sys.argv[1]); "
        "e = torch.load(g / 'expected.pt', weights_only=True); m = runner.load(g, dtype='stored'); "
        "out = m(e['tokens'][None]).logits[0][e['rows']].float(); "
        "print(float((out - e['logits_bf16'].float()).abs().mean()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(golden("gpt/medium"))], cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert float(done.stdout) < 1e-2


def test_moe_logits(golden):
    expected = golden_numbers("moe")["two_experts"]
    model = runner.load(golden("moe/two_experts"), base=golden("npt/base"))
    with torch.inference_mode():
        output = model(torch.tensor([expected["ids"]]))
    torch.testing.assert_close(output.logits[0, -1], torch.tensor(expected["logits_last"]), atol=1e-4, rtol=0)
    assert output.expert_weights.argmax(-1)[0].tolist() == expected["routing"]


def test_moe_with_its_experts_off_is_the_base(golden, run):
    words = [f"ckpt={golden('moe/two_experts')}", f"base={golden('npt/base')}", "family=lora_moe"]
    assert run(*words, "family.experts=false").result["metrics"]["mse"] == 0.0
    on = run(*words).result
    assert on["metrics"]["mse"] > 0.1
    assert on["verdict"] is None
    dense = run(*words, "family.top_k=2").result
    assert dense["metrics"]["mse"] != on["metrics"]["mse"]
    assert run(*words, "family.top_k=3").code == 2


def test_a_plain_adapter_over_its_base(golden, run):
    path = golden("moe/two_experts") / "peft_adapters" / "expert_0" / "expert_0"
    result = run(f"ckpt={path}", f"base={golden('npt/base')}").result
    assert (result["format"], result["metrics"]["mse"] > 0) == ("peft", True)


def test_gpt_against_another_gpt_and_on_shards(gpts, run, tmp_path):
    small, medium = gpts("small"), gpts("medium")
    tokens = torch.randint(512, (256,), generator=torch.Generator().manual_seed(0))
    shard = tmp_path / "val_000000.bin"
    write_shard(shard, tokens.tolist())
    result = run(f"ckpt={small}", f"reference={medium}", "data=shards", f"data.path={shard}").result
    assert result["metrics"]["mse"] > 1
    assert any("no tokenizer" in finding for finding in result["findings"])
    assert all(re.match(r"\d+ random ids, not the text '", row["prompt"]) for row in result["per_prompt"])
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


def test_a_wrong_family_or_format_is_refused(golden, gpts, run):
    assert "is of the family gpt" in run(f"ckpt={gpts('small')}", "family=npt").err
    assert run(f"ckpt={gpts('small')}", "format=gpt_medium").code == 2
    assert run(f"ckpt={golden('npt/single_rank1')}", "format=lora_moe").code == 2
