"""Writes a lora_moe checkpoint: adapters nested as PEFT nests them, router, config, skills; never a merged model."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from runner.families.lora.adapter import save_adapter
from runner.families.lora_moe.checkpoint import ADAPTERS, expert_name
from runner.families.lora_moe.state import CONFIG, MODEL_TYPE, ROUTERS, SKILLS


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
    """Write the files of a checkpoint into `directory` (a staged one: see commit.py).

    `experts`: adapter_config.json and tensors by the names of `adapters.key`, in the order of the router's rows;
    `router`: weight [experts, d] and bias [experts]; `skills`: embeddings [d] by id. The files hold copies of their
    own, never views of larger storages.
    """
    for index, (adapter_config, tensors) in enumerate(experts):
        name = expert_name(index)
        save_adapter(directory / ADAPTERS / name / name, tensors, adapter_config)
    gate = {"gate.weight": _owned(router[0]), "gate.bias": _owned(router[1])}
    save_file(gate, directory / ROUTERS[0], metadata={"format": "pt"})
    if skills is not None:
        torch.save({name: _owned(embedding) for name, embedding in skills.items()}, directory / SKILLS)
    (directory / CONFIG).write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")


def _owned(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
