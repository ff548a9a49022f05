"""A Hugging Face model directory: where its config, weights and tokenizer lie, and how one is written."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.checkpoints.checkpoint import Checkpoint, Listing
from runner.errors import CheckpointError
from runner.files.strict_json import read_object
from runner.files.tensors import TensorSource, open_sharded, open_weights, owned

if TYPE_CHECKING:
    import torch
    from torch import nn

# The files in which transformers saves a model.
MERGED_MODEL = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
CONFIG = "config.json"
SINGLE = ("model.safetensors", "pytorch_model.bin")
SHARDED = tuple(f"{name}.index.json" for name in SINGLE)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
# Model types of other formats, whose directories may hold weights as pollution.
_OTHERS = ("dylora-moe",)
# What says that an NPT model's base was changed for good; its NPT weights lie beside it.
INJECTION_HISTORY = "injection_history.json"
_OTHER_PARTS = ("peft_adapters", "dylo_moe_state", "adapter_config.json", INJECTION_HISTORY)
_CONFIG_LIMIT = 16 << 20
# What inspect shows of a config.json.
_SHOWN = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "tie_word_embeddings",
)  # fmt: skip


def architecture(config: Mapping[str, object]) -> dict[str, object]:
    """What inspect shows of a config.json."""
    return {name: config[name] for name in _SHOWN if name in config}


def read_config(directory: Path) -> dict[str, Any]:
    """config.json as a dict. Raises CheckpointError where it is missing or no JSON object."""
    path = directory / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{directory}: has no config.json, so it is no Hugging Face model directory")
    return read_object(path, "config.json", _CONFIG_LIMIT)


def open_model_weights(directory: Path) -> TensorSource:
    """The weights of the directory, headers only. Raises CheckpointError where none or several candidates lie there."""
    found = [name for name in (*SINGLE, *SHARDED) if (directory / name).exists()]
    if not found:
        raise CheckpointError(f"{directory}: holds no weights ({', '.join((*SINGLE, *SHARDED))})")
    if len(found) > 1:
        raise CheckpointError(f"{directory}: holds {' and '.join(found)}; keep the one that is meant")
    path = directory / found[0]
    return open_sharded(path) if found[0] in SHARDED else open_weights(path)


def has_tokenizer(directory: Path) -> bool:
    """Whether tokenizer files lie in the directory."""
    return any((directory / name).is_file() for name in TOKENIZER_FILES)


def is_model_directory(listing: Listing) -> bool:
    """Whether it holds a config.json with a model type of its own, and weights beside it."""
    if not listing.path.is_dir() or CONFIG not in listing.entries:
        return False
    if not any(name in listing.entries for name in (*SINGLE, *SHARDED)) or set(_OTHER_PARTS) & set(listing.entries):
        return False
    model_type = read_config(listing.path).get("model_type")
    return isinstance(model_type, str) and model_type not in _OTHERS


def save(
    directory: Path, tensors: Mapping[str, torch.Tensor], *, config: Mapping[str, object], beside: Iterable[Path] = ()
) -> None:
    """Write the files into `directory` (a staged one).

    `tensors`: all weights by their names; `config` becomes config.json; `beside`: files that are copied as they are.
    The weights file holds copies of its own, never views of larger storages.
    """
    from safetensors.torch import save_file

    from runner.files.archive import require_crc

    save_file(owned(tensors), directory / SINGLE[0], metadata={"format": "pt"})
    for file in beside:
        require_crc(file)
        shutil.copyfile(file, directory / file.name)
    write_config(directory, config)


def write_config(directory: Path, config: Mapping[str, object]) -> None:
    """Write config.json."""
    (directory / CONFIG).write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")


def stored_tensors(checkpoint: Checkpoint, model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's weights under the names that the checkpoint stores: a tied head that it leaves out is left out again.

    What no model computes with is read: gates before permanent updates, buffers that follow from the config.
    """
    state = model.state_dict()
    return {name: state[name] if name in state else checkpoint.weights.read(name) for name in checkpoint.weights.infos}
