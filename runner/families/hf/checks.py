"""The checks of a Hugging Face model directory and of a plain adapter; a small base model, for what stands on one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from runner.checks.check import by_name, part_check
from runner.checks.context import BUILT, CheckContext
from runner.checks.environment import write_zeros
from runner.families.hf.checkpoint import llama_shapes

if TYPE_CHECKING:
    from runner.evaluation.base_models import Base

CHECKS = by_name(
    part_check("config", "config.json describes a model", BUILT,
               advice="restore the config.json that was saved with these weights"),
    part_check("adapters", "the adapter has config and weights", "files",
               advice="copy the adapter again from where it was trained"),
    part_check("keys", "every tensor, nothing else", "files", "config", "adapters",
               advice="what loads it would take the rest without an error: save it again"),
    part_check("shapes", "shapes as the config says", "keys", advice="the config is that of other weights"),
    part_check("pollution", "no merged model beside an adapter", BUILT, advice="delete it"),
)  # fmt: skip
# The built-in base: large enough that every part of a Llama with grouped queries is there, small enough to be instant.
HIDDEN, INNER, LAYERS, VOCABULARY, POSITIONS = 64, 160, 3, 512, 512


def write_model(root: Path, others: Mapping[str, tuple[int, ...]] | None = None) -> str:
    """The tiny hf; `others`: tensors beside those of the plain model."""
    root.mkdir(parents=True)
    config = {
        "model_type": "llama", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
        "num_attention_heads": 2, "vocab_size": 16,
    }  # fmt: skip
    write_zeros(root / "model.safetensors", llama_shapes(config) | dict(others or {}))
    (root / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return "config.json"


def small_base(context: CheckContext, root: Path) -> tuple[Base, str]:
    """The base of `base=`, else a small one with random weights in `root`/base; and what a checkpoint calls it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from runner.data.world import generate, train_tokenizer
    from runner.evaluation.base_models import load_base
    from runner.files.staging import staged
    from runner.training.language_model import save_language_model

    if context.config.base is not None:
        base = load_base(None, context.config.base, context.placement)
        return base, str(base.path.resolve())
    directory = root / "base"
    if not directory.is_dir():
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=POSITIONS, initializer_range=0.1,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]), staged(directory) as partial:
            torch.manual_seed(context.config.seed)
            save_language_model(LlamaForCausalLM(config), train_tokenizer(generate(0), VOCABULARY), partial)
    return load_base(None, directory, context.placement), "../base"
