"""`peft`: one plain LoRA adapter over a base model: adapter_config.json beside adapter_model.safetensors or .bin.

How an adapter is read, alone or as an expert, whether it fits a base model, how its matrices are loaded, and how one is
written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.checkpoints.checkpoint import Checkpoint, CheckpointFormat, Listing
from runner.checkpoints.reading import Parts, Reading, look_for_merged_model, some
from runner.errors import CheckpointError, ModelError
from runner.families.lora.config import ALL_LINEAR, FILE_NAME, LoraSettings, read_settings
from runner.families.lora_moe.state import ADAPTERS, OLDER, read_trainer_state
from runner.files.file_type import Kind, kind_of
from runner.files.tensors import TensorInfo, TensorSource, is_finite, owned

if TYPE_CHECKING:
    import torch

NAME = "peft"
FAMILY = "hf"
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
    scaling: float
    in_features: int
    out_features: int
    key_a: str
    key_b: str


@dataclass(frozen=True, kw_only=True)
class AdapterDetails:
    """One adapter, as its config and the header of its weights (`source`) describe it.

    `modules`: the complete ones whose shapes fit; `pairs`: the number of the complete ones, whatever their shapes.

    `missing` and `unknown`: keys that the config asks for and that are not there, and keys that it does not know. PEFT
    would load the rest without an error.
    """

    source: TensorSource = field(compare=False)
    settings: LoraSettings
    modules: tuple[LoraModule, ...]
    pairs: int
    parameters: int
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


def read_adapter(directory: Path, label: str, parts: Parts) -> AdapterDetails | None:
    """The adapter in `directory`, from headers; `label` is what messages call it.

    Its problems go to `files`, `adapters`, `keys` and `shapes`; None where there is no config or no one weights file.
    """
    settings = None
    if not (directory / FILE_NAME).exists():
        place = directory / FILE_NAME
        parts.refuse("adapters", f"{label} has no {FILE_NAME}: {place}: cannot be read: No such file")
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
    pairs, missing, unknown = _pairs(path, source.infos, settings, parts)
    unknown += [] if kind_of(path) is Kind.SAFETENSORS else list(source.extras)
    if missing:
        parts.fail("keys", f"{label} lacks {some(missing, 4, ', ')}")
    if unknown:
        parts.fail("keys", f"{label} has {some(unknown, 4, ', ')}, which its config does not ask for")
    read = [_module(path, name, pair["A"], pair["B"], settings, parts) for name, pair in sorted(pairs.items())]
    modules = tuple(module for module in read if module is not None)
    return AdapterDetails(
        source=source,
        settings=settings,
        modules=modules,
        pairs=len(pairs),
        parameters=sum(info.numel for info in source.infos.values()),
        hidden_sizes=_hidden_sizes(modules),
        missing=tuple(missing),
        unknown=tuple(unknown),
    )


def size_contradiction(adapter: AdapterDetails) -> str | None:
    """What to say where modules are made for different hidden sizes."""
    if len(adapter.hidden_sizes) < 2:
        return None
    shown = ", ".join(f"{size} by {name}" for size, name in sorted(adapter.hidden_sizes.items()))
    return f"{adapter.source.path}: its modules contradict each other on the hidden size: {shown}"


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
    if found and settings.targets is not None and settings.targets != (ALL_LINEAR,):
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
    settings, modules, infos = adapter.settings, adapter.modules, adapter.source.infos.values()
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
        "bytes": sum(info.nbytes for info in infos),
        "dtypes": sorted({info.dtype_name for info in infos}),
        "base_model": settings.base_name,
        "peft_version": settings.raw.get("peft_version"),
    }


def settings_findings(adapter: AdapterDetails, name: str) -> list[str]:
    """What the reader of a result should know of how the adapter was read."""
    if adapter.settings.targets is not None:
        return []
    return [
        f"{name}: target_modules is a regular expression, which is not evaluated: the modules are those of the "
        "file's keys, and whether some are missing was not checked"
    ]


# Adapters by module: A [r, in], B [out, r], and the scaling of B A x.
Factors = Mapping[str, tuple["torch.Tensor", "torch.Tensor", float]]


def misfits(adapter: AdapterDetails, linears: Mapping[str, tuple[int, int]], base: object = "") -> list[str]:
    """What of it a base with these linear modules (inputs, outputs) by name has not, or in other sizes."""
    named, problems = f"the base {base}".rstrip(), []
    for module in adapter.modules:
        sizes, found = (module.in_features, module.out_features), linears.get(module.name)
        if found is None:
            problems.append(f"adapts {module.name}, which {named} has not")
        elif found != sizes:
            made = f"{module.name} is adapted from {sizes[0]} to {sizes[1]} features"
            problems.append(f"{made}, but {named} has {found[0]} and {found[1]}")
    return problems


def check_fit(adapter: AdapterDetails, linears: Mapping[str, tuple[int, int]], base: object) -> None:
    """Check an adapter against `linears`, as `misfits` does.

    Raises ModelError for modules that the base has not or has in other sizes, CheckpointError for modules of the
    base that the adapter's config names but its file leaves out.
    """
    path = adapter.source.path
    if problems := misfits(adapter, linears, base):
        raise ModelError(f"{path}: {some(problems)}; give its own base as base=")
    if adapter.settings.targets is not None:
        wanted = {name for name in linears if adapter.settings.target_of(name) is not None}
        absent = sorted(wanted - {module.name for module in adapter.modules})
        if absent:
            missing = [key(name, matrix) for name in absent for matrix in "AB"]
            raise CheckpointError(f"{path}: lacks modules that it adapts in the base {base}: missing keys {missing}")


def read_factors(adapter: AdapterDetails, *, dtype: torch.dtype, device: torch.device) -> Factors:
    """The adapter's matrices by module. Raises as `read_finite`."""

    def read(name: str) -> torch.Tensor:
        return read_finite(adapter.source, name, dtype, device)

    return {module.name: (read(module.key_a), read(module.key_b), module.scaling) for module in adapter.modules}


def read_finite(source: TensorSource, name: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """One tensor as a copy of its own. Raises CheckpointError for NaN, Inf, and values that `dtype` cannot hold."""
    stored = source.read(name)
    tensor = stored.to(device=device, dtype=dtype, copy=True)
    if not is_finite(tensor):
        what = "holds NaN or Inf" if not is_finite(stored) else f"holds a value that overflows {dtype}"
        raise CheckpointError(f"{source.path}: {name} {what}")
    return tensor


def save_adapter(directory: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> None:
    """Write an adapter into `directory`, which is created: `tensors` by the names of `key`, `config` as JSON.

    The file holds copies of its own, never views of larger storages.
    """
    from safetensors.torch import save_file

    directory.mkdir(parents=True)
    save_file(owned(tensors), directory / WEIGHT_FILES[0], metadata={"format": "pt"})
    text = json.dumps(dict(config), indent=2, sort_keys=True, ensure_ascii=False)
    (directory / FILE_NAME).write_text(text + "\n", encoding="utf-8")


def matrices(factors: Factors) -> dict[str, torch.Tensor]:
    """A and B of every module under PEFT's names."""
    pairs = factors.items()
    return {key(name, matrix): each for name, (a, b, _) in pairs for matrix, each in (("A", a), ("B", b))}


def save_peft(details: AdapterDetails, factors: Factors, base: Path | None, target: Path) -> Path:
    """Write the adapter of a peft checkpoint, as its model has it now, below the directory `target`; where it lies."""
    from runner.files.staging import staged

    config = {**details.settings.raw, "base_model_name_or_path": str(base.resolve()) if base else ""}
    with staged(target) as directory:
        save_adapter(directory / "adapter", matrices(factors), config)
    return target / "adapter"


def adapter_config(
    *, base_name: str, r: int, alpha: float, target_modules: Iterable[str], dropout: float = 0.0
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
        "use_rslora": False,
        "target_modules": sorted(target_modules),
        "bias": "none",
        "init_lora_weights": True,
    }


def matches(listing: Listing) -> str | None:
    """The evidence: adapter_config.json in the directory, or beside the file if that is an adapter's weights."""
    directory = _directory(listing)
    if ADAPTERS in listing.entries or OLDER in listing.entries:
        return None  # a Trainer may have saved one beside several experts
    if (directory / FILE_NAME).is_file():
        return f"{FILE_NAME} of a PEFT adapter"
    return None


def resembles(listing: Listing) -> int:
    """3 where an adapter's config or weights are there."""
    return 3 if {FILE_NAME, *WEIGHT_FILES} & {*listing.entries} else 0


def read(listing: Listing) -> Reading:
    """The checkpoint, part by part: files, adapters, keys, shapes, pollution."""
    parts, directory = Parts(), _directory(listing)
    files = tuple(directory / name for name in WEIGHT_FILES if (directory / name).is_file())
    parts.is_sound("config", "an adapter has none")
    look_for_merged_model(parts, listing.path, "the adapter")
    training: dict[str, Any] = {}
    with parts.within("config"):
        training = read_trainer_state(directory)
    adapter = read_adapter(directory, "the adapter", parts)
    if adapter is None:
        return parts.reading(listing.path, files, None)
    name = adapter.source.path.name
    if (text := size_contradiction(adapter)) is not None:
        parts.refuse("shapes", text)
    parts.is_sound("adapters", f"r {adapter.settings.r}, {name}")
    parts.is_sound("keys", f"{adapter.pairs} modules with A and B, nothing else")
    parts.is_sound("shapes", "ranks as the config says")
    checkpoint = Checkpoint(
        path=listing.path,
        format=NAME,
        family=FAMILY,
        evidence=f"{FILE_NAME} and {name} with {len(adapter.source.infos)} LoRA keys",
        weights=adapter.source,
        details=adapter,
        base_name=adapter.settings.base_name,
        step=training.get("global_step"),
        training=training,
        missing=adapter.missing,
        unknown=adapter.unknown,
        findings=tuple(settings_findings(adapter, FILE_NAME)),
    )
    return parts.reading(listing.path, files, checkpoint)


def _directory(listing: Listing) -> Path:
    return listing.path.parent if listing.path.name in WEIGHT_FILES else listing.path


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """The fields of a result: `adapters` with its one entry."""
    adapter: AdapterDetails = checkpoint.details
    file = adapter.source.path
    entry = {"name": file.parent.name, **describe_adapter(adapter), "file": file.name}
    return {
        "adapters": [entry],
        "model_dim": adapter.hidden_size,
        "base_model": checkpoint.base_name,
        "training": dict(checkpoint.training),
    }


FORMATS = (
    CheckpointFormat(
        name=NAME, family=FAMILY, matches=matches, describe=describe, read=read, resembles=resembles, adapters=True
    ),
)
