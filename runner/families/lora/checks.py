"""One LoRA adapter, part by part: its config, the names of its tensors, their shapes."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from runner.checks.detected import ADAPTER_WEIGHTS, Headers
from runner.checks.headers import Header
from runner.errors import CheckpointError
from runner.families.lora.config import ALL_LINEAR, FILE_NAME, LoraSettings, read_settings

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<matrix>[AB])\.weight")
_INTO_HIDDEN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_OUT_OF_HIDDEN = ("o_proj", "down_proj")
_LAYER = re.compile(r"(.*\.layers\.)(\d+)(\..*)")


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """`label`: what messages call it; `settings`: adapter_config.json, checked."""

    label: str
    settings: LoraSettings
    header: Header


def open_parts(directory: Path, label: str, headers: Headers) -> Adapter:
    """The config and the one weights file in `directory`. Raises CheckpointError where either is not there."""
    if not (directory / FILE_NAME).is_file():
        raise CheckpointError(f"{label} has no {FILE_NAME}, so its ranks and scaling are not known")
    files = [directory / name for name in ADAPTER_WEIGHTS if (directory / name).exists()]
    if not files:
        raise CheckpointError(f"{label} has no weights: neither {' nor '.join(ADAPTER_WEIGHTS)}")
    if len(files) > 1:
        raise CheckpointError(f"{label} holds {' and '.join(file.name for file in files)}; keep the one that is meant")
    return Adapter(label=label, settings=read_settings(directory), header=headers(files[0]))


def modules(adapter: Adapter) -> dict[str, dict[str, str]]:
    """Module → matrix ("A", "B") → the name of its tensor."""
    found: dict[str, dict[str, str]] = {}
    for name in adapter.header.tensors:
        if match := _KEY.fullmatch(name):
            found.setdefault(match["module"], {})[match["matrix"]] = name
    return found


def key_problems(adapters: Sequence[Adapter]) -> list[str]:
    """Names that adapters lack or should not have: by their own config, and against others with the same targets."""
    problems = []
    alike: dict[tuple[object, ...], set[str]] = {}
    for adapter in adapters:
        alike.setdefault(_asked(adapter), set()).update(modules(adapter))
    for adapter in adapters:
        found, settings = modules(adapter), adapter.settings
        names = {name for module, pair in found.items() if _is_target(settings, module) for name in pair.values()}
        unknown = sorted({*adapter.header.tensors, *adapter.header.extras} - names)
        wanted = {
            module for module in alike[_asked(adapter)] | _in_other_layers(adapter) if _is_target(settings, module)
        }
        missing = sorted(
            f"base_model.model.{module}.lora_{matrix}.weight"
            for module in wanted
            for matrix in "AB"
            if matrix not in found.get(module, {})
        )
        unused = set(settings.targets or ()) - {ALL_LINEAR} - {settings.target_of(m) for m in found if settings.targets}
        if missing:
            problems.append(f"{adapter.label} lacks {_some(missing)}")
        if unknown:
            problems.append(f"{adapter.label} has {_some(unknown)}, which its config does not ask for")
        if unused:
            problems.append(f"{adapter.label}: target_modules names {_some(sorted(unused))}, and no tensor is of it")
    return problems


def _asked(adapter: Adapter) -> tuple[object, ...]:
    settings = adapter.settings
    return (settings.targets or adapter.label, settings.excluded, settings.layers, settings.layers_pattern)


def _is_target(settings: LoraSettings, module: str) -> bool:
    return settings.targets is None or settings.target_of(module) is not None


def _in_other_layers(adapter: Adapter) -> set[str]:
    """The kinds of modules that the adapter has in one layer, in every layer up to its highest."""
    matches = [match for match in map(_LAYER.fullmatch, modules(adapter)) if match]
    depth = 1 + max((int(match[2]) for match in matches), default=-1)
    if adapter.settings.targets is None or depth > 4 * max(1, len(matches)):
        return set()
    return {f"{match[1]}{layer}{match[3]}" for match in matches for layer in range(depth)}


def shape_problems(adapter: Adapter) -> list[str]:
    """Tensors that are not A [rank, in] and B [out, rank] with the rank that the config gives the module."""
    problems = []
    for module, pair in sorted(modules(adapter).items()):
        rank = adapter.settings.rank(module)
        for matrix, name in pair.items():
            tensor = adapter.header.tensors[name]
            axis = 0 if matrix == "A" else 1
            if len(tensor.shape) != 2 or not tensor.is_floating or 0 in tensor.shape:
                problems.append(f"{adapter.label}: {name} is {tensor.dtype} {list(tensor.shape)}, no matrix of weights")
            elif tensor.shape[axis] != rank:
                wanted = f"[{rank}, in]" if matrix == "A" else f"[out, {rank}]"
                problems.append(
                    f"{adapter.label}: {name} is {list(tensor.shape)}, but {FILE_NAME} gives it rank {rank}: {wanted}"
                )
    return problems


def contradictions(adapters: Sequence[Adapter]) -> list[str]:
    """Modules that experts adapt from or to other sizes than the first that adapts them; ranks may differ."""
    first: dict[tuple[str, str], tuple[int, str]] = {}
    problems = []
    for adapter in adapters:
        for module, pair in sorted(modules(adapter).items()):
            for matrix, name in pair.items():
                size = adapter.header.tensors[name].shape[1 if matrix == "A" else 0]
                other, label = first.setdefault((module, matrix), (size, adapter.label))
                if size != other:
                    what = "inputs" if matrix == "A" else "outputs"
                    problems.append(f"{adapter.label}: {name} is for {size} {what}, that of {label} for {other}")
    return problems


def hidden_sizes(adapter: Adapter) -> dict[int, str]:
    """The hidden sizes that modules of known names are made for, each with one of them."""
    sizes: dict[int, str] = {}
    for module, pair in sorted(modules(adapter).items()):
        last = module.rpartition(".")[2]
        matrix, axis = ("A", 1) if last in _INTO_HIDDEN else ("B", 0) if last in _OUT_OF_HIDDEN else ("", 0)
        if matrix in pair and len(shape := adapter.header.tensors[pair[matrix]].shape) == 2:
            sizes.setdefault(shape[axis], f"{adapter.label} ({module})")
    return sizes


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f", … ({len(names)} in all)" if len(names) > 4 else "")
