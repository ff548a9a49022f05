"""Base models: where they lie, and one copy of each in memory.

The Hugging Face hub: names, and snapshots of weights and tokenizers (never of code).
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from runner.checkpoints.checkpoint import Checkpoint
from runner.errors import CheckpointError, ConfigError, ModelError
from runner.evaluation.placement import DeviceMap, place
from runner.families.hf import checkpoint as hf
from runner.families.hf import model as causal_lm
from runner.files.tensors import TensorSource, non_finite

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


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BASES_KEPT = 2


@dataclass(frozen=True, kw_only=True)
class Base:
    """A model in memory that others run on or are compared with. `key` changes with its files, dtype and device.

    `files`: all that determines it, config and weights.
    """

    model: PreTrainedModel
    path: Path
    key: tuple[Any, ...]
    files: tuple[Path, ...]

    def is_current(self) -> bool:
        """Whether the files are those that it was made from, unchanged since."""
        return fingerprint(self.path, self.files) == self.key[0]


_bases: OrderedDict[tuple[Any, ...], Base] = OrderedDict()


def load_base(
    checkpoint: Checkpoint | None,
    base: str | Path | None,
    *,
    device: str = "auto",
    dtype: str = "float32",
    device_map: DeviceMap | None = None,
    llama: bool = False,
) -> Base:
    """The base model that `base` or else the checkpoint names, loaded once per process.

    `llama`: refuse another architecture; `device_map`: spread it over devices (runner/evaluation/placement.py).
    Raises CheckpointError where the model is missing or not finite, ModelError
    where its keys do not fit its config.
    """
    path = find_base(checkpoint, base)
    values = hf.read_config(path)
    if llama and values.get("model_type") != "llama":
        kind = values.get("model_type")
        raise ModelError(f"{path}: model_type is {kind!r}; NPT layers stand on a Llama base (model_type 'llama')")
    weights = hf.open_model_weights(path)
    target, where = torch_dtype(dtype, weights), torch_device(device)
    files = (path / hf.CONFIG, *weights.files)
    key = (fingerprint(path, files), target, where, repr(device_map))
    if key not in _bases:
        model = build_plain(values, weights, weights.infos, target, where, device_map)
        _bases[key] = Base(model=model, path=path, key=key, files=files)
        while len(_bases) > BASES_KEPT:
            _bases.popitem(last=False)
    _bases.move_to_end(key)
    return _bases[key]


def build_plain(
    values: Mapping[str, Any],
    weights: TensorSource,
    names: Iterable[str],
    dtype: torch.dtype,
    device: torch.device,
    device_map: DeviceMap | None = None,
) -> PreTrainedModel:
    """The model that config.json's `values` describe, from the tensors `names` of `weights`, all accounted for."""
    config = causal_lm.config_from(values, weights.path)
    chosen = causal_lm.names_to_load(config, {name: weights.infos[name].shape for name in names}, weights.path)
    bad = non_finite(weights, chosen)
    if bad:
        raise CheckpointError(f"{weights.path}: NaN or Inf in {', '.join(bad[:5])}{' …' if len(bad) > 5 else ''}")
    model = causal_lm.build(config, {name: weights.read(name) for name in chosen}, dtype, weights.path)
    place(model, device, device_map)
    return model


def fingerprint(path: Path, files: Iterable[Path]) -> tuple[Any, ...]:
    """Changes with any of `files`, even where a modification time was set back: their ctime cannot be."""
    stats = [(file.name, file.stat()) for file in files]
    marks = tuple((name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for name, s in stats)
    return (str(path.resolve()), marks)


def torch_device(name: str) -> torch.device:
    """`auto` is cuda, then mps, then cpu. Raises ConfigError for a device that is not there."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if there[kind]))
    kind = name.partition(":")[0]
    if not there.get(kind, False):
        raise ConfigError(
            f"device={name} is not available here; there is {', '.join(k for k, v in there.items() if v)}"
        )
    return torch.device(name)


def torch_dtype(name: str, weights: TensorSource, embedding: str = "model.embed_tokens.weight") -> torch.dtype:
    """The compute dtype that `name` asks for; "stored" is that of the tensor `embedding`."""
    if name == "stored":
        info = weights.infos.get(embedding)
        if info is None or not info.dtype.is_floating_point:
            raise ModelError(f"{weights.path}: has no floating-point {embedding} to take dtype=stored from")
        return info.dtype
    if name not in DTYPES:
        raise ConfigError(f"dtype={name} is unknown; choose float32, bfloat16, float16 or stored")
    return DTYPES[name]


def find_base(checkpoint: Checkpoint | None, base: str | Path | None) -> Path:
    """The directory of the base model.

    `base` may be a directory or a hub name, which may be downloaded. A name found in the checkpoint is looked for
    beside the checkpoint, then from the current directory, then in the local hub cache: never downloaded.
    """
    if base is not None:
        path = Path(base).expanduser()
        if path.is_dir():
            return path
        if path.exists() or not is_hub_name(str(base)):
            raise CheckpointError(f"base={base}: no such directory; a base model is a directory with config.json in it")
        return snapshot("base", str(base), download=True)
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
