"""`hf`: a plain Hugging Face causal LM directory: config.json and weights, single or sharded."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.checkpoints.checkpoint import Checkpoint, CheckpointFormat, Listing
from runner.checkpoints.model_directory import (
    MERGED_MODEL,
    SHARDED,
    SINGLE,
    architecture,
    is_model_directory,
    open_model_weights,
    read_config,
)
from runner.checkpoints.reading import Parts, Reading, some
from runner.errors import CheckpointError
from runner.files.safetensors_header import read_index
from runner.files.tensors import TensorInfo, TensorSource, open_sharded

NAME = "hf"
FAMILY = "hf"
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_OPTIONAL = ("num_key_value_heads", "head_dim")
# No model has more; a wild number is no reason to list billions of names.
_MOST_LAYERS = 10_000
_TIED = "lm_head.weight"
_OTHER_SHAPES = "config.json is that of another model, or these tensors were changed"


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


def resembles(listing: Listing) -> int:
    """1 where files lie there in which transformers saves a model."""
    return 1 if model_files(listing.path) else 0


def remains(listing: Listing) -> int:
    """1 where a config.json with a model type lies there, whose weights are lost."""
    with contextlib.suppress(CheckpointError):
        return 1 if isinstance(read_config(listing.path).get("model_type"), str) else 0
    return 0


def model_files(root: Path) -> list[Path]:
    """The weights files of a model, as transformers names them, in one directory."""
    entries = sorted(root.iterdir()) if root.is_dir() else []
    return [path for path in entries if MERGED_MODEL.fullmatch(path.name) and path.suffix != ".json"]


@dataclass(frozen=True, kw_only=True)
class HfModel:
    """What can be read of a model directory: `config` {} and `weights` None where they cannot."""

    config: Mapping[str, Any]
    weights: TensorSource | None
    files: tuple[Path, ...]


def read_model(listing: Listing, parts: Parts) -> HfModel:
    """Config and weights of a model directory, with the problems of `files`, `config`, and of which file is meant."""
    root = listing.path
    config: dict[str, Any] = {}
    with parts.within("config"):
        config = read_config(root)
        _check_sizes(config, parts)
    files = model_files(root)
    indices = [root / name for name in SHARDED if (root / name).is_file()]
    single = [root / name for name in SINGLE if (root / name).is_file()]
    weights = None
    if len(found := [*indices, *single]) > 1:
        names = " and ".join(path.name for path in found)
        parts.refuse("keys", f"{root}: holds {names}; keep the one that is meant")
    elif not found:
        shards = f"shards without their index: {files[0].name}, … ({len(files)} in all)" if files else "no weights"
        parts.refuse("keys", f"{root}: holds {shards}; needed is one of {', '.join((*SINGLE, *SHARDED))}")
    if indices and len(found) == 1:
        with parts.within("keys"):
            read_index(indices[0])
            with parts.within("files"):
                weights = open_sharded(indices[0])
                parts.sources.append(weights)
    else:
        opened = [parts.weights(listing, file.name) for file in files]
        weights = opened[0] if len(found) == len(files) == 1 else None
    return HfModel(config=config, weights=weights, files=tuple(files))


def _check_sizes(config: Mapping[str, Any], parts: Parts) -> None:
    """The config names an architecture; its sizes can be, and a Llama's are all there."""
    kind = config.get("model_type")
    if not isinstance(kind, str):
        parts.fail("config", f"config.json: model_type is {kind!r}; it must say what architecture the weights are of")
    elif bad := bad_sizes(config, _SIZES if kind == "llama" else ()):
        parts.fail("config", f"config.json: {', '.join(bad)}")
    parts.is_sound("config", f"config.json of a {kind}, {config.get('num_hidden_layers')} layers")


def bad_sizes(values: Mapping[str, Any], needed: Sequence[str] = _SIZES) -> list[str]:
    """What config.json's sizes lack of those `needed`, and those that cannot be."""
    return [
        f"{name} is {value!r}"
        for name in (*_SIZES, *_OPTIONAL)
        if ((value := values.get(name)) is not None or name in needed)
        and not (type(value) is int and 1 <= value <= (_MOST_LAYERS if name == "num_hidden_layers" else 1 << 40))
    ]


def compare_with_config(
    parts: Parts, config: Mapping[str, Any], infos: Mapping[str, TensorInfo], own: frozenset[str] = frozenset()
) -> None:
    """Names and shapes are those of the Llama that the config describes; `own`: names that a plain Llama has not.

    Of other architectures only what builds them knows the shapes.
    """
    parts.is_sound("keys", f"{len(infos)} keys")
    if config.get("model_type") != "llama" or bad_sizes(config):
        kind = config.get("model_type")
        parts.is_sound("shapes", f"{len(infos)} tensors; a {kind}'s shapes are checked when it is loaded")
        return
    shapes = llama_shapes(config)
    tied = {_TIED} if config.get("tie_word_embeddings") else set()
    buffers = {name for name in infos if name.endswith("rotary_emb.inv_freq")}  # older files hold this one
    missing = sorted(set(shapes) - tied - set(infos))
    unexpected = sorted(set(infos) - own - set(shapes) - buffers)
    if missing or unexpected:
        parts.fail(
            "keys", some([f"missing {name}" for name in missing] + [f"unexpected {name}" for name in unexpected])
        )
    wrong = [
        f"{name} is {list(infos[name].shape)}, by config.json {list(shape)}"
        for name, shape in shapes.items()
        if name in infos and infos[name].shape != shape
    ]
    advice = _OTHER_SHAPES if wrong else "save the weights as floating-point numbers"
    wrong += [
        f"{info.name} is {info.dtype_name}, no weights"
        for info in infos.values()
        if info.shape and not info.is_floating
    ]
    if wrong:
        parts.fail("shapes", some(wrong, 4), advice)
    sizes = f"hidden size {config['hidden_size']}, vocabulary {config['vocab_size']}"
    parts.is_sound("shapes", f"{len(shapes.keys() & infos.keys())} tensors as config.json says: {sizes}")


def llama_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor of the Llama that config.json's values describe."""
    d, f, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or d // heads
    narrow = (config.get("num_key_value_heads") or heads) * size
    linears = {
        "self_attn.q_proj": (heads * size, d), "self_attn.k_proj": (narrow, d), "self_attn.v_proj": (narrow, d),
        "self_attn.o_proj": (d, heads * size), "mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, d), "model.norm.weight": (d,)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}{name}.weight": (d,) for name in ("input_layernorm", "post_attention_layernorm")}
        for name, shape in linears.items():
            shapes[f"{prefix}{name}.weight"] = shape
            if config.get("attention_bias" if name.startswith("self_attn") else "mlp_bias"):
                shapes[f"{prefix}{name}.bias"] = shape[:1]
    return shapes | {_TIED: (vocabulary, d)}


def read(listing: Listing) -> Reading:
    """The checkpoint, part by part: files, config, keys, shapes."""
    parts = Parts()
    model = read_model(listing, parts)
    parts.is_sound("pollution", "a complete model")
    parts.is_sound("adapters", "a model by itself")
    if model.weights is None:
        return parts.reading(listing.path, model.files, None)
    compare_with_config(parts, model.config, model.weights.infos)
    checkpoint = Checkpoint(
        path=listing.path,
        format=NAME,
        family=FAMILY,
        evidence=f"config.json of a {model.config.get('model_type')} with {len(model.weights.infos)} tensors",
        weights=model.weights,
        details=HfDetails(config=model.config),
    )
    return parts.reading(listing.path, model.files, checkpoint)


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """The architecture, as config.json gives it."""
    return {"architecture": architecture(checkpoint.details.config)}


FORMATS = (
    CheckpointFormat(
        name=NAME, family=FAMILY, matches=matches, describe=describe, read=read, resembles=resembles, remains=remains
    ),
)
