"""`npt_full`: a complete NPT model in a Hugging Face directory (spec/formats.md §2).

Base and adapters both stand in the checkpoint; transformers alone would silently return the plain Llama.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.checkpoints.checkpoint import Checkpoint, CheckpointFormat, Listing, NptLayer
from runner.checkpoints.model_directory import architecture, is_model_directory, open_model_weights, read_config
from runner.errors import CheckpointError
from runner.files.tensors import Inert, TensorInfo, TensorSource, load_pickle

NAME = "npt_full"
FAMILY = "npt"
TRAINING_INFO = "training_info.pt"
DEFAULT_SCALE = 0.1
# `both` is an older name for the outer product, with the same keys.
MODULATION_TYPES = ("outer_product", "both", None)

_KEY = re.compile(
    r"model\.layers\.(?P<layer>\d+)\.(?:adapter\.(?P<matrix>A_proj|B_model|B_ffn)\.weight|(?P<original>original_gate_weight))"
)


@dataclass(frozen=True, kw_only=True)
class NptFullDetails:
    """`config`: config.json; `scale`: modulation_scale; `adapter_keys`: all names that a plain Llama does not have.

    `arguments`: the training arguments, as plain values.
    """

    config: Mapping[str, Any]
    scale: float
    adapter_keys: frozenset[str]
    arguments: Mapping[str, Any]


def is_key(name: str) -> bool:
    """Whether `name` is that of an adapter's tensor."""
    return "original_gate_weight" not in name and _KEY.fullmatch(name) is not None


def matches(listing: Listing) -> str | None:
    """Evidence: adapter keys in the model's weights."""
    if not is_model_directory(listing):
        return None
    count = sum(map(is_key, open_model_weights(listing.path).infos))
    return f"{count} adapter keys among the weights" if count else None


def open_npt_full(listing: Listing) -> Checkpoint:
    """The checkpoint. Raises CheckpointError for incomplete adapters or a modulation that is not known."""
    config = read_config(listing.path)
    weights = open_model_weights(listing.path)
    layers = _layers(weights, listing.path)
    if not layers:
        raise CheckpointError(
            f"{listing.path}: No NPT layers found: it is a plain Hugging Face model without adapter keys (format=hf)"
        )
    info = _training_info(listing)
    arguments, adapter = _plain(info.get("args")), _plain(info.get("adapter_config"))
    kind = arguments.get("modulation_type", adapter.get("modulation_type"))
    if kind not in MODULATION_TYPES:
        raise CheckpointError(f"{listing.path}: modulation_type {kind!r} is not known; only 'outer_product' is")
    scale = arguments.get("modulation_scale", adapter.get("modulation_scale", DEFAULT_SCALE))
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise CheckpointError(f"{listing.path}: modulation_scale is {scale!r}, not a number")
    ranks = {layer.np_rank for layer in layers}
    if "r" in adapter and ranks != {adapter["r"]}:
        raise CheckpointError(f"{listing.path}: {TRAINING_INFO} says rank {adapter['r']}, the keys say {sorted(ranks)}")
    step = info.get("step")
    return Checkpoint(
        path=listing.path,
        format=NAME,
        family=FAMILY,
        evidence=matches(listing) or "",
        weights=weights,
        layers=layers,
        details=NptFullDetails(
            config=config,
            scale=float(scale),
            adapter_keys=frozenset(name for name in weights.infos if _KEY.fullmatch(name)),
            arguments=arguments,
        ),
        base_name=arguments.get("model_name"),
        step=step if isinstance(step, int) else None,
        training={"arguments": arguments, "adapter_config": adapter},
        findings=() if info else (f"no {TRAINING_INFO}: modulation_scale is taken as {DEFAULT_SCALE}",),
    )


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Training arguments, modulation scale, and whether the gates differ in dtype or shape from what was recorded."""
    details: NptFullDetails = checkpoint.details
    return {
        "modulation_scale": details.scale,
        "training": dict(checkpoint.training),
        "architecture": architecture(details.config),
    }


def _layers(weights: TensorSource, where: Path) -> tuple[NptLayer, ...]:
    found: dict[int, dict[str, TensorInfo]] = {}
    for name, info in weights.infos.items():
        if match := _KEY.fullmatch(name):
            found.setdefault(int(match["layer"]), {})[match["matrix"] or "original"] = info
    missing = [
        f"model.layers.{index}.adapter.{matrix}.weight"
        for index, matrices in sorted(found.items())
        for matrix in ("A_proj", "B_model", "B_ffn")
        if matrix not in matrices and set(matrices) != {"original"}
    ]
    if missing:
        raise CheckpointError(f"{where}: missing keys {missing}, unexpected keys []")
    return tuple(_layer(index, found[index], where) for index in sorted(found) if "A_proj" in found[index])


def _layer(index: int, matrices: Mapping[str, TensorInfo], where: Path) -> NptLayer:
    """A_proj [r, d], B_model [d, r], B_ffn [f, r]."""
    shapes = {name: matrices[name].shape for name in ("A_proj", "B_model", "B_ffn")}
    if any(len(shape) != 2 for shape in shapes.values()):
        raise CheckpointError(f"{where}: layer {index}: adapter shapes {shapes} are not all two-dimensional")
    (rank, hidden), inner = shapes["A_proj"], shapes["B_ffn"][0]
    if shapes["B_model"] != (hidden, rank) or shapes["B_ffn"] != (inner, rank):
        shown = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise CheckpointError(f"{where}: layer {index}: adapter shapes contradict each other: {shown}")
    prefix = f"model.layers.{index}.adapter"
    keys = {"W_down": "A_proj", "W_a_up": "B_model", "W_b_up": "B_ffn"}
    return NptLayer(
        layer=index,
        modulation="single",
        np_rank=rank,
        num_ranks=1,
        hidden_size=hidden,
        intermediate_size=inner,
        parameters=sum(matrices[name].numel for name in shapes),
        keys={"gate": {matrix: (f"{prefix}.{name}.weight",) for matrix, name in keys.items()}},
    )


def _training_info(listing: Listing) -> dict[str, Any]:
    if TRAINING_INFO not in listing.entries:
        return {}
    info = load_pickle(listing.file(TRAINING_INFO), tensors="meta")
    if not isinstance(info, dict):
        raise CheckpointError(f"{listing.file(TRAINING_INFO)}: holds a {type(info).__name__}, not a dictionary")
    return info


def _plain(value: Any) -> dict[str, Any]:
    """A pickled Namespace or dict as a dict; {} for anything else."""
    state = value.state if isinstance(value, Inert) else value
    return {str(key): item for key, item in state.items()} if isinstance(state, Mapping) else {}


FORMATS = (CheckpointFormat(name=NAME, family=FAMILY, matches=matches, open=open_npt_full, describe=describe),)
