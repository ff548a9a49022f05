"""lora_moe checkpoints: every layout, what is read from headers, and damaged copies that are each refused by name."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from runner.checkpoints.checkpoint import Listing
from runner.errors import CheckpointError, ModelError
from runner.families.lora_moe import checkpoint as lora_moe
from runner.families.lora_moe import save as lora_moe_save
from runner.families.lora_moe.state import read_skills
from tests.conftest import write_base
from tests.lora_files import TARGETS, adapter_of, edit_json, hashes, load_moe, older, router_of, write_moe

IDS = torch.tensor([[5, 77, 9, 130, 41, 41, 8, 200]])


@pytest.fixture(scope="module")
def original(tmp_path_factory, base):
    return write_moe(tmp_path_factory.mktemp("moe") / "checkpoint-120", base, ranks=(3,) * 4, alphas=(6,) * 4)


@pytest.fixture
def copied(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "checkpoint-120"))


def opened(path):
    return lora_moe.read(Listing.of(path)).open()


def test_what_headers_say(original, base):
    checkpoint = opened(original)
    details = checkpoint.details
    assert lora_moe.matches(Listing.of(original)) == "it holds peft_adapters/"
    assert (checkpoint.family, checkpoint.format, checkpoint.step, checkpoint.base_name) == (
        "lora_moe", "lora_moe", 120, str(base)
    )  # fmt: skip
    assert (details.num_experts, details.top_k, details.temperature, details.hidden_size) == (3, 1, 2.0, 32)
    assert (details.layout, details.skills.ids, details.skills.size) == ("nested", (0, 1, 2), 32)
    assert checkpoint.findings == ()
    names = set(checkpoint.weights.infos)
    assert len(names) == 3 * 3 * len(TARGETS) * 2 + 2
    assert "experts.expert_2.base_model.model.model.layers.0.mlp.down_proj.lora_B.weight" in names
    assert checkpoint.weights.infos["router.gate.weight"].shape == (3, 32)
    weight, bias = router_of(base, 3)
    assert torch.equal(checkpoint.weights.read("router.gate.weight"), weight)
    assert torch.equal(checkpoint.weights.read("router.gate.bias"), bias)
    assert torch.equal(read_skills(details.skills)[2], torch.full((32,), 3.0))
    assert len(checkpoint.weights.files) == 4


def test_description(original):
    description = lora_moe.describe(opened(original))
    assert json.loads(json.dumps(description)) == description
    assert (description["experts"], description["layout"], description["top_k"]) == (3, "nested", 1)
    assert [adapter["name"] for adapter in description["adapters"]] == ["expert_0", "expert_1", "expert_2"]
    first = description["adapters"][0]
    assert (first["r"], first["lora_alpha"], first["scaling"], first["modules"]) == (3, 6.0, 2.0, 9)
    assert first["parameters"] == 3 * 3 * (32 + 32 + 32 + 16 + 80 + 32)
    assert description["router"] == {"file": "router.safetensors", "num_experts": 3, "hidden_size": 32}
    assert description["skills"] == {"count": 3, "ids": [0, 1, 2], "size": 32}


def test_saving_again_gives_the_same_weight_files(original, tmp_path):
    checkpoint = opened(original)
    experts = [
        (
            expert.adapter.settings.raw,
            {key: checkpoint.weights.read(f"experts.{expert.name}.{key}")
             for module in expert.adapter.modules for key in (module.key_a, module.key_b)},
        )
        for expert in checkpoint.details.experts
    ]  # fmt: skip
    lora_moe_save.save(
        tmp_path / "again",
        config=checkpoint.details.config,
        experts=experts,
        router=(checkpoint.weights.read("router.gate.weight"), checkpoint.weights.read("router.gate.bias")),
        skills=read_skills(checkpoint.details.skills),
    )
    before, after = hashes(original), hashes(tmp_path / "again")
    assert {file.relative_to(original): digest for file, digest in before.items()} == {
        file.relative_to(tmp_path / "again"): digest for file, digest in after.items()
    }


def flat(path: Path):
    for outer in (path / "peft_adapters").iterdir():
        for file in (outer / outer.name).iterdir():
            file.rename(outer / file.name)
        (outer / outer.name).rmdir()


def binary(path: Path):
    for file in path.rglob("adapter_model.safetensors"):
        torch.save(load_file(file), file.with_suffix(".bin"))
        file.unlink()


def router_pt(path: Path):
    torch.save(load_file(path / "router.safetensors"), path / "router.pt")
    (path / "router.safetensors").unlink()


def older_with_experts_at_the_top(path: Path):
    older(path)
    for expert in sorted((path / "peft_adapters").iterdir()):
        expert.rename(path / expert.name)
    (path / "peft_adapters").rmdir()
    (path / "config.json").write_text(json.dumps({"model_type": "gemma", "hidden_size": 2048}))


@pytest.mark.parametrize("layout", [flat, binary, router_pt, older, older_with_experts_at_the_top])
def test_every_layout_is_the_same_model(layout, original, copied, base):
    layout(copied)
    checkpoint = opened(copied)
    assert lora_moe.matches(Listing.of(copied))
    expected = {"flat": "flat", "binary": "nested", "router_pt": "nested"}.get(layout.__name__, "dylo_moe_state")
    assert checkpoint.details.layout == expected
    assert checkpoint.base_name == str(base)
    assert set(checkpoint.weights.infos) == set(opened(original).weights.infos)
    assert tuple(read_skills(checkpoint.details.skills)) == (0, 1, 2)
    with torch.inference_mode():
        assert torch.equal(load_moe(copied)(IDS).logits, load_moe(original)(IDS).logits)


def test_top_k_and_temperature_of_an_older_router(copied):
    older(copied)
    content = torch.load(copied / "dylo_moe_state" / "router.pt", weights_only=True)
    torch.save({**content, "top_k": 2, "temperature": 1.5}, copied / "dylo_moe_state" / "router.pt")
    details = opened(copied).details
    assert (details.top_k, details.temperature) == (2, 1.5)
    assert load_moe(copied).top_k == 2


def test_trainer_state_gives_the_step(copied):
    history = [{"learning_rate": 1e-3, "loss": 2.0}, {"learning_rate": 5e-4, "loss": 1.5}, {"eval_loss": 1.7}]
    (copied / "trainer_state.json").write_text(json.dumps({"global_step": 121, "epoch": 0.5, "log_history": history}))
    checkpoint = opened(copied)
    assert checkpoint.step == 121
    assert checkpoint.findings == ("trainer_state.json says step 121, config.json step 120",)
    assert checkpoint.training == {
        "global_step": 121,
        "epoch": 0.5,
        "learning_rate": 5e-4,
        "loss": 1.5,
        "eval_loss": 1.7,
    }


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "pytorch_model.bin", "model-00001-of-00002.safetensors", "pytorch_model.bin.index.json"],
)
def test_a_merged_model_is_pollution(copied, name):
    for place in (copied, adapter_of(copied, 1)):
        (place / name).write_bytes(b"x" * 1000)
    checkpoint = opened(copied)
    assert [(str(file.relative_to(checkpoint.path)), file.stat().st_size) for file in checkpoint.details.pollution] == [
        (name, 1000),
        (f"peft_adapters/expert_1/expert_1/{name}", 1000),
    ][:: 1 if name < "peft" else -1]
    assert "merged model lies beside the adapters" in checkpoint.findings[0]
    assert len(lora_moe.describe(checkpoint)["pollution"]) == 2


def test_a_changed_alpha_is_described(copied):
    edit_json(adapter_of(copied, 1) / "adapter_config.json", lora_alpha=12)
    checkpoint = opened(copied)
    assert checkpoint.findings == ("the experts differ in lora_alpha: 6.0, 12.0",)
    assert [a["scaling"] for a in lora_moe.describe(checkpoint)["adapters"]] == [2.0, 4.0, 2.0]


def test_an_alpha_other_than_the_older_config_says_is_described(copied):
    edit_json(copied / "config.json", lora_alpha=32, lora_r=3)
    assert opened(copied).findings == ("config.json says lora_alpha 32, the adapters 6.0; the adapters' own counts",)


def test_a_base_of_another_width_or_depth(original, tmp_path):
    with pytest.raises(ModelError, match=r"reads a hidden size of 32, but the base .* has 64"):
        load_moe(original, write_base(tmp_path / "wide", hidden=64))
    with pytest.raises(ModelError, match=r"adapts model\.layers\.2\..*, which the base .* has not"):
        load_moe(original, write_base(tmp_path / "shallow", layers=2))
    with pytest.raises(CheckpointError, match=r"missing keys \['base_model\.model\.model\.layers\.3\."):
        load_moe(original, write_base(tmp_path / "deep", layers=4))
    with pytest.raises(ModelError, match=r"adapted from 80 to 32 features, but the base .* has 96 and 32"):
        load_moe(original, write_base(tmp_path / "inner", intermediate_size=96))


@pytest.mark.parametrize("content", [{}, {"config.json": '{"model_type": "llama"}'}, {"notes.txt": "x"}])
def test_other_directories_do_not_match(tmp_path, content):
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    assert lora_moe.matches(Listing.of(tmp_path)) is None


def test_a_model_type_alone_matches_and_says_what_is_missing(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "dylora-moe", "num_experts": 2}')
    assert lora_moe.matches(Listing.of(tmp_path)) == "config.json says model_type dylora-moe"
    with pytest.raises(CheckpointError, match="has no router"):
        opened(tmp_path)
