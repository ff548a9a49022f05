"""What a lora_moe checkpoint holds beside its adapters: config, router, skills, the Trainer's state, and what does not
belong there. In the older layout the first three lie in dylo_moe_state/."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.checkpoints.reading import Parts
from runner.errors import CheckpointError
from runner.files.file_type import Kind, kind_of
from runner.files.strict_json import read_object
from runner.files.tensors import TensorInfo, TensorSource, is_tensor, load_pickle, open_weights, read_pickle

if TYPE_CHECKING:
    import torch

ADAPTERS = "peft_adapters"
OLDER = "dylo_moe_state"
MODEL_TYPE = "dylora-moe"
CONFIG = "config.json"
# What an older router.pt says beside the router's weights.
ROUTER_VALUES = ("num_experts", "input_size", "top_k", "temperature")
ROUTERS = ("router.safetensors", "router.pt")
SKILLS = "skill_library.pt"
TRAINER_STATE = "trainer_state.json"
GATE = ("gate.weight", "gate.bias")
_JSON_LIMIT = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Router:
    """The router: `weight` and `bias` name gate.weight [num_experts, hidden_size] and gate.bias [num_experts] in the
    file; `values` are the numbers that an older router.pt holds beside them."""

    source: TensorSource
    file: Path
    weight: str
    bias: str
    num_experts: int
    hidden_size: int
    values: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Skills:
    """The skill library's header: `ids` of embeddings [size]."""

    file: Path
    ids: tuple[int | str, ...]
    size: int | None


def read_config(directory: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The checkpoint's config and findings about it. Raises CheckpointError where there is none.

    A config.json of both layouts: the newer one counts, and its values must not contradict the older one's. One that
    describes another model (a Trainer writes the base's) counts for nothing.
    """
    paths = [path for path in (directory / CONFIG, directory / OLDER / CONFIG) if path.is_file()]
    if not paths:
        raise CheckpointError(f"{directory}: has no config.json, which says num_experts")
    read = {path: read_object(path, "config", _JSON_LIMIT) for path in paths}
    own = {path: config for path, config in read.items() if "num_experts" in config or _is_own(config, path)}
    findings = tuple(
        f"{path.relative_to(directory)} describes a {config.get('model_type')} model and is not used"
        for path, config in read.items()
        if path not in own
    )
    merged: dict[str, Any] = {}
    for path, config in own.items():
        for name in ("num_experts", "top_k", "temperature"):
            if name in merged and name in config and merged[name] != config[name]:
                raise CheckpointError(f"{path}: {name} is {config[name]!r}, but {directory / CONFIG}: {merged[name]!r}")
        merged = {**config, **merged}
    return merged, findings


def _is_own(config: Mapping[str, Any], path: Path) -> bool:
    return path.parent.name == OLDER or config.get("model_type") in (MODEL_TYPE, None)


def router_files(root: Path) -> list[Path]:
    """The files that hold a router, in the root and in the older layout's directory; one is meant."""
    places = [root / name for name in ROUTERS] + [root / OLDER / name for name in ROUTERS]
    return [path for path in places if path.exists()]


def open_router(root: Path, parts: Parts) -> Router | None:
    """The router from headers; None, and a problem of `files` or `gate`, where there is none, or several, or no router.

    An older router.pt has its tensors under gate_state_dict, and numbers beside it.
    """
    found = router_files(root)
    if not found:
        parts.refuse("gate", f"{root}: has no router: neither {' nor '.join(ROUTERS)}")
    elif len(found) > 1:
        names = ", ".join(str(path.relative_to(root)) for path in found)
        parts.refuse("gate", f"{root}: holds several routers: {names}; keep the one that is meant")
    source = None
    for path in found:
        with parts.within("files"):
            source = open_weights(path, state_dict_key="gate_state_dict")
            parts.sources.append(source)
    if len(found) == 1 and source is not None:
        with parts.within("gate"):
            return _router(found[0], source)
    return None


def _router(path: Path, source: TensorSource) -> Router:
    values = {} if kind_of(path) is Kind.SAFETENSORS else dict(source.extras)
    nested = {name.removeprefix("gate.") for name in source.infos} == {"weight", "bias"} and "weight" in source.infos
    weight, bias = ("weight", "bias") if nested else GATE
    tensors = [name for name, value in values.items() if is_tensor(value)]
    missing = sorted({weight, bias} - set(source.infos))
    unexpected = sorted({*source.infos, *tensors, *(n for n in values if n.startswith("gate_state"))} - {weight, bias})
    if missing or unexpected:
        raise CheckpointError(f"{path}: is no router of experts: missing keys {missing}, unexpected keys {unexpected}")
    shape, bias_shape = source.infos[weight].shape, source.infos[bias].shape
    if len(shape) != 2 or bias_shape != shape[:1] or 0 in shape:
        turned = ", which looks transposed" if len(shape) == 2 and bias_shape == shape[1:] else ""
        raise CheckpointError(
            f"{path}: {weight} is {list(shape)} and {bias} {list(bias_shape)}{turned}: they must be "
            "[experts, hidden size] and [experts]"
        )
    for info in source.infos.values():
        if not info.is_floating:
            raise CheckpointError(f"{path}: {info.name} is {info.dtype_name}; a router is floating-point")
    if values.get("input_size", shape[1]) != shape[1]:
        raise CheckpointError(f"{path}: says input_size {values['input_size']}, but {weight} is {list(shape)}")
    return Router(
        source=source,
        file=path,
        weight=weight,
        bias=bias,
        num_experts=shape[0],
        hidden_size=shape[1],
        values=values,
    )


def read_library(root: Path, parts: Parts) -> Skills | None:
    """The header of the skill library; None where there is none, or, with a problem of `files` or `skill_library`,
    where it holds anything but embeddings."""
    found = [path for path in (root / SKILLS, root / OLDER / SKILLS) if path.exists()]
    parts.is_sound("skill_library", "no skill library")
    if len(found) > 1:
        parts.refuse("skill_library", f"{root}: holds {SKILLS} and {OLDER}/{SKILLS}; keep the one that is meant")
        return None
    for path in found:
        with parts.within("files"):
            loaded = read_pickle(path)
            with parts.within("skill_library"):
                content = _skills(path, loaded)
                size = next((tensor.shape[0] for tensor in content.values()), None)
                parts.is_sound("skill_library", f"{len(content)} skills of size {size}")
                return Skills(file=path, ids=tuple(content), size=size)
    return None


def read_skills(skills: Skills) -> dict[int | str, torch.Tensor]:
    """The embeddings [size] by skill id, as copies of their own. Raises CheckpointError."""
    content = _skills(skills.file, load_pickle(skills.file, tensors="mmap"))
    return {name: tensor.detach().clone() for name, tensor in content.items()}


def skill_source(skills: Skills) -> TensorSource:
    """The embeddings as tensors that can be looked at one by one, under their ids."""
    tensors = {str(name): tensor for name, tensor in read_skills(skills).items()}
    infos = {name: TensorInfo.of(name, tensor) for name, tensor in tensors.items()}
    return TensorSource(path=skills.file, files=(skills.file,), infos=infos, reader=tensors.__getitem__)


def _skills(path: Path, content: Any) -> dict[int | str, torch.Tensor]:
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a dictionary of embeddings")
    for name, tensor in content.items():
        if type(name) not in (int, str):
            raise CheckpointError(f"{path}: a skill's id is {name!r}, neither a number nor a name")
        if not is_tensor(tensor) or len(tensor.shape) != 1 or not TensorInfo.of(str(name), tensor).is_floating:
            what = list(tensor.shape) if is_tensor(tensor) else type(tensor).__name__
            raise CheckpointError(f"{path}: skill {name} is {what}, not a floating-point embedding [d]")
    if len({tensor.shape for tensor in content.values()}) > 1:
        shown = ", ".join(f"{name}: {tensor.shape[0]}" for name, tensor in content.items())
        raise CheckpointError(f"{path}: its embeddings differ in size ({shown})")
    return content


def read_trainer_state(directory: Path) -> dict[str, Any]:
    """What trainer_state.json says of the training so far; {} where there is none. Raises CheckpointError."""
    path = directory / TRAINER_STATE
    if not path.is_file():
        return {}
    state = read_object(path, "trainer state", _JSON_LIMIT)
    kept = {
        name: state[name]
        for name in ("global_step", "epoch", "max_steps", "num_train_epochs", "train_batch_size", "best_metric")
        if state.get(name) is not None
    }
    history = state.get("log_history")
    rows = [row for row in history if isinstance(row, dict)] if isinstance(history, list) else []
    for name in ("learning_rate", "loss", "eval_loss"):
        values = [row[name] for row in rows if isinstance(row.get(name), (int, float))]
        if values:
            kept[name] = values[-1]
    return kept
