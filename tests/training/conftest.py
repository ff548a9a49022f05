"""A tiny Llama with random weights, and NPT layers over it."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from runner.evaluation.llama import Llama
from runner.families.npt import EquivalenceSettings
from runner.families.npt.model import NptLlamaForCausalLM
from runner.families.npt.training_start import initial_updates
from tests.llamas import own


@pytest.fixture
def their_base() -> LlamaForCausalLM:
    """Three layers, d 16, f 24, grouped heads, 40 tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture
def base(their_base) -> Llama:
    """The same, as the package runs it."""
    return own(their_base)


@pytest.fixture
def settings() -> EquivalenceSettings:
    return EquivalenceSettings(
        layers=(0, 2), np_rank=3, num_ranks=2, max_steps=20, save_every=10, warmup_steps=4, batch_size=2
    )


@pytest.fixture
def model(base, settings) -> NptLlamaForCausalLM:
    return NptLlamaForCausalLM(base, initial_updates(base.config, settings))


@pytest.fixture
def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(40, (2, length), generator=generator) for length in (5, 9, 7)]
