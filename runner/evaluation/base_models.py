"""Base models: where they lie, here or as a snapshot of the Hugging Face hub (never of code), one copy in memory; built
from a config's values and named tensors, every key accounted for: a Llama here, other architectures by transformers.
"""

import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from runner.checkpoints import model_directory
from runner.checkpoints.checkpoint import Checkpoint
from runner.errors import CheckpointError, ModelError
from runner.evaluation.llama import Llama
from runner.evaluation.llama_config import LlamaConfig, read_config
from runner.evaluation.placement import Placement, place, torch_device, torch_dtype
from runner.files.tensors import TensorSource, is_finite, non_finite

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    Config = LlamaConfig | PreTrainedConfig
    LanguageModel = Llama | PreTrainedModel

# For other architectures, what is no part of them, or would fetch and run code.
_DROPPED = (
    "model_type architectures auto_map custom_pipelines dtype torch_dtype transformers_version _name_or_path "
    "_attn_implementation attn_implementation _commit_hash _from_model_config"
).split()
# Buffers that older versions saved and that follow from the config.
_WAIVED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


def config_from(values: Mapping[str, Any], where: object) -> "Config":
    """The architecture of a config.json; what could change behaviour otherwise (auto_map, …) is dropped.

    Raises ModelError for an architecture that transformers does not know, quantised weights, or impossible values.
    """
    kind = values.get("model_type")
    if values.get("quantization_config"):
        raise ModelError(f"{where}: holds quantised weights, which cannot be measured exactly; give full precision")
    try:
        if kind == "llama":
            return read_config(values)
        from transformers import AutoConfig

        return AutoConfig.for_model(
            str(kind), **{name: value for name, value in values.items() if name not in _DROPPED}
        )
    except Exception as error:  # transformers raises many kinds for a bad value; the user needs the value
        lines = str(error).splitlines() or [type(error).__name__]
        raise ModelError(f"{where}: config.json (model_type {kind!r}) makes no model: {lines[0]}") from error


def names_to_load(config: "Config", shapes: Mapping[str, tuple[int, ...]], where: object) -> list[str]:
    """The names to load, once all names and shapes agree with the config. Raises ModelError with every difference.

    `lm_head.weight` may be absent where the config ties the embeddings; buffers that follow from the config are waived.
    """
    empty = _empty(config, where)
    expected = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}
    given = {name: tuple(shape) for name, shape in shapes.items() if not _WAIVED.fullmatch(name)}
    missing, unexpected = sorted(set(expected) - set(given) - set(_tied(empty))), sorted(set(given) - set(expected))
    if missing or unexpected:
        raise ModelError(f"{where}: does not fit its config.json: missing keys {missing}, unexpected keys {unexpected}")
    wrong = [
        f"{name} is {list(given[name])}, config.json makes it {list(expected[name])}"
        for name in sorted(given)
        if given[name] != expected[name]
    ]
    if wrong:
        raise ModelError(f"{where}: shapes contradict config.json: {'; '.join(wrong)}")
    return sorted(given)


def build(config: "Config", tensors: Mapping[str, torch.Tensor], dtype: torch.dtype, where: object) -> "LanguageModel":
    """The model with `tensors` (checked by `names_to_load`) cast to `dtype`, in evaluation mode, gradients off.

    Raises ModelError where the embeddings are tied but the head is there and differs, and for whole numbers.
    """
    tensors, empty = dict(tensors), _empty(config, where)
    for name, source in _tied(empty).items():
        if name in tensors and not torch.equal(tensors.pop(name), tensors[source]):
            raise ModelError(f"{where}: config.json ties {name} to {source}, but the two differ")
    floating = {name for name, tensor in empty.state_dict().items() if tensor.is_floating_point()}
    if whole := sorted(name for name, t in tensors.items() if name in floating and not t.is_floating_point()):
        kind = str(tensors[whole[0]].dtype)[6:]
        raise ModelError(f"{where}: {whole[0]} is {kind}; weights are floating-point, quantised ones are not read")
    if isinstance(empty, Llama):
        model: LanguageModel = empty.assign({name: tensor.to(dtype) for name, tensor in tensors.items()})
    else:
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        model = type(empty).from_pretrained(None, config=empty.config, state_dict=tensors, dtype=dtype)
    return model.eval().requires_grad_(False)


def _tied(empty: "LanguageModel") -> dict[str, str]:
    """The names that are tied, and the names that they are tied to."""
    if not empty.config.tie_word_embeddings:
        return {}
    if isinstance(empty, Llama):
        return {"lm_head.weight": "model.embed_tokens.weight"}
    return dict(empty.all_tied_weights_keys or {})


def _empty(config: "Config", where: object) -> "LanguageModel":
    """The model without memory for its weights."""
    if isinstance(config, LlamaConfig):
        return Llama(config)
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        try:
            return cast("PreTrainedModel", AutoModelForCausalLM.from_config(config, trust_remote_code=False))
        except ValueError as error:
            raise ModelError(f"{where}: a {config.model_type} is no causal language model") from error


PATTERNS = ("*.json", "*.safetensors", "tokenizer.model")
TOKENIZER_PATTERNS = ("tokenizer*", "special_tokens_map.json", "vocab.json", "merges.txt", "config.json")


def is_hub_name(name: str) -> bool:
    """Whether `name` could be a repository of the hub: `name` or `owner/name`."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") <= 1 and not name.startswith((".", "/", "~"))


def snapshot(key: str, name: str, *, download: bool, patterns: tuple[str, ...] = PATTERNS) -> Path:
    """The local directory of a hub repository; `key` is the option that named it.

    Raises CheckpointError in one line that names HF_TOKEN where it is absent, gated or out of reach.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns), local_files_only=not download))
    except Exception as error:  # network, authorisation and cache errors of several libraries: one answer
        raise CheckpointError(
            f"{key}={name}: neither a directory here nor available from the hub ({type(error).__name__}); check the "
            "name, give a local directory, or set HF_TOKEN where the model is gated or private"
        ) from error


BASES_CACHED = 2
ANYWHERE = Placement()


@dataclass(frozen=True, kw_only=True)
class Base:
    """A model in memory that others run on or are compared with. `key` changes with its files, dtype and device.

    `files`: all that determines it, config and weights.
    """

    model: "LanguageModel"
    path: Path
    key: tuple[object, ...]
    files: tuple[Path, ...]

    def is_current(self) -> bool:
        """Whether the files are those that it was made from, unchanged since."""
        return fingerprint(self.path, self.files) == self.key[0]


_bases: OrderedDict[tuple[object, ...], Base] = OrderedDict()


def load_base(
    checkpoint: Checkpoint | None, base: str | Path | None, placement: Placement = ANYWHERE, *, llama: bool = False
) -> Base:
    """The base model that `base` or else the checkpoint names, loaded once per process.

    `llama`: refuse another architecture. Raises CheckpointError where the model is missing or not finite, ModelError
    where its keys do not fit its config, ConfigError for a placement that is not possible.
    """
    path = find_base(checkpoint, base)
    values = model_directory.read_config(path)
    if llama and values.get("model_type") != "llama":
        kind = values.get("model_type")
        raise ModelError(f"{path}: model_type is {kind!r}; NPT layers stand on a Llama base (model_type 'llama')")
    weights = model_directory.open_model_weights(path)
    target, where = torch_dtype(placement.dtype, weights), torch_device(placement.device)
    files = (path / model_directory.CONFIG, *weights.files)
    key = (fingerprint(path, files), target, where, repr(placement.device_map))
    if key not in _bases:
        model = build_plain(values, weights, weights.infos, placement)
        _bases[key] = Base(model=model, path=path, key=key, files=files)
        while len(_bases) > BASES_CACHED:
            _bases.popitem(last=False)
    _bases.move_to_end(key)
    return _bases[key]


def build_plain(
    values: Mapping[str, object], weights: TensorSource, names: Iterable[str], placement: Placement
) -> "LanguageModel":
    """The model that config.json's `values` describe, from the tensors `names` of `weights`, all accounted for."""
    config = config_from(values, weights.path)
    chosen = names_to_load(config, {name: weights.infos[name].shape for name in names}, weights.path)
    bad = non_finite(weights, chosen)
    if bad:
        raise CheckpointError(f"{weights.path}: NaN or Inf in {', '.join(bad[:5])}{' …' if len(bad) > 5 else ''}")
    dtype, device = torch_dtype(placement.dtype, weights), torch_device(placement.device)
    model = build(config, {name: weights.read(name) for name in chosen}, dtype, weights.path)
    place(model, device, placement.device_map)
    return model


def require_finite(checkpoint: Checkpoint, parameters: Iterable[torch.Tensor], dtype: torch.dtype) -> None:
    """Raise CheckpointError, with the names in the file, where a parameter made from it holds NaN or Inf."""
    if all(map(is_finite, parameters)):
        return
    bad = non_finite(checkpoint.weights)
    what = f"NaN or Inf in {', '.join(bad[:5])}{' …' if len(bad) > 5 else ''}" if bad else f"a value overflows {dtype}"
    raise CheckpointError(f"{checkpoint.path}: {what}")


def fingerprint(path: Path, files: Iterable[Path]) -> tuple[object, ...]:
    """Changes with any of `files`, even where a modification time was set back: their ctime cannot be."""
    stats = [(file.name, file.stat()) for file in files]
    marks = tuple((name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for name, s in stats)
    return (str(path.resolve()), marks)


def find_base(checkpoint: Checkpoint | None, base: str | Path | None, key: str = "base") -> Path:
    """The directory of the base model; `key`: the option that named it.

    `base` may be a directory or a hub name, which may be downloaded. A name found in the checkpoint is looked for
    beside the checkpoint, then from the current directory, then in the local hub cache: never downloaded.
    """
    if base is not None:
        path = Path(base).expanduser()
        if path.is_dir():
            return path
        if path.exists() or not is_hub_name(str(base)):
            raise CheckpointError(
                f"{key}={base}: no such directory; a base model is a directory with config.json in it"
            )
        return snapshot(key, str(base), download=True)
    if checkpoint is None or not checkpoint.base_name:
        where = f"{checkpoint.path}: names no base model" if checkpoint else "no base model is named"
        raise CheckpointError(f"{where}; give one as base=DIRECTORY or base=HUB_NAME")
    if found := checkpoint.local_base():
        return found
    name = checkpoint.base_name
    try:
        if is_hub_name(name):
            return snapshot("base", name, download=False)
    except CheckpointError:
        pass
    raise CheckpointError(
        f"{checkpoint.path}: its base model {name!r} lies neither beside it nor in the current directory "
        "nor in the local hub cache; give it as base=DIRECTORY, or as base=HUB_NAME to download it"
    )
