"""What a checkpoint of experts was trained with, kept in its manifest, and in what a training that goes on differs."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from runner.families.lora_moe.data import Row
from runner.families.lora_moe.settings import MoeSettings
from runner.files import manifest

# What the state of the optimizer and its schedule says again, whatever the settings say.
RESTORED = ("learning_rate", "weight_decay")
# How often a checkpoint is written, and how skills are told apart, changes no weight.
HARMLESS = ("save_every", "novelty", "novelty_threshold")


def recipe(settings: MoeSettings, rows: Sequence[Row], base_name: str) -> dict[str, Any]:
    """Settings, base, and the SHA-256 of the rows of token ids in their order, as values of JSON."""
    text = json.dumps([list(row) for row in rows], separators=(",", ":"))
    data = hashlib.sha256(text.encode()).hexdigest()
    values = {"task": "train", "family": "lora_moe", "base": base_name, "data_sha256": data, **asdict(settings)}
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return plain


def differences(checkpoint: Path, now: Mapping[str, Any]) -> list[str]:
    """In what a training with the recipe `now` that goes on from `checkpoint` is not the one that wrote it.

    One line a difference; empty where it continues that training bit for bit. Raises CheckpointError for a damaged
    manifest.
    """
    if not (checkpoint / manifest.FILE_NAME).is_file():
        return [f"{checkpoint} has no {manifest.FILE_NAME}: what it was trained with is not known"]
    before = manifest.read(checkpoint).get("recipe")
    if not isinstance(before, Mapping):
        return [f"{checkpoint / manifest.FILE_NAME} has no recipe: what it was trained with is not known"]
    changed = [name for name in now if now[name] != before.get(name) and name not in HARMLESS]
    return [_difference(name, before.get(name), now[name]) for name in changed]


def _difference(name: str, before: Any, now: Any) -> str:
    if name == "data_sha256":
        return "goes on with other data than the checkpoint's: not what one uninterrupted training would have given"
    if name in RESTORED:
        return f"{name} stays {before}, as the checkpoint's optimizer has it, and is not {now}"
    return f"goes on with {name} {now} after {before}: not what one uninterrupted training would have given"
