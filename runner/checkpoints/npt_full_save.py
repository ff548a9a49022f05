"""Writes an npt_full checkpoint: a complete NPT model in a Hugging Face directory (spec/formats.md §2)."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from runner.checkpoints import hf
from runner.checkpoints.npt_full import TRAINING_INFO


def save(
    directory: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    config: Mapping[str, Any],
    training_info: Path | None,
) -> None:
    """Write the files of a checkpoint into `directory` (a staged one: see commit.py).

    `tensors`: base and adapters under the names of the format; `config` becomes config.json; `training_info` is the
    training_info.pt to copy, which holds the scale. The file holds copies of its own, never views.
    """
    owned = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    save_file(owned, directory / hf.SINGLE[0], metadata={"format": "pt"})
    if training_info is not None:
        shutil.copyfile(training_info, directory / TRAINING_INFO)
    (directory / hf.CONFIG).write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")
