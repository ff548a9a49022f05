"""The parts of a Hugging Face model directory and of a plain adapter (spec/formats.md §5), from headers and configs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runner.checks.check import Outcome, failed, passed
from runner.checks.context import Bench
from runner.checks.detected import MERGED_MODEL, MODEL_WEIGHTS
from runner.checks.headers import TensorHeader
from runner.errors import CheckpointError
from runner.families.lora.checks import Adapter, hidden_sizes, key_problems, modules, open_parts, shape_problems
from runner.files.shards import check_keys, read_index
from runner.files.strict_json import read_object

_LIMIT = 16 << 20
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_OPTIONAL = ("num_key_value_heads", "head_dim")
# No model has more; a wild number is no reason to list billions of names.
_MOST_LAYERS = 10_000
_TIED = "lm_head.weight"
_INDICES = tuple(f"{name}.index.json" for name in MODEL_WEIGHTS)


def is_adapter(bench: Bench) -> bool:
    """Whether the checkpoint is a plain adapter and no model."""
    return bench.look.format == "peft"


def config(bench: Bench) -> Outcome:
    """config.json describes a model, with sizes that can be; a plain adapter's config is for `adapters`."""
    if is_adapter(bench):
        return passed("an adapter has none")
    values = model_config(bench.look.path)
    kind = values.get("model_type")
    if not isinstance(kind, str):
        return failed(f"config.json: model_type is {kind!r}", "it must say what architecture the weights are of")
    needed = _SIZES if kind == "llama" else ()
    bad = bad_sizes(values, needed)
    if bad:
        return failed(f"config.json: {', '.join(bad)}", "restore the config.json that was saved with these weights")
    return passed(f"config.json of a {kind}, {values.get('num_hidden_layers')} layers")


def bad_sizes(values: Mapping[str, Any], needed: Sequence[str] = _SIZES) -> list[str]:
    """What config.json's sizes lack of those `needed`, and those that cannot be."""
    given = [*needed, *(name for name in (*_SIZES, *_OPTIONAL) if values.get(name) is not None and name not in needed)]
    return [f"{name} is {values.get(name)!r}" for name in given if not _is_size(name, values.get(name))]


def _is_size(name: str, value: Any) -> bool:
    return type(value) is int and 1 <= value <= (_MOST_LAYERS if name == "num_hidden_layers" else 1 << 40)


def model_config(root: Path) -> dict[str, Any]:
    """config.json. Raises CheckpointError."""
    path = root / "config.json"
    if not path.is_file():
        raise CheckpointError("has no config.json")
    return read_object(path, "config.json", _LIMIT)


def model_header(bench: Bench) -> dict[str, TensorHeader]:
    """The tensors of the model, from one file or from shards that agree with their index. Raises CheckpointError."""
    root = bench.look.path
    if root.is_file():
        return dict(bench.header(root).tensors)
    indices = [root / f"{name}.index.json" for name in MODEL_WEIGHTS if (root / f"{name}.index.json").is_file()]
    single = [root / name for name in MODEL_WEIGHTS if (root / name).is_file()]
    found = [*indices, *single]
    if not found:
        shards = sorted(path.name for path in root.iterdir() if MERGED_MODEL.fullmatch(path.name))
        lacking = f"shards without their index: {shards[0]}, … ({len(shards)} in all)" if shards else "no weights"
        raise CheckpointError(f"holds {lacking}; needed is {' or '.join((*MODEL_WEIGHTS, *_INDICES))}")
    if len(found) > 1:
        raise CheckpointError(f"holds {' and '.join(path.name for path in found)}; keep the one that is meant")
    if single:
        return dict(bench.header(single[0]).tensors)
    listed = read_index(indices[0])
    headers = {name: bench.header(root / name).tensors for name in dict.fromkeys(listed.values())}
    check_keys(indices[0], listed, headers)
    return {name: tensor for tensors in headers.values() for name, tensor in tensors.items()}


def keys(bench: Bench) -> Outcome:
    """Every tensor of the architecture, or of the adapter's config, is there once, and nothing else."""
    if is_adapter(bench):
        adapter = _adapter(bench)
        if problems := key_problems([adapter]):
            return failed("; ".join(problems), "PEFT would load the rest without an error: save the adapter again")
        return passed(f"{len(modules(adapter))} modules with A and B, nothing else")
    tensors = model_header(bench)
    if problems := model_key_problems(bench, set()):
        return failed("; ".join(problems[:6]) + (f"; … ({len(problems)} in all)" if len(problems) > 6 else ""))
    return passed(f"{len(tensors)} keys")


def model_key_problems(bench: Bench, own: set[str]) -> list[str]:
    """What is missing or too much against config.json; `own`: names beside those of the plain model. Llama only."""
    values = model_config(bench.look.path)
    if values.get("model_type") != "llama":
        return []
    found = set(model_header(bench)) - own
    wanted = set(llama_shapes(values))
    if values.get("tie_word_embeddings"):
        wanted -= {_TIED}
        found -= {_TIED}
    rotary = {name for name in found if name.endswith("rotary_emb.inv_freq")}  # older files hold this buffer
    return [f"missing {name}" for name in sorted(wanted - found)] + [
        f"unexpected {name}" for name in sorted(found - wanted - rotary)
    ]


def llama_shapes(values: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor of the Llama that config.json's `values` describe."""
    d, f, vocabulary = values["hidden_size"], values["intermediate_size"], values["vocab_size"]
    heads = values["num_attention_heads"]
    size = values.get("head_dim") or d // heads
    narrow = (values.get("num_key_value_heads") or heads) * size
    linears = {
        "self_attn.q_proj": (heads * size, d), "self_attn.k_proj": (narrow, d), "self_attn.v_proj": (narrow, d),
        "self_attn.o_proj": (d, heads * size), "mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, d), "model.norm.weight": (d,)}
    for layer in range(values["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}{name}.weight": (d,) for name in ("input_layernorm", "post_attention_layernorm")}
        for name, shape in linears.items():
            shapes[f"{prefix}{name}.weight"] = shape
            if values.get("attention_bias" if name.startswith("self_attn") else "mlp_bias"):
                shapes[f"{prefix}{name}.bias"] = shape[:1]
    return shapes | {_TIED: (vocabulary, d)}


def shapes(bench: Bench) -> Outcome:
    """Shapes are those that config.json, or the adapter's rank, gives."""
    if is_adapter(bench):
        adapter = _adapter(bench)
        problems = shape_problems(adapter)
        if len(sizes := hidden_sizes(adapter)) > 1:
            problems.append(f"modules contradict each other on the hidden size: {sizes}")
        return failed("; ".join(problems[:4])) if problems else passed("ranks as the config says")
    return model_shapes(bench)


def model_shapes(bench: Bench) -> Outcome:
    """The plain model's tensors have the shapes of config.json; for Llamas only."""
    values, tensors = model_config(bench.look.path), model_header(bench)
    if values.get("model_type") != "llama":
        return passed(f"{len(tensors)} tensors; a {values.get('model_type')}'s shapes are checked when it is loaded")
    problems = [
        f"{name} is {list(tensors[name].shape)}, by config.json {list(shape)}"
        for name, shape in llama_shapes(values).items()
        if name in tensors and tensors[name].shape != shape
    ]
    problems += [
        f"{name} is {tensor.dtype}, no weights"
        for name, tensor in tensors.items()
        if tensor.shape and not tensor.is_floating
    ]
    if problems:
        return failed("; ".join(problems[:4]), "config.json is that of another model")
    return passed(f"{len(tensors)} tensors as config.json says")


def adapters(bench: Bench) -> Outcome:
    """The adapter has a config that can be read and one file of weights."""
    if not is_adapter(bench):
        return passed("no adapter: a model by itself")
    return passed(f"r {_adapter(bench).settings.r}, {_adapter(bench).header.file.name}")


def pollution(bench: Bench) -> Outcome:
    """No merged model lies beside an adapter."""
    root = bench.look.path
    stray = sorted(p for p in root.iterdir() if MERGED_MODEL.fullmatch(p.name)) if root.is_dir() else []
    if is_adapter(bench) and stray:
        return failed(f"a merged model lies beside the adapter: {', '.join(p.name for p in stray)}", "delete it")
    return passed("no merged model beside an adapter")


def _adapter(bench: Bench) -> Adapter:
    return open_parts(bench.look.directory, "the adapter", bench.header)
