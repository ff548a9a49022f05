"""`npt_full`: a complete NPT model in a Hugging Face directory.

Base and adapters both stand in the checkpoint; transformers alone would silently return the plain Llama.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.checkpoints.checkpoint import Checkpoint, CheckpointFormat, Listing, NptLayer
from runner.checkpoints.model_directory import architecture, is_model_directory, open_model_weights
from runner.checkpoints.reading import Parts, Reading, load_mapping, some
from runner.families.hf import checkpoint as hf
from runner.families.npt.checkpoint import NOT_WHOLE, check_sizes, sized_layer
from runner.files.tensors import Inert, TensorInfo

NAME = "npt_full"
FAMILY = "npt"
TRAINING_INFO = "training_info.pt"
DEFAULT_SCALE = 0.1
# `both` is an older name for the outer product, with the same keys.
MODULATION_TYPES = ("outer_product", "both", None)

_KEY = re.compile(
    r"model\.layers\.(?P<layer>\d+)\.(?:adapter\.(?P<matrix>A_proj|B_model|B_ffn)\.weight|original_gate_weight)"
)
# An adapter's Linear weights, which are those of the other layout transposed.
_MATRICES = {"W_down": "A_proj", "W_a_up": "B_model", "W_b_up": "B_ffn"}


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
    match = _KEY.fullmatch(name)
    return match is not None and match["matrix"] is not None


def matches(listing: Listing) -> str | None:
    """Evidence: adapter keys in the model's weights."""
    if not is_model_directory(listing):
        return None
    count = sum(map(is_key, open_model_weights(listing.path).infos))
    return f"{count} adapter keys among the weights" if count else None


def resembles(listing: Listing) -> int:
    """2 where it is a model with what its training left, or with adapter keys in a file that can be read."""
    files = hf.model_files(listing.path)
    keys = (is_key(key) for file in files for key in listing.names(file.name))
    return 2 if files and (TRAINING_INFO in listing.entries or any(keys)) else 0


def remains(listing: Listing) -> int:
    """2 where what its training left lies there, and the weights are lost."""
    return 2 if TRAINING_INFO in listing.entries else 0


def read(listing: Listing) -> Reading:
    """The checkpoint, part by part: files, config, keys, shapes; what the training says against them is `loading`."""
    parts, where = Parts(), listing.path
    model = hf.read_model(listing, parts)
    info: dict[str, Any] = {}
    if TRAINING_INFO in listing.entries:
        with parts.within("files"):
            info = load_mapping(listing.file(TRAINING_INFO))
    else:
        parts.odd("config", f"no {TRAINING_INFO}: modulation_scale is taken as the default, {DEFAULT_SCALE}")
    kind = model.config.get("model_type")
    if not parts.has("config") and kind != "llama":
        parts.fail("config", f"config.json: model_type is {kind!r}; NPT layers stand on a 'llama'")
    parts.is_sound("pollution", "a complete model")
    if model.weights is None:
        return parts.reading(where, model.files, None)
    infos = model.weights.infos
    layers = _layers(infos, where, parts)
    own = frozenset(filter(_KEY.fullmatch, infos))
    hf.compare_with_config(parts, model.config, infos, own)
    if layers:
        shown = ", ".join(str(layer.layer) for layer in layers)
        parts.is_sound("keys", f"{len(infos)} keys; NPT layers {shown}")
        check_sizes(layers, parts)
    _check_recorded_gates(infos, parts)
    arguments, adapter = _plain(info.get("args")), _plain(info.get("adapter_config"))
    scale = _scale(where, arguments, adapter, parts)
    ranks = {layer.np_rank for layer in layers}
    rank = adapter.get("r")
    if rank is not None and ranks and (type(rank) is not int or ranks != {rank}):
        text = f"{where}: {TRAINING_INFO} says rank {rank!r:.80}, the keys say {sorted(ranks)}"
        parts.refuse("loading", text)
    step = info.get("step")
    checkpoint = Checkpoint(
        path=where,
        format=NAME,
        family=FAMILY,
        evidence=f"{sum(map(is_key, infos))} adapter keys among the weights",
        weights=model.weights,
        layers=layers,
        details=NptFullDetails(config=model.config, scale=scale, adapter_keys=own, arguments=arguments),
        base_name=name if isinstance(name := arguments.get("model_name"), str) else None,
        step=step if isinstance(step, int) else None,
        training={"arguments": arguments, "adapter_config": adapter},
        findings=() if info else (f"no {TRAINING_INFO}: modulation_scale is taken as {DEFAULT_SCALE}",),
    )
    return parts.reading(where, model.files, checkpoint)


def _scale(where: Path, arguments: Mapping[str, Any], adapter: Mapping[str, Any], parts: Parts) -> float:
    kind = arguments.get("modulation_type", adapter.get("modulation_type"))
    if kind not in MODULATION_TYPES:
        parts.refuse("loading", f"{where}: modulation_type {kind!r} is not known; only 'outer_product' is")
    scale = arguments.get("modulation_scale", adapter.get("modulation_scale", DEFAULT_SCALE))
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        parts.refuse("loading", f"{where}: modulation_scale is {scale!r}, not a number")
        return DEFAULT_SCALE
    return float(scale)


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Training arguments, modulation scale, and whether the gates differ in dtype or shape from what was recorded."""
    details: NptFullDetails = checkpoint.details
    return {
        "modulation_scale": details.scale,
        "training": dict(checkpoint.training),
        "architecture": architecture(details.config),
    }


def _layers(infos: Mapping[str, TensorInfo], where: Path, parts: Parts) -> tuple[NptLayer, ...]:
    """The sound layers: A_proj [r, d], B_model [d, r], B_ffn [f, r]."""
    found: dict[int, set[str]] = {}
    for match in filter(None, map(_KEY.fullmatch, infos)):
        if match["matrix"]:
            found.setdefault(int(match["layer"]), set()).add(match["matrix"])
    if not found:
        text = "it is a plain Hugging Face model without adapter keys (format=hf)"
        parts.refuse("keys", f"{where}: No NPT layers found: {text}")
    keys = {
        index: {matrix: (f"model.layers.{index}.adapter.{name}.weight",) for matrix, name in _MATRICES.items()}
        for index in sorted(found)
    }
    missing = [name for matrices in keys.values() for (name,) in matrices.values() if name not in infos]
    if missing:
        parts.refuse("keys", f"{where}: {some([f'missing {name}' for name in missing])}", NOT_WHOLE)
        return ()
    layers = []
    for index, matrices in keys.items():
        shapes = {name: infos[name].shape for (name,) in matrices.values()}
        layers.append(sized_layer(index, "single", {"gate": matrices}, shapes, where, parts, transposed=True))
    return tuple(layer for layer in layers if layer is not None)


def _check_recorded_gates(infos: Mapping[str, TensorInfo], parts: Parts) -> None:
    """Gates before permanent updates have the gate's shape; those of quantised models have none."""
    for name in infos:
        gate = name.replace("original_gate_weight", "mlp.gate_proj.weight")
        if gate != name and gate in infos and infos[name].shape not in ((), infos[gate].shape):
            text = f"{name} is {list(infos[name].shape)}, the gate {list(infos[gate].shape)}"
            parts.fail("shapes", text, "they are gate weights as they were: save the checkpoint again")


def _plain(value: Any) -> dict[str, Any]:
    """A pickled Namespace or dict as a dict; {} for anything else."""
    state = value.state if isinstance(value, Inert) else value
    return {str(key): item for key, item in state.items()} if isinstance(state, Mapping) else {}


FORMATS = (
    CheckpointFormat(
        name=NAME, family=FAMILY, matches=matches, describe=describe, read=read, resembles=resembles, remains=remains
    ),
)
