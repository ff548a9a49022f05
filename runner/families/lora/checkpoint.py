"""`peft`: one plain LoRA adapter over a base model (spec/formats.md §5)."""

from pathlib import Path
from typing import Any

from runner.checkpoints.checkpoint import Checkpoint, CheckpointFormat, Listing
from runner.families.lora.adapter import WEIGHT_FILES, AdapterDetails, describe_adapter, open_adapter, settings_findings
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


def open_peft(listing: Listing) -> Checkpoint:
    """The checkpoint, from headers. Raises CheckpointError as `open_adapter`."""
    adapter, weights = open_adapter(_directory(listing))
    training = read_trainer_state(adapter.directory)
    return Checkpoint(
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


FORMATS = (CheckpointFormat(name=NAME, family=FAMILY, matches=matches, open=open_peft, describe=describe),)
