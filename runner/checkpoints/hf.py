"""`hf`: a plain Hugging Face causal LM directory: config.json and weights, single or sharded."""

import json
from pathlib import Path
from typing import Any

from runner.checkpoints.tensors import TensorSource, open_sharded, open_weights
from runner.errors import CheckpointError

NAME = "hf"
FAMILY = "hf"
CONFIG = "config.json"
SINGLE = ("model.safetensors", "pytorch_model.bin")
SHARDED = tuple(f"{name}.index.json" for name in SINGLE)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def read_config(directory: Path) -> dict[str, Any]:
    """config.json as a dict. Raises CheckpointError where it is missing or no JSON object."""
    path = directory / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{directory}: has no config.json, so it is no Hugging Face model directory") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: holds a {type(config).__name__}, not an object")
    return config


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
