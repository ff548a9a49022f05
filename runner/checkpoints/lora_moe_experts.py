"""The experts of a lora_moe checkpoint: where their adapters lie, and whether they agree with each other, the config
and the router."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.errors import CheckpointError
from runner.families.lora.adapter import WEIGHT_FILES, AdapterDetails, key, open_adapter
from runner.families.lora.config import FILE_NAME as ADAPTER_CONFIG
from runner.families.lora_moe.state import OLDER, Router
from runner.files.tensors import TensorSource

ADAPTERS = "peft_adapters"


@dataclass(frozen=True, kw_only=True)
class Expert:
    """One expert: its adapter, and whether that lies in a further directory of the expert's name (as PEFT nests it)."""

    name: str
    nested: bool
    adapter: AdapterDetails
    keys: frozenset[str]  # all keys of its file


def expert_name(index: int) -> str:
    """The name of the expert of a router's row: that of its directory and of its adapter."""
    return f"expert_{index}"


def weight_name(expert: Expert, name: str) -> str:
    """How a key of the expert's file is called among the weights of the checkpoint."""
    return f"experts.{expert.name}.{name}"


def expert_directories(root: Path) -> tuple[Path, list[str]]:
    """The directory that holds the experts' directories, and their names by number."""
    found = {}
    for parent in (root / ADAPTERS, root, root / OLDER):
        names = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
        numbers = [name.removeprefix("expert_") for name in names if name.startswith("expert_")]
        experts = sorted((number for number in numbers if number.isdecimal()), key=int)
        if experts:
            found[parent] = [f"expert_{number}" for number in experts]
    if not found:
        raise CheckpointError(f"{root}: holds no experts: no {ADAPTERS}/expert_0 in it")
    if len(found) > 1:
        raise CheckpointError(f"{root}: holds experts in {' and in '.join(map(str, found))}; keep those that are meant")
    return next(iter(found.items()))


def agree_on_experts(root: Path, config: Mapping[str, Any], router: Router, directories: Sequence[str]) -> int:
    """How many experts there are, where config, router and directories say the same. Raises CheckpointError."""
    says = {name: value["num_experts"] for name, value in
            (("config.json", config), (router.file.name, router.values)) if "num_experts" in value}  # fmt: skip
    if not says:
        raise CheckpointError(
            f"{root}: config.json does not say num_experts; without it no expert is known to be missing"
        )
    for name, value in says.items():
        if type(value) is not int or value < 1:
            raise CheckpointError(f"{root}: {name}: num_experts is {value!r}, not a number of experts")
    expected = [expert_name(i) for i in range(len(directories))]
    if set(says.values()) != {router.num_experts} or router.num_experts != len(directories) or directories != expected:
        said = " and ".join(f"{name} says {value} experts" for name, value in says.items())
        raise CheckpointError(
            f"{root}: {said}, the router in {router.file.name} has {router.num_experts}, and the adapters are "
            f"{', '.join(directories)}; they must be the same"
        )
    return router.num_experts


def open_expert(directory: Path) -> tuple[Expert, TensorSource]:
    """An expert in `directory` itself or in a directory of the same name in it, never in both."""
    name = directory.name

    def is_adapter(place: Path) -> bool:
        return any((place / file).exists() for file in (ADAPTER_CONFIG, *WEIGHT_FILES))

    flat, nested = is_adapter(directory), is_adapter(directory / name)
    if flat and nested:
        raise CheckpointError(f"{directory}: holds an adapter both flat and nested ({name}/{name}); keep one of them")
    if not flat and not nested:
        seen = sorted(entry.name for entry in directory.iterdir()) if directory.is_dir() else []
        shown = f"it holds {', '.join(seen[:6])}" if seen else "it is empty"
        raise CheckpointError(f"{directory}: holds no adapter, neither flat nor nested in {name}/{name}; {shown}")
    adapter, source = open_adapter(directory / name if nested else directory)
    return Expert(name=name, nested=nested, adapter=adapter, keys=frozenset(source.infos)), source


def check_hidden_size(experts: Sequence[Expert], router: Router) -> None:
    """Raise CheckpointError where router and adapters are made for different sizes, or an adapter for the head."""
    for expert in experts:
        size = expert.adapter.hidden_size
        if size not in (None, router.hidden_size):
            raise CheckpointError(
                f"{router.file}: {router.weight} reads a hidden size of {router.hidden_size}, but {expert.name} "
                f"({expert.adapter.weights_file}) is made for {size}"
            )
        if any(module.name.rpartition(".")[2] == "lm_head" for module in expert.adapter.modules):
            raise CheckpointError(
                f"{expert.adapter.weights_file}: adapts lm_head, which tokens cannot be routed through"
            )


def missing_keys(experts: Sequence[Expert]) -> list[str]:
    """The keys that experts lack: by their own config, and against other experts with the same target modules."""
    alike: dict[Any, list[Expert]] = {}
    for expert in experts:
        settings = expert.adapter.settings
        asked = (settings.targets, settings.excluded, settings.layers, settings.layers_pattern)
        if settings.targets is not None:
            alike.setdefault(asked, []).append(expert)
    missing = {weight_name(expert, name) for expert in experts for name in expert.adapter.missing}
    for group in alike.values():
        own = {expert.name: {module.name for module in expert.adapter.modules} for expert in group}
        everything = set().union(*own.values())
        missing |= {
            weight_name(expert, key(module, matrix))
            for expert in group
            for module in everything - own[expert.name]
            for matrix in "AB"
            if key(module, matrix) not in expert.keys
        }
    return sorted(missing)
