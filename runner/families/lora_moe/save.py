"""Writes lora_moe checkpoints: adapters nested as PEFT nests them, router, config, skills; never a merged model."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from runner.families.lora.checkpoint import adapter_config, matrices, save_adapter
from runner.families.lora_moe.checkpoint import TEMPERATURE, expert_name
from runner.families.lora_moe.model import Adapter, LoraMoeForCausalLM
from runner.families.lora_moe.state import ADAPTERS, CONFIG, MODEL_TYPE, ROUTERS, SKILLS
from runner.files.staging import staged
from runner.files.tensors import owned


def config(*, base_name: str, num_experts: int, step: int | None = None, top_k: int | None = None) -> dict[str, Any]:
    """config.json of a checkpoint; without `top_k` readers take 1."""
    values = {
        "model_type": MODEL_TYPE,
        "_dylora_format": "peft_separated",
        "_dylora_checkpoint_step": step,
        "base_model_name_or_path": base_name,
        "num_experts": num_experts,
        "checkpoint_type": "peft_only",
        "top_k": top_k,
    }
    return {name: value for name, value in values.items() if value is not None}


def save(
    directory: Path,
    *,
    config: Mapping[str, Any],
    experts: Sequence[tuple[Mapping[str, Any], Mapping[str, torch.Tensor]]],
    router: tuple[torch.Tensor, torch.Tensor],
    skills: Mapping[int | str, torch.Tensor] | None = None,
) -> None:
    """Write the files of a checkpoint into `directory` (a staged one).

    `experts`: adapter_config.json and tensors by the names of `adapters.key`, in the order of the router's rows;
    `router`: weight [experts, d] and bias [experts]; `skills`: embeddings [d] by id. The files hold copies of their
    own, never views of larger storages.
    """
    for index, (settings, tensors) in enumerate(experts):
        name = expert_name(index)
        save_adapter(directory / ADAPTERS / name / name, tensors, settings)
    gate = owned({"gate.weight": router[0], "gate.bias": router[1]})
    save_file(gate, directory / ROUTERS[0], metadata={"format": "pt"})
    if skills is not None:
        torch.save(owned(skills), directory / SKILLS)
    (directory / CONFIG).write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")


def save_moe(
    model: LoraMoeForCausalLM,
    directory: Path,
    *,
    base_name: str,
    step: int | None = None,
    skills: Mapping[int | str, torch.Tensor] | None = None,
    recipe: Mapping[str, Any] | None = None,
    add_files: Callable[[Path], None] | None = None,
) -> None:
    """Write `directory`: config, an adapter an expert, router and skills; never the base's weights.

    `base_name`: a hub name, or a path that holds from the checkpoint. `skills`: embeddings [d] by id. `recipe`: how
    the model was made, for the manifest. `add_files` writes more (a trainer's state) before it is published. Raises
    CheckpointError where `directory` exists, RunnerError where the disk fails.
    """
    names = _linears(model.lm)
    settings = config(base_name=base_name, num_experts=len(model.names), step=step, top_k=model.top_k)
    if model.temperature != TEMPERATURE:
        settings["temperature"] = model.temperature
    experts = [
        (_adapter_config(adapter, names, base_name, model.dropout), matrices(adapter)) for adapter in model.adapters()
    ]
    size = sum(tensor.nbytes for _, tensors in experts for tensor in tensors.values())
    manifest = None if recipe is None else {"recipe": dict(recipe)}
    with staged(directory, expected_bytes=size, manifest=manifest) as partial:
        save(partial, config=settings, experts=experts, router=(model.router.weight, model.router.bias), skills=skills)
        if add_files is not None:
            add_files(partial)


def _adapter_config(adapter: Adapter, linears: list[str], base_name: str, dropout: float) -> dict[str, Any]:
    """adapter_config.json of one expert: the commonest rank and alpha for all modules, patterns for the others."""
    ranks = {module: a.shape[0] for module, (a, _, _) in adapter.items()}
    alphas = {module: _rounded(scaling * ranks[module]) for module, (_, _, scaling) in adapter.items()}
    r, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    targets = _targets(adapter, linears)
    config = adapter_config(base_name=base_name, r=r, alpha=alpha, target_modules=targets, dropout=dropout)
    patterns = {
        "rank_pattern": {module: rank for module, rank in ranks.items() if rank != r},
        "alpha_pattern": {module: value for module, value in alphas.items() if value != alpha},
    }
    return {**config, **{name: pattern for name, pattern in patterns.items() if pattern}}


def _targets(adapter: Adapter, linears: list[str]) -> set[str]:
    """What to call the adapted modules: by the ends of their names where these name no other module, else in full."""
    ends = {module.rpartition(".")[2] for module in adapter}
    named = {module for module in linears if module.rpartition(".")[2] in ends}
    return ends if named == set(adapter) else set(adapter)


def _linears(model: nn.Module) -> list[str]:
    """The linear modules under the names that they have in the base without adapters."""
    from runner.families.lora.model import RoutedLinear

    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, RoutedLinear)) and ".lora_" not in name and not name.endswith(".base_layer")
    ]


def _rounded(alpha: float) -> float:
    """An alpha as a whole number where it is one but for the rounding of alpha / r · r."""
    return round(alpha) if abs(alpha - round(alpha)) < 1e-9 else alpha
