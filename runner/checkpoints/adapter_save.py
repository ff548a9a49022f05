"""Writes one PEFT LoRA adapter directory."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from runner.families.lora import config as lora_config
from runner.families.lora.adapter import WEIGHT_FILES


def save_adapter(directory: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> None:
    """Write an adapter into `directory`, which is created: `tensors` by the names of `key`, `config` as JSON.

    The file holds copies of its own, never views of larger storages.
    """
    directory.mkdir(parents=True)
    owned = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    save_file(owned, directory / WEIGHT_FILES[0], metadata={"format": "pt"})
    text = json.dumps(dict(config), indent=2, sort_keys=True, ensure_ascii=False)
    (directory / lora_config.FILE_NAME).write_text(text + "\n", encoding="utf-8")


def adapter_config(
    *,
    base_name: str,
    r: int,
    alpha: float,
    target_modules: Iterable[str],
    use_rslora: bool = False,
    dropout: float = 0.0,
) -> dict[str, Any]:
    """adapter_config.json of a plain LoRA adapter; PEFT takes its defaults for every other field."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "use_rslora": use_rslora,
        "target_modules": sorted(target_modules),
        "bias": "none",
        "init_lora_weights": True,
    }
