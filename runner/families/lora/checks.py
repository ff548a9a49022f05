"""What a LoRA adapter, alone or as an expert, is for the checks: what of it is trained, and what base it fits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.checks.context import Traits
from runner.checks.environment import write_zeros
from runner.families.hf.checkpoint import bad_sizes, llama_shapes
from runner.families.lora.checkpoint import AdapterDetails, key

if TYPE_CHECKING:
    from torch import nn

# Of the tiny layouts.
HIDDEN, LAYERS, RANK = 8, 2, 2


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
    """As `Family.base_misfits`, for adapters by what messages call them: hidden size, depth, and for a Llama each
    module's size."""
    problems = []
    made = {size for adapter in adapters.values() for size in adapter.hidden_sizes}
    hidden = config.get("hidden_size")
    if hidden is not None and made - {hidden}:
        shown = ", ".join(map(str, sorted(made)))
        problems.append(f"hidden_size is {hidden} in the base, but the checkpoint is made for {shown}")
    if problems or config.get("model_type") != "llama" or bad_sizes(config):
        return problems
    wanted = llama_shapes(config)
    for label, adapter in adapters.items():
        for module in adapter.modules:
            shape = wanted.get(f"{module.name}.weight")
            if shape is None:
                problems.append(f"{label} adapts {module.name}, which the base has not")
            elif (module.out_features, module.in_features) != shape:
                problems.append(
                    f"{label} adapts {module.name} from {module.in_features} to {module.out_features} features, "
                    f"where the base has {shape[1]} and {shape[0]}"
                )
    return problems


def write_adapter(root: Path) -> str:
    """The tiny peft."""
    root.mkdir(parents=True)
    tensors: dict[str, tuple[int, ...]] = {}
    for module in (f"model.layers.{layer}.self_attn.q_proj" for layer in range(LAYERS)):
        tensors |= {key(module, "A"): (RANK, HIDDEN), key(module, "B"): (HIDDEN, RANK)}
    write_zeros(root / "adapter_model.safetensors", tensors)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (root / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return "adapter_config.json"
