"""`peft`: one plain LoRA adapter over a base model."""

from pathlib import Path
from typing import Any

from runner.checkpoints.checkpoint import Checkpoint, CheckpointFormat, Listing
from runner.checkpoints.reading import Parts, Reading, look_for_merged_model
from runner.families.lora.adapter import (
    WEIGHT_FILES,
    AdapterDetails,
    describe_adapter,
    read_adapter,
    settings_findings,
    size_contradiction,
)
from runner.families.lora.config import FILE_NAME
from runner.families.lora_moe.checkpoint import ADAPTERS
from runner.families.lora_moe.state import OLDER, read_trainer_state

NAME = "peft"
FAMILY = "hf"


def matches(listing: Listing) -> str | None:
    """The evidence: adapter_config.json in the directory, or beside the file if that is an adapter's weights."""
    directory = _directory(listing)
    if ADAPTERS in listing.entries or OLDER in listing.entries:
        return None  # a Trainer may have saved one beside several experts
    if (directory / FILE_NAME).is_file():
        return f"{FILE_NAME} of a PEFT adapter"
    return None


def resembles(listing: Listing) -> int:
    """3 where an adapter's config or weights are there."""
    return 3 if {FILE_NAME, *WEIGHT_FILES} & {*listing.entries} else 0


def read(listing: Listing) -> Reading:
    """The checkpoint, part by part: files, adapters, keys, shapes, pollution."""
    parts, directory = Parts(), _directory(listing)
    files = tuple(directory / name for name in WEIGHT_FILES if (directory / name).is_file())
    parts.is_sound("config", "an adapter has none")
    look_for_merged_model(parts, listing.path, "the adapter")
    training: dict[str, Any] = {}
    with parts.within("config"):
        training = read_trainer_state(directory)
    found = read_adapter(directory, "the adapter", parts)
    if found is None:
        return parts.reading(listing.path, files, None)
    adapter, weights = found
    if (text := size_contradiction(adapter)) is not None:
        parts.refuse("shapes", text)
    parts.is_sound("adapters", f"r {adapter.settings.r}, {adapter.weights_file.name}")
    parts.is_sound("keys", f"{adapter.pairs} modules with A and B, nothing else")
    parts.is_sound("shapes", "ranks as the config says")
    checkpoint = Checkpoint(
        path=listing.path,
        format=NAME,
        family=FAMILY,
        evidence=f"{FILE_NAME} and {adapter.weights_file.name} with {len(weights.infos)} LoRA keys",
        weights=weights,
        details=adapter,
        base_name=adapter.settings.base_name,
        step=training.get("global_step"),
        training=training,
        missing=adapter.missing,
        unknown=adapter.unknown,
        findings=tuple(settings_findings(adapter, FILE_NAME)),
    )
    return parts.reading(listing.path, files, checkpoint)


def _directory(listing: Listing) -> Path:
    return listing.path.parent if listing.path.name in WEIGHT_FILES else listing.path


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """The fields of a result: `adapters` with its one entry."""
    adapter: AdapterDetails = checkpoint.details
    entry = {"name": adapter.directory.name, **describe_adapter(adapter), "file": adapter.weights_file.name}
    return {
        "adapters": [entry],
        "model_dim": adapter.hidden_size,
        "base_model": checkpoint.base_name,
        "training": dict(checkpoint.training),
    }


FORMATS = (
    CheckpointFormat(
        name=NAME, family=FAMILY, matches=matches, describe=describe, read=read, resembles=resembles, adapters=True
    ),
)
