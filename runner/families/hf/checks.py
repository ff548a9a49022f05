"""The checks of a Hugging Face model directory and of LoRA adapters, alone or as experts: what of them is trained, and
what base they fit; a small base model, for what stands on one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.checks.check import by_name, part_check
from runner.checks.context import BUILT, CheckContext, Traits
from runner.checks.environment import write_zeros
from runner.families.hf.checkpoint import bad_sizes, llama_shapes
from runner.families.lora.checkpoint import AdapterDetails, key, misfits

if TYPE_CHECKING:
    from torch import nn

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
# Of the tiny adapter.
TINY_HIDDEN, TINY_RANK = 8, 2


class LoraTraits(Traits):
    """Only the adapters, and a router over them, are trained."""

    def is_trained(self, name: str) -> bool:
        """As `Traits.is_trained`."""
        return ".lora_" in name or name.startswith("router.")

    def may_be_zero(self, name: str, trained: Mapping[str, nn.Parameter]) -> bool:
        """Where the other factor is zero, as B is before training; the softmax over one expert is constant."""
        if ".lora_" in name:
            other = name.replace(".lora_A.", ".lora_B.") if ".lora_A." in name else name.replace(".lora_B.", ".lora_A.")
            return not bool(trained[other].any())
        return trained[name].shape[0] == 1 or super().may_be_zero(name, trained)


def base_misfits(adapters: Mapping[str, AdapterDetails], config: Mapping[str, Any]) -> list[str]:
    """As `Family.base_misfits`, for adapters by what messages call them: hidden size, and for a Llama each module."""
    made = {size for adapter in adapters.values() for size in adapter.hidden_sizes}
    hidden = config.get("hidden_size")
    if hidden is not None and made - {hidden}:
        shown = ", ".join(map(str, sorted(made)))
        return [f"hidden_size is {hidden} in the base, but the checkpoint is made for {shown}"]
    if config.get("model_type") != "llama" or bad_sizes(config):
        return []
    shapes = {name.removesuffix(".weight"): shape for name, shape in llama_shapes(config).items() if len(shape) == 2}
    linears = {name: (inputs, outputs) for name, (outputs, inputs) in shapes.items()}
    return [f"{label}: {text}" for label, adapter in adapters.items() for text in misfits(adapter, linears)]


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


def write_adapter(root: Path) -> str:
    """The tiny peft."""
    root.mkdir(parents=True)
    tensors: dict[str, tuple[int, ...]] = {}
    for module in (f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)):
        tensors |= {key(module, "A"): (TINY_RANK, TINY_HIDDEN), key(module, "B"): (TINY_HIDDEN, TINY_RANK)}
    write_zeros(root / "adapter_model.safetensors", tensors)
    config = {"peft_type": "LORA", "r": TINY_RANK, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (root / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return "adapter_config.json"


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
