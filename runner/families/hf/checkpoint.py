"""`hf`: a plain Hugging Face causal LM directory: config.json and weights, single or sharded."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runner.checkpoints.checkpoint import Checkpoint, CheckpointFormat, Listing
from runner.checkpoints.model_directory import architecture, is_model_directory, open_model_weights, read_config

NAME = "hf"
FAMILY = "hf"


@dataclass(frozen=True, kw_only=True)
class HfDetails:
    """`config`: config.json as it was read."""

    config: Mapping[str, Any]


def matches(listing: Listing) -> str | None:
    """Evidence: config.json with a model type, and weights without NPT adapters."""
    if not is_model_directory(listing):
        return None
    weights = open_model_weights(listing.path)
    if any(".adapter.A_proj." in name for name in weights.infos):
        return None
    return f"config.json of a {read_config(listing.path)['model_type']} with {len(weights.infos)} tensors"


def open_hf(listing: Listing) -> Checkpoint:
    """The checkpoint. Raises CheckpointError where config or weights are missing."""
    config = read_config(listing.path)
    return Checkpoint(
        path=listing.path,
        format=NAME,
        family=FAMILY,
        evidence=matches(listing) or "config.json",
        weights=open_model_weights(listing.path),
        details=HfDetails(config=config),
    )


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """The architecture, as config.json gives it."""
    return {"architecture": architecture(checkpoint.details.config)}


FORMATS = (CheckpointFormat(name=NAME, family=FAMILY, matches=matches, open=open_hf, describe=describe),)
