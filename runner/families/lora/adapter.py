"""One PEFT LoRA adapter directory: adapter_config.json beside adapter_model.safetensors or adapter_model.bin.

How it is read, whether it fits a base model, how its matrices are loaded, and how one is written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.checkpoints.checkpoint import Listing
from runner.checkpoints.reading import Parts
from runner.errors import CheckpointError, ModelError
from runner.families.lora import config as lora_config
from runner.families.lora.config import LoraSettings, read_settings
from runner.files.file_type import Kind, kind_of
from runner.files.tensors import TensorInfo, TensorSource, is_finite, owned

if TYPE_CHECKING:
    import torch

WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."

_KEY = re.compile(re.escape(PREFIX) + r"(?P<module>.+)\.lora_(?P<matrix>[AB])\.weight")
_INTO_HIDDEN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_OUT_OF_HIDDEN = ("o_proj", "down_proj")
_LLAMA_MODULE = re.compile(r"(model\.layers\.)(\d+)(\.(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj))")


@dataclass(frozen=True, kw_only=True)
class LoraModule:
    """One module's adapter: B A x · scaling. `key_a` names A [r, in], `key_b` names B [out, r]."""

    name: str
    r: int
    alpha: float
    scaling: float
    in_features: int
    out_features: int
    key_a: str
    key_b: str


@dataclass(frozen=True, kw_only=True)
class AdapterDetails:
    """One adapter, as its config and the header of its weights describe it; `modules` are the complete ones whose
    shapes fit, `pairs` the number of the complete ones, whatever their shapes.

    `missing` and `unknown`: keys that the config asks for and that are not there, and keys that it does not know. PEFT
    would load the rest without an error.
    """

    directory: Path
    weights_file: Path
    settings: LoraSettings
    modules: tuple[LoraModule, ...]
    pairs: int
    parameters: int
    nbytes: int
    dtypes: tuple[str, ...]
    hidden_sizes: Mapping[int, str]  # as far as modules' names tell: the size → a module that is made for it
    missing: tuple[str, ...]
    unknown: tuple[str, ...]

    @property
    def hidden_size(self) -> int | None:
        """The hidden size that all of its modules are made for, where a module's name tells."""
        return next(iter(self.hidden_sizes), None)


def key(module: str, matrix: str) -> str:
    """The name under which PEFT saves matrix "A" [r, in] or "B" [out, r] of `module`."""
    return f"{PREFIX}{module}.lora_{matrix}.weight"


def read_adapter(directory: Path, label: str, parts: Parts) -> tuple[AdapterDetails, TensorSource] | None:
    """The adapter in `directory`, from headers; `label` is what messages call it.

    Its problems go to `files`, `adapters`, `keys` and `shapes`; None where there is no config or no one weights file.
    """
    settings = None
    if not (directory / lora_config.FILE_NAME).exists():
        place = directory / lora_config.FILE_NAME
        parts.refuse("adapters", f"{label} has no {lora_config.FILE_NAME}: {place}: cannot be read: No such file")
    else:
        with parts.within("adapters"):
            settings = read_settings(directory)
    found = [name for name in WEIGHT_FILES if (directory / name).exists()]
    if not found:
        parts.refuse("adapters", f"{label} has no weights: neither {' nor '.join(WEIGHT_FILES)} in {directory}")
    if len(found) > 1:
        parts.refuse("adapters", f"{label} holds {' and '.join(found)} in {directory}; keep the one that is meant")
    listing = Listing.of(directory)
    opened = [parts.weights(listing, name) for name in found]
    source = opened[0] if len(opened) == 1 else None
    if settings is None or source is None:
        return None
    path = source.path
    strange = [] if kind_of(path) is Kind.SAFETENSORS else list(source.extras)
    pairs, missing, unknown = _pairs(path, source.infos, settings, parts)
    unknown += strange
    if missing:
        parts.fail("keys", f"{label} lacks {_some(missing)}")
    if unknown:
        parts.fail("keys", f"{label} has {_some(unknown)}, which its config does not ask for")
    read = [_module(path, name, pair["A"], pair["B"], settings, parts) for name, pair in sorted(pairs.items())]
    modules = tuple(module for module in read if module is not None)
    infos = source.infos.values()
    adapter = AdapterDetails(
        directory=directory,
        weights_file=path,
        settings=settings,
        modules=modules,
        pairs=len(pairs),
        parameters=sum(info.numel for info in infos),
        nbytes=sum(info.nbytes for info in infos),
        dtypes=tuple(sorted({info.dtype_name for info in infos})),
        hidden_sizes=_hidden_sizes(modules),
        missing=tuple(missing),
        unknown=tuple(unknown),
    )
    return adapter, source


def size_contradiction(adapter: AdapterDetails) -> str | None:
    """What to say where modules are made for different hidden sizes."""
    if len(adapter.hidden_sizes) < 2:
        return None
    shown = ", ".join(f"{size} by {name}" for size, name in sorted(adapter.hidden_sizes.items()))
    return f"{adapter.weights_file}: its modules contradict each other on the hidden size: {shown}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f", … ({len(names)} in all)" if len(names) > 4 else "")


def _pairs(
    path: Path, infos: Mapping[str, TensorInfo], settings: LoraSettings, parts: Parts
) -> tuple[dict[str, dict[str, TensorInfo]], list[str], list[str]]:
    """A and B by module where both are there; the missing and the unknown keys, sorted."""
    found: dict[str, dict[str, TensorInfo]] = {}
    unknown = []
    for name, info in infos.items():
        match = _KEY.fullmatch(name)
        if match is None or (settings.targets is not None and settings.target_of(match["module"]) is None):
            unknown.append(name)
            continue
        found.setdefault(match["module"], {})[match["matrix"]] = info
    if not found:
        parts.refuse("keys", _nothing_found(path, infos))
    missing = {key(module, matrix) for module in found for matrix in "AB" if matrix not in found[module]}
    missing |= {key(module, matrix) for module in _other_layers(found, settings) for matrix in "AB"}
    if found and settings.targets is not None and settings.targets != (lora_config.ALL_LINEAR,):
        used = {settings.target_of(module) for module in found}
        missing |= {key(f"….{target}", matrix) for target in set(settings.targets) - used for matrix in "AB"}
    complete = {module: pair for module, pair in found.items() if len(pair) == 2}
    return complete, sorted(missing), sorted(unknown)


def _nothing_found(path: Path, infos: Mapping[str, TensorInfo]) -> str:
    if not infos:
        return f"{path}: holds no tensors, so the adapter has no weights"
    names = sorted(infos)
    shown = f"{', '.join(names[:3])}{', …' if len(names) > 3 else ''}"
    return (
        f"{path}: none of its {len(names)} keys is {key('<module>', 'A')} of a module in target_modules "
        f"(they are {shown}), so PEFT would load nothing"
    )


def _other_layers(found: Iterable[str], settings: LoraSettings) -> set[str]:
    """Modules that the config asks for in layers where the file has none of their keys, in a Llama's naming."""
    if settings.targets is None:
        return set()
    matches = [match for match in map(_LLAMA_MODULE.fullmatch, found) if match]
    depth = 1 + max((int(match[2]) for match in matches), default=-1)
    if depth > 4 * max(1, len(matches)):  # a wild layer number is no reason to list thousands of names
        return set()
    kinds = {(match[1], match[3]) for match in matches}
    wanted = {f"{front}{layer}{back}" for front, back in kinds for layer in range(depth)}
    return {module for module in wanted - set(found) if settings.target_of(module) is not None}


def _module(
    path: Path, name: str, a: TensorInfo, b: TensorInfo, settings: LoraSettings, parts: Parts
) -> LoraModule | None:
    """None, and a problem of `shapes`, where A is not [rank, in] or B not [out, rank]."""
    rank = settings.rank(name)
    for info in (a, b):
        if len(info.shape) != 2 or not info.is_floating or 0 in info.shape:
            text = f"{info.name} is {info.dtype_name} {list(info.shape)}, not a floating-point matrix"
            parts.refuse("shapes", f"{path}: {text}")
            return None
    if a.shape[0] != rank or b.shape[1] != rank:
        parts.refuse(
            "shapes",
            f"{path}: {a.name} is {list(a.shape)} and {b.name} {list(b.shape)}, but adapter_config.json gives it rank "
            f"{rank}: A must be [{rank}, in] and B [out, {rank}]",
        )
        return None
    return LoraModule(
        name=name,
        r=rank,
        alpha=settings.alpha_of(name),
        scaling=settings.scaling(name),
        in_features=a.shape[1],
        out_features=b.shape[0],
        key_a=a.name,
        key_b=b.name,
    )


def _hidden_sizes(modules: Iterable[LoraModule]) -> dict[int, str]:
    sizes: dict[int, str] = {}
    for module in modules:
        last = module.name.rpartition(".")[2]
        if last in _INTO_HIDDEN:
            sizes.setdefault(module.in_features, module.name)
        elif last in _OUT_OF_HIDDEN:
            sizes.setdefault(module.out_features, module.name)
    return sizes


def describe_adapter(adapter: AdapterDetails) -> dict[str, Any]:
    """The adapter's fields in a result: ranks, scaling, modules, sizes."""
    settings, modules = adapter.settings, adapter.modules
    return {
        "r": settings.r,
        "lora_alpha": settings.alpha,
        "scaling": settings.alpha / (settings.r**0.5 if settings.use_rslora else settings.r),
        "use_rslora": settings.use_rslora,
        "lora_dropout": settings.dropout,
        "target_modules": settings.raw["target_modules"],
        "modules": len(modules),
        "ranks": sorted({module.r for module in modules}),
        "parameters": adapter.parameters,
        "bytes": adapter.nbytes,
        "dtypes": list(adapter.dtypes),
        "base_model": settings.base_name,
        "peft_version": settings.raw.get("peft_version"),
    }


def settings_findings(adapter: AdapterDetails, name: str) -> list[str]:
    """What the reader of a result should know of how the adapter was read."""
    findings = []
    if adapter.settings.targets is None:
        findings.append(
            f"{name}: target_modules is a regular expression, which is not evaluated: the modules are those of the "
            "file's keys, and whether some are missing was not checked"
        )
    return findings


# Adapters by module: A [r, in], B [out, r], and the scaling of B A x.
Factors = Mapping[str, tuple["torch.Tensor", "torch.Tensor", float]]


def check_fit(adapter: AdapterDetails, linears: Mapping[str, tuple[int, int]], base: object) -> None:
    """Check an adapter against `linears`, the base's linear modules by name with (inputs, outputs).

    Raises ModelError for modules that the base has not or has in other sizes, CheckpointError for modules of the
    base that the adapter's config names but its file leaves out.
    """
    path = adapter.weights_file
    absent = sorted(module.name for module in adapter.modules if module.name not in linears)
    if absent:
        raise ModelError(
            f"{path}: adapts {', '.join(absent)}, which the base {base} has not; give its own base as base="
        )
    for module in adapter.modules:
        sizes = (module.in_features, module.out_features)
        if sizes != linears[module.name]:
            raise ModelError(
                f"{path}: {module.name} is adapted from {sizes[0]} to {sizes[1]} features, but the base {base} has "
                f"{linears[module.name][0]} and {linears[module.name][1]}; give its own base as base="
            )
    if adapter.settings.targets is not None:
        wanted = {name for name in linears if adapter.settings.target_of(name) is not None}
        absent = sorted(wanted - {module.name for module in adapter.modules})
        if absent:
            missing = [key(name, matrix) for name in absent for matrix in "AB"]
            raise CheckpointError(f"{path}: lacks modules that it adapts in the base {base}: missing keys {missing}")


def read_factors(
    weights: TensorSource, adapter: AdapterDetails, *, prefix: str = "", dtype: torch.dtype, device: torch.device
) -> Factors:
    """The adapter's matrices by module; `prefix` is what `weights` puts before its keys. Raises as `read_finite`."""

    def read(name: str) -> torch.Tensor:
        return read_finite(weights, prefix + name, f"{adapter.weights_file}: {name}", dtype, device)

    return {module.name: (read(module.key_a), read(module.key_b), module.scaling) for module in adapter.modules}


def read_finite(weights: TensorSource, name: str, where: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """One tensor as a copy of its own; `where` names it in messages.

    Raises CheckpointError for NaN, Inf, and values that `dtype` cannot hold.
    """
    stored = weights.read(name)
    tensor = stored.to(device=device, dtype=dtype, copy=True)
    if not is_finite(tensor):
        what = "holds NaN or Inf" if not is_finite(stored) else f"holds a value that overflows {dtype}"
        raise CheckpointError(f"{where} {what}")
    return tensor


def compose(path: Path, parts: Iterable[tuple[str, TensorSource]]) -> TensorSource:
    """Several files as one source: each part's names with its prefix before them."""
    held = {prefix + name: (source, name) for prefix, source in parts for name in source.infos}
    infos = {name: replace(source.infos[own], name=name) for name, (source, own) in held.items()}

    def read(name: str) -> torch.Tensor:
        source, own = held[name]
        return source.read(own)

    files = tuple(dict.fromkeys(file for source, _ in held.values() for file in source.files))
    return TensorSource(path=path, files=files, infos=infos, reader=read)


def save_adapter(directory: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> None:
    """Write an adapter into `directory`, which is created: `tensors` by the names of `key`, `config` as JSON.

    The file holds copies of its own, never views of larger storages.
    """
    from safetensors.torch import save_file

    directory.mkdir(parents=True)
    save_file(owned(tensors), directory / WEIGHT_FILES[0], metadata={"format": "pt"})
    text = json.dumps(dict(config), indent=2, sort_keys=True, ensure_ascii=False)
    (directory / lora_config.FILE_NAME).write_text(text + "\n", encoding="utf-8")


def save_peft(details: AdapterDetails, factors: Factors, base: Path | None, target: Path) -> Path:
    """Write the adapter of a peft checkpoint, as its model has it now, below the directory `target`; where it lies."""
    from runner.files.staging import staged

    tensors = {key(module, "A"): a for module, (a, _, _) in factors.items()}
    tensors |= {key(module, "B"): b for module, (_, b, _) in factors.items()}
    config = {**details.settings.raw, "base_model_name_or_path": str(base.resolve()) if base else ""}
    with staged(target) as directory:
        save_adapter(directory / "adapter", tensors, config)
    return target / "adapter"


def adapter_config(
    *,
    base_name: str,
    r: int,
    alpha: float,
    target_modules: Iterable[str],
    use_rslora: bool = False,
    dropout: float = 0.0,
) -> dict[str, Any]:
    """adapter_config.json of a plain LoRA adapter; PEFT takes its defaults for every other field."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "use_rslora": use_rslora,
        "target_modules": sorted(target_modules),
        "bias": "none",
        "init_lora_weights": True,
    }
