"""Adapters without a router against PEFT's own model, bit for bit."""

import pytest
import torch
from transformers import LlamaForCausalLM

from runner.evaluation.base_models import load_base
from runner.evaluation.decoding import generate
from runner.families.lora_moe.model import LoraForCausalLM
from tests.lora_files import adapter_of, load_adapter, load_moe, write_adapter, write_moe

IDS = torch.tensor([5, 77, 9, 130, 41, 41, 8, 200])

PEFT_CONFIGS = {
    "plain": {},
    "rank stabilised": {"use_rslora": True, "r": 4},
    "patterns": {
        "rank_pattern": {"model.layers.1.self_attn.q_proj": 5, "down_proj": 2},
        "alpha_pattern": {"^model.layers.0.self_attn.v_proj": 17, "layers.2.mlp.down_proj": 1.5},
        "ranks": {"model.layers.1.self_attn.q_proj": 5, **{f"model.layers.{i}.mlp.down_proj": 2 for i in range(3)}},
    },
    "some layers": {"layers_to_transform": [0, 2], "layers": [0, 2]},
    "all linear": {
        "target_modules": "all-linear",
        "targets": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    },
}


@pytest.mark.parametrize("name", list(PEFT_CONFIGS))
def test_a_plain_adapter_equals_peft(name, tmp_path, base):
    from peft import PeftModel

    path = write_adapter(tmp_path / "adapter", base, **PEFT_CONFIGS[name])
    ours = load_adapter(path)
    peft = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), path).eval()
    with torch.inference_mode():
        expected = peft(IDS[None]).logits
        assert torch.equal(ours(IDS[None]).logits, expected)
        assert torch.equal(ours.head(ours.hidden(IDS[None])), expected)
        with peft.disable_adapter(), ours.experts(False):
            plain = peft(IDS[None]).logits
            assert torch.equal(ours(IDS[None]).logits, plain)
    assert (expected - plain).abs().max() > 0.1
    assert generate(ours, IDS[:4], 8) == generate(ours, IDS[:4], 8, cache=False)


def test_all_experts_on_equals_peft(tmp_path, base):
    from peft import PeftModel

    moe = write_moe(tmp_path / "checkpoint-120", base)
    paths = {f"expert_{i}": adapter_of(moe, i) for i in range(3)}
    peft = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), paths["expert_0"], adapter_name="expert_0")
    for name in ("expert_1", "expert_2"):
        assert not peft.load_adapter(paths[name], name).missing_keys
    peft.base_model.set_adapter(list(paths), inference_mode=True)
    ours = LoraForCausalLM(load_base(None, base).model, load_moe(moe).adapters())
    with torch.inference_mode():
        assert torch.equal(ours(IDS[None]).logits, peft.eval()(IDS[None]).logits)
