"""Plain PEFT adapters: what is read, and every LoRA variant that would compute something else refused by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from runner.checkpoints.checkpoint import Listing
from runner.errors import CheckpointError
from runner.families.lora import checkpoint as peft_adapter
from runner.families.lora.config import read_settings
from tests.lora_files import load_adapter, write_adapter

IDS = torch.tensor([[5, 77, 9, 130]])


@pytest.fixture
def adapter(tmp_path, base):
    return write_adapter(tmp_path / "adapter", base)


def opened(path):
    return peft_adapter.read(Listing.of(path)).open()


def edit(path, **values):
    file = path / "adapter_config.json"
    content = {**json.loads(file.read_text()), **values}
    file.write_text(json.dumps({name: value for name, value in content.items() if value != "absent"}))


def test_what_headers_say(adapter, base):
    checkpoint = opened(adapter)
    assert peft_adapter.matches(Listing.of(adapter)) == "adapter_config.json of a PEFT adapter"
    assert (checkpoint.format, checkpoint.family, checkpoint.base_name) == ("peft", "hf", str(base))
    module = checkpoint.details.modules[0]
    assert (module.name, module.r, module.scaling) == ("model.layers.0.mlp.down_proj", 3, 2.0)
    assert (module.in_features, module.out_features) == (80, 32)
    assert checkpoint.details.hidden_size == 32
    description = peft_adapter.describe(checkpoint)
    assert json.loads(json.dumps(description)) == description
    assert description["adapters"][0]["target_modules"] == ["down_proj", "q_proj", "v_proj"]


def test_the_weights_file_itself_can_be_named(adapter):
    file = adapter / "adapter_model.safetensors"
    assert peft_adapter.matches(Listing.of(file))
    assert opened(file).details == opened(adapter).details


@pytest.mark.parametrize("beside", ["peft_adapters", "dylo_moe_state"])
def test_an_adapter_beside_experts_does_not_match(adapter, beside):
    (adapter / beside).mkdir()
    assert peft_adapter.matches(Listing.of(adapter)) is None


def test_a_bin_file_is_the_same_adapter(adapter):
    with torch.inference_mode():
        expected = load_adapter(adapter)(IDS).logits
        torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
        (adapter / "adapter_model.safetensors").unlink()
        assert torch.equal(load_adapter(adapter)(IDS).logits, expected)


def test_a_bin_file_with_other_objects(adapter):
    tensors = load_file(adapter / "adapter_model.safetensors")
    torch.save({**tensors, "step": 3}, adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"unexpected keys \['step'\]"):
        load_adapter(adapter)


def test_rank_stabilised_scaling(tmp_path, base):
    path = write_adapter(tmp_path / "adapter", base, r=4, alpha=6, use_rslora=True)
    assert opened(path).details.modules[0].scaling == 3.0  # 6 / √4


def test_changed_alpha_changes_scaling_and_logits(adapter):
    with torch.inference_mode():
        before = load_adapter(adapter)(IDS).logits
        edit(adapter, lora_alpha=12)
        assert opened(adapter).details.modules[0].scaling == 4.0
        assert not torch.equal(load_adapter(adapter)(IDS).logits, before)


def test_a_regular_expression_is_not_evaluated_and_said(adapter):
    edit(adapter, target_modules="(a+)+$")
    checkpoint = opened(adapter)
    assert len(checkpoint.details.modules) == 9
    assert "regular expression, which is not evaluated" in checkpoint.findings[0]
    assert load_adapter(adapter)(IDS).logits.shape == (1, 4, 272)


def test_excluded_modules_are_left_alone(tmp_path, base):
    layers = {"model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj", "model.layers.1.mlp.down_proj"}
    path = write_adapter(tmp_path / "adapter", base, layers=[0, 2], exclude_modules=sorted(layers))
    assert len(load_adapter(path).adapters()[0]) == 6
    edit(path, exclude_modules=[])
    with pytest.raises(CheckpointError, match=r"missing keys \['base_model\.model\.model\.layers\.1\."):
        load_adapter(path)


VARIANTS = {
    "use_dora": True,
    "use_qalora": True,
    "lora_bias": True,
    "bias": "lora_only",
    "modules_to_save": ["lm_head"],
    "trainable_token_indices": [1],
    "target_parameters": ["mlp.experts.gate_up_proj"],
    "layer_replication": [[0, 2], [1, 3]],
    "alora_invocation_tokens": [5],
    "arrow_config": {"top_k": 2},
    "kasa_config": {"beta": 1.0},
    "velora_config": {"num_groups": 2},
    "monteclora_config": {"num_samples": 3},
    "use_bdlora": {"nblocks": 2},
    "megatron_config": {"a": 1},
    "ensure_weight_tying": True,
    "init_lora_weights": "pissa_niter_4",
    "a_field_of_the_future": {"x": 1},
    "rank_pattern": {"(a|b)+": 3},
    "alpha_pattern": {"q_proj": "much"},
    "layers_to_transform": ["first"],
    "layers_pattern": "(x+)+",
    "exclude_modules": ".*q_proj",
    "target_modules": None,
    "lora_dropout": 1.5,
    "use_rslora": "yes",
    "r": 0,
    "lora_alpha": "8",
}


@pytest.mark.parametrize("field", list(VARIANTS))
def test_variants_are_refused_by_name(adapter, field):
    edit(adapter, **{field: VARIANTS[field]})
    with pytest.raises(CheckpointError) as caught:
        opened(adapter)
    assert field in str(caught.value)
    assert "adapter_config.json" in str(caught.value)


@pytest.mark.parametrize("value", ["LOHA", "XLORA", "IA3", None, "absent"])
def test_other_kinds_of_adapters(adapter, value):
    edit(adapter, peft_type=value)
    with pytest.raises(CheckpointError, match="only LORA adapters are read"):
        opened(adapter)


@pytest.mark.parametrize("alpha", ["NaN", "Infinity", "1e400", "9" * 400])
def test_an_alpha_that_is_no_number(adapter, alpha):
    file = adapter / "adapter_config.json"
    file.write_text(file.read_text().replace('"lora_alpha": 6', f'"lora_alpha": {alpha}'))
    with pytest.raises(CheckpointError, match="lora_alpha is"):
        opened(adapter)


def test_everything_neutral_that_peft_writes_is_accepted(adapter):
    values = json.loads((adapter / "adapter_config.json").read_text())
    from peft import LoraConfig

    written = LoraConfig(r=3, lora_alpha=6, target_modules=values["target_modules"], task_type="CAUSAL_LM").to_dict()
    (adapter / "adapter_config.json").write_text(json.dumps({**written, "target_modules": values["target_modules"]}))
    assert opened(adapter).details.modules[0].scaling == 2.0


def test_dora_vectors_are_not_dropped(adapter):
    file = adapter / "adapter_model.safetensors"
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"
    save_file({**load_file(file), name: torch.ones(32)}, file)
    assert opened(adapter).unknown == (name,)
    with pytest.raises(CheckpointError, match=rf"unexpected keys \['{name}'\]"):
        load_adapter(adapter)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("model.layers.10.self_attn.q_proj", None),
        ("model.layers.1.self_attn.q_proj", "q_proj"),
        ("model.layers.2.self_attn.q_proj", None),
        ("model.layers.2.mlp.down_proj", "model.layers.2.mlp.down_proj"),
        ("model.layers.1.self_attn.notq_proj", None),
    ],
)
def test_targets_are_matched_as_peft_does(adapter, module, expected):
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    fields = {"target_modules": ["q_proj", "model.layers.2.mlp.down_proj"], "layers_to_transform": [1]}
    edit(adapter, **fields)
    assert read_settings(adapter).target_of(module) == expected
    assert bool(check_target_module_exists(LoraConfig(**fields), module)) == (expected is not None)
