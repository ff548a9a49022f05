"""Our Llama against that of transformers, over configs of every kind."""

import itertools

import pytest
import torch
from transformers import LlamaConfig as TheirConfig
from transformers import LlamaForCausalLM

from runner.errors import ModelError
from runner.evaluation.base_models import config_from, load_base
from runner.evaluation.llama import Llama
from runner.evaluation.llama_config import LlamaConfig, read_config
from tests.conftest import write_base
from tests.llamas import own

POSITIONS, LENGTH = 16, 24  # what the models are made for, and what they are run on
ROTATIONS = {
    "default": {},
    "older names": {"rope_theta": 500.0},
    "linear": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 2, "rope_theta": 100.0}},
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 12, "rope_theta": 50.0,
        }
    },
    "yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}},
    "yarn with temperatures": {
        "rope_parameters": {
            "rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.5, "beta_fast": 4, "beta_slow": 2,
            "truncate": False, "rope_theta": 300.0,
        }
    },
    "longrope, which transformers computes": {
        "rope_parameters": {
            "rope_type": "longrope", "short_factor": [1.0, 1.1, 1.3, 2.0], "long_factor": [1.0, 2.0, 3.0, 4.0],
            "original_max_position_embeddings": 12, "factor": 2.0,
        }
    },
}  # fmt: skip
SHAPES = (
    {"num_attention_heads": 4, "num_key_value_heads": 4},
    {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True, "attention_bias": True},
    {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "mlp_bias": True, "rms_norm_eps": 1e-5},
)


def theirs(seed: int = 0, **values: object) -> LlamaForCausalLM:
    """A random Llama of transformers, its biases and norms random, too."""
    sizes = {
        "vocab_size": 50, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
        "max_position_embeddings": POSITIONS, "initializer_range": 0.3, "eos_token_id": None,
    }  # fmt: skip
    torch.manual_seed(seed)
    model = LlamaForCausalLM(TheirConfig(**{**sizes, **values})).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.uniform_(0.5, 1.5)
    return model


def pairs() -> list:
    return [
        pytest.param(rotation, shape, id=f"{name}, {i}")
        for (name, rotation), (i, shape) in itertools.product(ROTATIONS.items(), enumerate(SHAPES))
    ]


@pytest.mark.parametrize(("rotation", "shape"), pairs())
@torch.inference_mode()
def test_logits_equal_those_of_transformers(rotation, shape):
    their_model = theirs(**rotation, **shape)
    model = own(their_model)
    assert (model.config.theirs is not None) == ("longrope" in str(rotation))
    ids = torch.randint(50, (3, LENGTH))
    assert torch.equal(model(ids).logits, their_model(ids).logits)
    # Padding on the left and on the right, and positions that count from the first token.
    mask = torch.ones_like(ids)
    mask[0, :5], mask[1, -7:] = 0, 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    given = {"attention_mask": mask, "position_ids": positions}
    equal(model(ids, **given).logits[mask == 1], their_model(ids, **given).logits[mask == 1])
    states = model(ids, output_hidden_states=True).hidden_states
    for found, expected in zip(states, their_model(ids, output_hidden_states=True).hidden_states, strict=True):
        equal(found, expected)


@pytest.mark.parametrize(("rotation", "shape"), pairs())
@torch.inference_mode()
def test_greedy_tokens_of_padded_prompts_equal_those_of_transformers(rotation, shape):
    their_model = theirs(seed=1, **rotation, **shape)
    model = own(their_model)
    ids, mask = torch.randint(50, (3, 6)), torch.ones(3, 6, dtype=torch.long)
    mask[1, :2], mask[2, :5] = 0, 0
    options = {"max_new_tokens": LENGTH - 6, "do_sample": False, "pad_token_id": 0}
    expected = their_model.generate(ids, attention_mask=mask, **options)[:, 6:]
    cache = model.new_cache(6 - mask.sum(-1), length=LENGTH)
    step, found = ids, []
    for _ in range(LENGTH - 6):
        step = model.advance(step, cache).argmax(-1, keepdim=True)
        found.append(step)
    assert torch.equal(torch.cat(found, dim=1), expected)


@torch.inference_mode()
@pytest.mark.parametrize("shape", SHAPES)
def test_a_sequence_in_parts_gives_the_logits_of_the_whole(shape):
    model = own(theirs(**shape))
    ids = torch.randint(50, (2, LENGTH))
    whole, cache = model(ids).logits, model.new_cache(torch.zeros(2, dtype=torch.long), length=4)
    for start, end in itertools.pairwise((0, 5, 6, 7, 15, LENGTH)):  # and the room of 4 grows
        equal(model.advance(ids[:, start:end], cache), whole[:, end - 1], tolerance=1e-4)
    assert cache.get_seq_length() == LENGTH


def equal(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


@torch.inference_mode()
def test_another_activation_is_that_of_transformers():
    their_model = theirs(hidden_act="gelu_pytorch_tanh", **SHAPES[0])
    model, ids = own(their_model), torch.randint(50, (1, 9))
    assert model.config.theirs is not None
    equal(model(ids).logits, their_model(ids).logits)


def test_values_are_completed_as_transformers_completes_them():
    for values in ({}, *({**rotation, **shape} for rotation in ROTATIONS.values() for shape in SHAPES)):
        given = {"hidden_size": 32, "max_position_embeddings": 64, **values}
        config, their_config = read_config(given), TheirConfig(**given)
        for name in vars(config).keys() - {"theirs"}:
            assert getattr(config, name) == getattr(their_config, name), name


@pytest.mark.parametrize(
    "values",
    [
        {"hidden_size": 30, "num_attention_heads": 4},
        {"vocab_size": "many"},
        {"num_attention_heads": 4, "num_key_value_heads": 3, "hidden_size": 32},
        {"rope_scaling": {"rope_type": "linear"}},
        {"rope_scaling": {"rope_type": "spiral"}},
        {"hidden_size": 32, "num_attention_heads": 4, "head_dim": 7},
        {"initializer_range": 3.0},
    ],
)
def test_impossible_values_are_refused_in_one_line(values):
    with pytest.raises(ModelError, match=r"^here: config.json \(model_type 'llama'\) makes no model: .+$"):
        config_from({"model_type": "llama", **values}, "here")


def test_shards_and_a_tied_head_are_read(tmp_path):
    base = write_base(tmp_path / "base", tie_word_embeddings=True)
    expected = LlamaForCausalLM.from_pretrained(base)
    sharded = tmp_path / "shards"
    expected.save_pretrained(sharded, max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    model = load_base(None, sharded).model
    assert isinstance(model, Llama)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        equal(model(ids).logits, expected(ids).logits)


def test_gradients_are_those_of_transformers_and_the_same_with_checkpointing():
    their_model, ids = theirs(**SHAPES[1]).requires_grad_(True), torch.arange(12)[None]
    their_model(ids).logits.square().mean().backward()
    expected = {name: p.grad.clone() for name, p in their_model.named_parameters()}
    for checkpointing in (False, True):
        model = own(their_model).train().requires_grad_(True)
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids).logits.square().mean().backward()
        found = dict(model.named_parameters())
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            equal(found[name].grad, gradient, tolerance=1e-5)


def test_the_default_sizes_are_those_of_transformers():
    assert LlamaConfig(rope_parameters={}) == LlamaConfig(rope_parameters={}, head_dim=4096 // 32)
