"""Damaged copies of a lora_moe checkpoint, each refused by name, in one line, with every file as it was."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from runner.errors import CheckpointError, ModelError
from tests.lora_files import (
    TARGETS,
    adapter_of,
    edit_adapter,
    edit_json,
    edit_tensors,
    hashes,
    load_moe,
    older,
    write_moe,
)


@pytest.fixture(scope="module")
def original(tmp_path_factory, base):
    return write_moe(tmp_path_factory.mktemp("moe") / "checkpoint-120", base, ranks=(3,) * 4, alphas=(6,) * 4)


@pytest.fixture
def copied(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "checkpoint-120"))


DAMAGE = {}


def damage(pattern: str):
    """Register a function that damages a copy, with what the message must say."""

    def register(function):
        DAMAGE[function.__name__] = (function, pattern)
        return function

    return register


def without(*words):
    return lambda tensors: {name: t for name, t in tensors.items() if not any(word in name for word in words)}


def with_key(old: str, new: str):
    return lambda tensors: {name.replace(old, new): t for name, t in tensors.items()}


@damage("has no router: neither router.safetensors nor router.pt")
def missing_router(path):
    (path / "router.safetensors").unlink()


@damage("holds several routers: router.safetensors, router.pt")
def two_routers(path):
    torch.save(load_file(path / "router.safetensors"), path / "router.pt")


@damage("has no config.json")
def missing_config(path):
    (path / "config.json").unlink()


@damage("the router has 2")
def router_of_fewer_experts(path):
    edit_tensors(path / "router.safetensors", lambda t: {name: each[:2] for name, each in t.items()})


@damage("the adapters are expert_0, expert_2; they must be the same")
def missing_expert(path):
    shutil.rmtree(path / "peft_adapters" / "expert_1")


@damage("the adapters are expert_0, expert_1, expert_2, expert_3")
def one_expert_more(path):
    shutil.copytree(path / "peft_adapters" / "expert_1", path / "peft_adapters" / "expert_3")


@damage("holds no experts: no peft_adapters/expert_0")
def no_experts(path):
    shutil.rmtree(path / "peft_adapters")
    (path / "peft_adapters").mkdir()


@damage("expert_1: an adapter both flat and nested")
def nested_and_flat(path):
    for file in adapter_of(path, 1).iterdir():
        shutil.copy(file, adapter_of(path, 1).parent)


@damage("expert_1: no adapter, neither flat nor nested in expert_1/expert_1; it holds default")
def nested_under_another_name(path):
    adapter_of(path, 1).rename(path / "peft_adapters" / "expert_1" / "default")


@damage("expert_2 has no weights: neither adapter_model.safetensors nor adapter_model.bin")
def no_weights(path):
    (adapter_of(path, 2) / "adapter_model.safetensors").unlink()


@damage("expert_0 holds adapter_model.safetensors and adapter_model.bin")
def bin_beside_safetensors(path):
    torch.save(load_file(adapter_of(path, 0) / "adapter_model.safetensors"), adapter_of(path, 0) / "adapter_model.bin")


@damage("adapter_config.json: cannot be read: No such file")
def no_adapter_config(path):
    (adapter_of(path, 0) / "adapter_config.json").unlink()


@damage("gate.weight is [32, 3] and gate.bias [3], which looks transposed")
def transposed_gate(path):
    edit_tensors(path / "router.safetensors", lambda t: {**t, "gate.weight": t["gate.weight"].T})


@damage("reads a hidden size of 16, but expert_0")
def router_of_another_size(path):
    edit_tensors(path / "router.safetensors", lambda t: {**t, "gate.weight": t["gate.weight"][:, :16]})


@damage("missing keys ['gate.bias'], unexpected keys ['extra', 'gate.b']")
def other_router_keys(path):
    edit_tensors(
        path / "router.safetensors",
        lambda t: {"gate.weight": t["gate.weight"], "gate.b": t["gate.bias"], "extra": torch.ones(3)},
    )


@damage("router.safetensors: gate.weight holds NaN or Inf")
def nan_in_the_router(path):
    edit_tensors(path / "router.safetensors", lambda t: {**t, "gate.weight": t["gate.weight"] / 0})


@damage("expert_1/adapter_model.safetensors: base_model.model.model.layers.2.self_attn.v_proj.lora_A.weight holds NaN")
def nan_in_one_expert(path):
    name = "base_model.model.model.layers.2.self_attn.v_proj.lora_A.weight"
    edit_adapter(path, 1, lambda t: {**t, name: t[name] * float("nan")})


@damage("none of its 18 keys is base_model.model.<module>.lora_A.weight of a module in target_modules")
def wrong_prefix(path):
    edit_adapter(path, 0, with_key("base_model.model.", "model."))


@damage("missing keys ['experts.expert_0.base_model.model.model.layers.0.mlp.down_proj.lora_B.weight', ")
def half_an_adapter(path):
    edit_adapter(path, 0, without("lora_B"))


@damage("missing keys ['experts.expert_2.base_model.model.model.layers.1.mlp")
def a_layer_less(path):
    edit_adapter(path, 2, without("layers.1."))


@damage("missing keys ['experts.expert_2.base_model.model.model.layers.2.mlp.down_proj.lora_A.weight'")
def the_last_layer_less(path):
    edit_adapter(path, 2, without("layers.2."))


@damage("missing keys ['base_model.model.model.layers.2.mlp.down_proj.lora_A.weight'")
def the_last_layer_less_everywhere(path):
    for index in range(3):
        edit_adapter(path, index, without("layers.2."))


@damage(
    "'experts.expert_0.base_model.model.….v_proj.lora_A.weight', 'experts.expert_0.base_model.model.….v_proj.lora_B.weight'"
)
def a_module_less(path):
    edit_adapter(path, 0, without("v_proj"))


@damage("unexpected keys ['experts.expert_1.base_model.model.model.layers.0.mlp.down_proj.lora_A.weight'")
def narrowed_target_modules(path):
    edit_json(adapter_of(path, 1) / "adapter_config.json", target_modules=["q_proj", "v_proj"])


@damage("unexpected keys ['experts.expert_0.base_model.model.model.layers.0.self_attn.q_proj.lora_A.bias']")
def an_extra_key(path):
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.bias"
    edit_adapter(path, 0, lambda t: {**t, key: torch.zeros(3)})


@damage("layers.0.self_attn.q_proj.lora_C.weight']")
def a_renamed_key(path):
    edit_adapter(path, 0, with_key("layers.0.self_attn.q_proj.lora_A", "layers.0.self_attn.q_proj.lora_C"))


@damage("but adapter_config.json gives it rank 8: A must be [8, in] and B [out, 8]")
def wrong_rank(path):
    edit_json(adapter_of(path, 0) / "adapter_config.json", r=8)


@damage("its modules contradict each other on the hidden size: 16 by model.layers.0.self_attn.v_proj, 32 by")
def modules_of_two_sizes(path):
    edit_adapter(
        path,
        0,
        lambda t: {n: each[:, :16] if "layers.0.self_attn.v_proj.lora_A" in n else each for n, each in t.items()},
    )


@damage("lora_A.weight is int8 [3, 80], not a floating-point matrix")
def integer_weights(path):
    edit_adapter(path, 0, lambda t: {n: each.to(torch.int8) for n, each in t.items()})


@damage("truncated at byte")
def truncated_adapter(path):
    file = adapter_of(path, 1) / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@damage("git-LFS pointer")
def lfs_pointer(path):
    (adapter_of(path, 1) / "adapter_model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")


@damage("the config is not valid JSON")
def broken_config(path):
    (path / "config.json").write_text("{")


@damage("top_k is 2 in config.json but 1 in router.pt")
def two_values_of_top_k(path):
    older(path)
    edit_json(path / "dylo_moe_state" / "config.json", top_k=2)


@damage("says input_size 64, but weight is [3, 32]")
def another_input_size(path):
    older(path)
    content = torch.load(path / "dylo_moe_state" / "router.pt", weights_only=True)
    torch.save({**content, "input_size": 64}, path / "dylo_moe_state" / "router.pt")


@damage("num_experts is 2, but")
def two_configs_that_disagree(path):
    older(path)
    (path / "config.json").write_text(json.dumps({"model_type": "dylora-moe", "num_experts": 3}))
    edit_json(path / "dylo_moe_state" / "config.json", num_experts=2)


@damage("skill 1 is [2, 16], not a floating-point embedding")
def skills_of_another_kind(path):
    torch.save({0: torch.zeros(32), 1: torch.zeros(2, 16)}, path / "skill_library.pt")


@damage("its embeddings differ in size (0: 32, 1: 16)")
def skills_of_two_sizes(path):
    torch.save({0: torch.zeros(32), 1: torch.zeros(16)}, path / "skill_library.pt")


@damage("adapts lm_head, which tokens cannot be routed through")
def an_expert_on_the_head(path):
    edit_json(adapter_of(path, 0) / "adapter_config.json", target_modules=[*TARGETS, "lm_head"])
    prefix = "base_model.model.lm_head.lora_"
    edit_adapter(
        path, 0, lambda t: {**t, f"{prefix}A.weight": torch.ones(3, 32), f"{prefix}B.weight": torch.ones(272, 3)}
    )


CONFIGS = [
    ({"num_experts": "absent"}, "config.json does not say num_experts"),
    (
        {"num_experts": 4},
        "config.json says 4 experts, the router has 3, and the adapters are expert_0,",
    ),
    ({"num_experts": "3"}, "num_experts is '3', not a number"),
    ({"top_k": 4}, "top_k is 4; with 3 experts it is a number from 1 to 3"),
    ({"top_k": float("nan")}, "top_k is nan; with 3 experts"),
    ({"temperature": 0}, "temperature is 0, not a number above 0"),
]
for values, message in CONFIGS:
    DAMAGE[f"config {values}"] = (lambda path, values=values: edit_json(path / "config.json", **values), message)


def test_of_many_faults_the_first_are_named(copied):
    edit_json(adapter_of(copied, 1) / "adapter_config.json", r=8)
    edit_json(adapter_of(copied, 2) / "adapter_config.json", r=8)
    with pytest.raises(CheckpointError) as raised:
        load_moe(copied)
    message = str(raised.value)
    assert message.count("gives it rank 8") == 4
    assert re.search(r"; … \((\d+) in all\)$", message)


@pytest.mark.parametrize("name", list(DAMAGE))
def test_damage_is_named(name, copied):
    function, pattern = DAMAGE[name]
    function(copied)
    before = hashes(copied)
    with pytest.raises((CheckpointError, ModelError)) as caught:
        load_moe(copied)
    message = str(caught.value)
    assert pattern in message
    assert str(copied) in message
    assert "\n" not in message
    assert hashes(copied) == before
