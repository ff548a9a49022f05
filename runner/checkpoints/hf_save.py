"""Writes a complete model as a Hugging Face directory: config.json, one safetensors file, and what lies beside them."""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from runner.families.hf.checkpoint import CONFIG, SINGLE


def save(
    directory: Path, tensors: Mapping[str, torch.Tensor], *, config: Mapping[str, Any], beside: Iterable[Path] = ()
) -> None:
    """Write the files into `directory` (a staged one: see commit.py).

    `tensors`: all weights by their names; `config` becomes config.json; `beside`: files that are copied as they are.
    The weights file holds copies of its own, never views of larger storages.
    """
    owned = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    save_file(owned, directory / SINGLE[0], metadata={"format": "pt"})
    for file in beside:
        shutil.copyfile(file, directory / file.name)
    (directory / CONFIG).write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")
