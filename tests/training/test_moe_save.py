"""What is saved from memory opens as what it was."""

import json
import sys

import pytest
import torch

from runner import load
from runner.errors import CheckpointError
from runner.evaluation.base_models import load_base
from runner.evaluation.placement import Placement
from runner.families.lora_moe.model import LoraMoeForCausalLM
from runner.families.lora_moe.save import save_moe
from runner.files import staging as commit
from tests.conftest import write_base
from tests.lora_files import adapter_of, load_moe, write_adapter, write_moe

IDS = torch.tensor([[5, 9, 31, 7, 250, 3, 77, 4]])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture
def model(tmp_path, base):
    return load_moe(write_moe(tmp_path / "source", base, top_k=2), base).eval()


def test_a_saved_model_computes_the_same(model, base, tmp_path):
    target = tmp_path / "saved"
    skills = {0: torch.ones(32), "arithmetic": torch.zeros(32)}
    save_moe(model, target, base_name=str(base), step=7, skills=skills)
    again = load(target, device="cpu")
    with torch.inference_mode():
        one, other = model(IDS), again(IDS)
    assert torch.equal(one.logits, other.logits)
    assert torch.equal(one.expert_weights, other.expert_weights)
    assert commit.verify(target) == []
    assert sorted(str(f.relative_to(target)) for f in target.rglob("*") if f.is_file()) == sorted(
        [
            "MANIFEST.json",
            "config.json",
            "router.safetensors",
            "skill_library.pt",
            *(
                f"peft_adapters/expert_{i}/expert_{i}/{name}"
                for i in range(3)
                for name in ("adapter_config.json", "adapter_model.safetensors")
            ),
        ]
    )
    assert torch.load(target / "skill_library.pt", weights_only=True).keys() == skills.keys()
    values = json.loads((target / "config.json").read_text())
    assert (values["num_experts"], values["top_k"], values["_dylora_checkpoint_step"]) == (3, 2, 7)


def test_experts_of_other_ranks_and_modules_keep_them(base, tmp_path):
    """A rank pattern, an alpha of its own, stabilised ranks, and one layer only."""
    source = write_moe(tmp_path / "source", base, experts=3)
    module = "model.layers.1.mlp.down_proj"
    for index, values in enumerate(
        [
            {"ranks": {module: 2}, "rank_pattern": {module: 2}, "alpha_pattern": {module: 7}},
            {"use_rslora": True},
            {"layers": [1], "layers_to_transform": [1], "lora_dropout": 0.25},
        ]
    ):
        place = adapter_of(source, index)
        for file in place.iterdir():
            file.unlink()
        place.rmdir()
        write_adapter(place, base, seed=40 + index, **values)
    model = load_moe(source, base, dropout=0.25).eval()
    save_moe(model, tmp_path / "saved", base_name=str(base))
    again = load(tmp_path / "saved", device="cpu")
    assert torch.equal(model(IDS).logits, again(IDS).logits)
    first = json.loads((adapter_of(tmp_path / "saved", 0) / "adapter_config.json").read_text())
    assert (first["r"], first["lora_alpha"], first["lora_dropout"]) == (3, 6, 0.25)
    assert (first["rank_pattern"], first["alpha_pattern"]) == ({module: 2}, {module: 7})
    third = json.loads((adapter_of(tmp_path / "saved", 2) / "adapter_config.json").read_text())
    assert all(name.startswith("model.layers.1.") for name in third["target_modules"])


def test_an_existing_directory_is_left_alone(model, base, tmp_path):
    with pytest.raises(CheckpointError):
        save_moe(model, tmp_path / "source", base_name=str(base))


def test_nothing_is_left_where_a_further_file_fails(model, base, tmp_path):
    def fails(directory):
        (directory / "half").write_text("a")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_moe(model, tmp_path / "out" / "saved", base_name=str(base), add_files=fails)
    assert [path.name for path in (tmp_path / "out").iterdir() if not path.name.endswith(".lock")] == []


def test_many_experts_cost_as_much_each_as_few(base, tmp_path):
    """Function calls, which are the same each time: with each expert walking through all others they grow as a square."""
    model = load_base(None, base, Placement(device="cpu")).model
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event == "call"

    def cost(experts: int) -> int:
        nonlocal calls
        factors = torch.ones(2, 32), torch.ones(32, 2), 1.0
        adapters = [{"model.layers.0.self_attn.q_proj": factors, "model.layers.1.self_attn.o_proj": factors}] * experts
        calls = 0
        sys.setprofile(count)
        try:
            made = LoraMoeForCausalLM(model, adapters, (torch.ones(experts, 32), torch.zeros(experts)), top_k=1)
            save_moe(made, tmp_path / f"saved-{experts}", base_name="b")
        finally:
            sys.setprofile(None)
        return calls

    cost(2)
    ten, twenty, forty = cost(10), cost(20), cost(40)
    assert forty - twenty < 2.4 * (twenty - ten)
