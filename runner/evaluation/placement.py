"""A model spread over devices: each part runs where its weights lie, and what it is given is moved there first."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from runner.errors import ConfigError, ModelError
from runner.files.tensors import TensorSource

# How accelerate may spread a model by itself.
STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
DeviceMap = str | Mapping[str, int | str]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a model lies and in what precision it computes.

    `device`: auto (cuda, then mps, then cpu) or torch's name. `dtype`: float32, bfloat16, float16, or stored (that of
    the embedding). `device_map`: auto, or module → device: spread over devices.
    """

    device: str = "auto"
    dtype: str = "float32"
    device_map: DeviceMap | None = None


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


def place(model: nn.Module, device: torch.device, device_map: DeviceMap | None) -> None:
    """Move `model` to `device`, or its parts to where `device_map` says.

    `device_map`: one of STRATEGIES, or module name → device (the number of a GPU, or cpu); "" is the whole model.
    Raises ConfigError for a map that names no such strategy, module or device, or leaves weights out.
    """
    if device_map is None:
        model.to(device)
        return
    parts = _by_strategy(model, device_map) if isinstance(device_map, str) else dict(device_map)
    places = {name: _device(place) for name, place in parts.items()}
    modules = dict(model.named_modules())
    for name in places:
        if name not in modules:
            raise ConfigError(f"family.device_map: the model has no module {name!r}; it has {', '.join(_tops(model))}")
    left = [name for name, _ in model.named_parameters() if not any(_is_in(name, part) for part in places)]
    if left:
        raise ConfigError(f"family.device_map says nothing about {left[0]}; add it, or a module around it")
    for name in sorted(places, key=len):  # a part of a part last
        modules[name].to(places[name])
    if len(set(places.values())) > 1:
        for name in places:
            follow(modules[name])


def follow(module: nn.Module) -> None:
    """Let `module` move what it is given to where its own weights lie; those inside it as well."""
    for each in module.modules():
        if next(each.parameters(), None) is not None and _moved not in each._forward_pre_hooks.values():
            each.register_forward_pre_hook(_moved, with_kwargs=True)


def is_spread(model: nn.Module) -> bool:
    """Whether its parts lie on several devices."""
    return len({str(parameter.device) for parameter in model.parameters()}) > 1


def _moved(
    module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[tuple[object, ...], dict[str, object]]:
    device = next(module.parameters()).device
    return tuple(_to(value, device) for value in args), {key: _to(value, device) for key, value in kwargs.items()}


def _to(value: object, device: torch.device) -> object:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    return tuple(_to(item, device) for item in value) if type(value) is tuple else value


def _by_strategy(model: nn.Module, strategy: str) -> dict[str, int | str]:
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory, get_max_memory

    if strategy not in STRATEGIES:
        raise ConfigError(f"family.device_map={strategy}: choose {', '.join(STRATEGIES)} or give {{module: device}}")
    whole, dtype = list(getattr(model, "_no_split_modules", None) or ()), next(model.parameters()).dtype
    if strategy == "sequential":
        memory = get_max_memory()
    else:
        memory = get_balanced_memory(
            model, no_split_module_classes=whole, dtype=dtype, low_zero=strategy == "balanced_low_0"
        )
    found = infer_auto_device_map(model, max_memory=memory, no_split_module_classes=whole, dtype=dtype)
    if "disk" in found.values():
        raise ConfigError(f"family.device_map={strategy}: the model is larger than the memory of all devices together")
    return dict(found)


def _device(place: int | str) -> torch.device:
    try:
        device = torch.device("cuda", place) if isinstance(place, int) else torch.device(str(place))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # a build without CUDA asserts
        raise ConfigError(f"family.device_map: {place} is no device here: {str(error).splitlines()[0]}") from error
    return device


def _is_in(name: str, part: str) -> bool:
    return part == "" or name == part or name.startswith(f"{part}.")


def _tops(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules() if 0 < name.count(".") + bool(name) <= 2][:8]
