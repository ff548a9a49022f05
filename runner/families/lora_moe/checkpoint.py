"""`lora_moe`: DyLoRA-MoE, several LoRA experts and a router over one base model.

Where the experts' adapters lie, whether they agree with each other, the config and the router; and from an opened
checkpoint to tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.checkpoints.checkpoint import Checkpoint, CheckpointFormat, Listing
from runner.checkpoints.reading import Parts, Reading, look_for_merged_model
from runner.errors import ModelError
from runner.families.lora.adapter import (
    WEIGHT_FILES,
    AdapterDetails,
    Factors,
    check_fit,
    compose,
    describe_adapter,
    key,
    read_adapter,
    read_factors,
    read_finite,
    settings_findings,
    size_contradiction,
)
from runner.families.lora.config import FILE_NAME as ADAPTER_CONFIG
from runner.families.lora_moe.state import (
    MODEL_TYPE,
    OLDER,
    ROUTER_VALUES,
    TRAINER_STATE,
    Router,
    Skills,
    StrayFile,
    open_router,
    read_config,
    read_library,
    read_trainer_state,
    router_files,
    skill_source,
)
from runner.files.file_type import WEIGHT_SUFFIXES, may_be_weights
from runner.files.strict_json import read_object
from runner.files.tensors import TensorSource

if TYPE_CHECKING:
    import torch

NAME = "lora_moe"
FAMILY = "lora_moe"
ADAPTERS = "peft_adapters"
TEMPERATURE = 2.0
TOP_K = 1
_EXPERT = re.compile(r"expert_(\d+)")


@dataclass(frozen=True, kw_only=True)
class Expert:
    """One expert: its adapter, and whether that lies in a further directory of the expert's name (as PEFT nests it)."""

    name: str
    nested: bool
    adapter: AdapterDetails
    keys: frozenset[str]  # all keys of its file


@dataclass(frozen=True, kw_only=True)
class MoeDetails:
    """What names, shapes and configs say. `layout`: nested, flat or mixed adapters, or dylo_moe_state (the older one).

    In the checkpoint's weights the experts' keys stand as `experts.expert_0.<key>`, the router's as
    `router.gate.weight` and `router.gate.bias`.
    """

    layout: str
    config: Mapping[str, Any]
    experts: tuple[Expert, ...]
    router: Router
    num_experts: int
    top_k: int
    temperature: float
    hidden_size: int
    skills: Skills | None
    pollution: tuple[StrayFile, ...]


def expert_name(index: int) -> str:
    """The name of the expert of a router's row: that of its directory and of its adapter."""
    return f"expert_{index}"


def weight_name(expert: Expert, name: str) -> str:
    """How a key of the expert's file is called among the weights of the checkpoint."""
    return f"experts.{expert.name}.{name}"


def matches(listing: Listing) -> str | None:
    """The evidence in a directory: its model type, peft_adapters/ or dylo_moe_state/."""
    if not listing.path.is_dir():
        return None
    for name in (ADAPTERS, OLDER):
        if name in listing.entries and listing.file(name).is_dir():
            return f"it holds {name}/"
    if "config.json" in listing.entries:
        config = read_object(listing.file("config.json"), "config", 16 << 20)
        if config.get("model_type") == MODEL_TYPE:
            return f"config.json says model_type {MODEL_TYPE}"
    return None


def resembles(listing: Listing) -> int:
    """4 where a router or directories of experts are there."""
    parts = router_files(listing.path) if listing.path.is_dir() else []
    return 4 if parts or any(map(_EXPERT.fullmatch, listing.entries)) else 0


def read(listing: Listing) -> Reading:
    """The checkpoint, from headers, part by part: files, config, layout, gate, experts, adapters, keys, shapes,
    hidden_size, skill_library, pollution."""
    root, parts = listing.path, Parts()
    if not root.is_dir():
        text = f"{root}: is a file; a {NAME} checkpoint is the directory with config.json and a router"
        parts.refuse("layout", text)
        return parts.reading(root, (root,), None)
    config: dict[str, Any] | None = None
    config_findings: tuple[str, ...] = ()
    with parts.within("config"):
        config, config_findings = read_config(root)
    opened_router = open_router(root, parts)
    router = opened_router[0] if opened_router else None
    values = router.values if router else {}
    top_k, temperature = _settings(root, config, values, router, parts) if config is not None else (TOP_K, TEMPERATURE)
    names, places = _expert_places(root, parts)
    if router is not None:
        parts.is_sound("gate", f"{router.file.name}: {router.num_experts} experts, hidden size {router.hidden_size}")
        if config is not None and names:
            _agree_on_experts(config, router, names, root, parts)
    files = tuple(sorted({*router_files(root), *(file for place in places.values() for file in _adapter_files(place))}))
    tried = {name: read_adapter(place, name, parts) for name, place in places.items()}
    opened = {name: each for name, each in tried.items() if each is not None}
    experts = tuple(
        Expert(
            name=name,
            nested=places[name].parent.name == name,
            adapter=adapter,
            keys=frozenset(source.infos),
        )
        for name, (adapter, source) in opened.items()
    )
    missing = _missing_keys(experts, parts)
    _compare_experts(experts, router, parts)
    skills = read_library(root, parts)
    if skills is not None and router is not None and skills.size not in (None, router.hidden_size):
        text = f"{skills.file.name}: embeddings of {skills.size}, but the hidden size is {router.hidden_size}"
        parts.fail("skill_library", text)
    pollution = look_for_merged_model(parts, root, "the adapters", deep=True)
    _look_for_strays(root, places, pollution, parts)
    trainer: dict[str, Any] = {}
    with parts.within("config"):
        trainer = read_trainer_state(root)
    checkpoint = None
    if config is not None and opened_router is not None and experts:
        router, router_source = opened_router
        details = MoeDetails(
            layout=OLDER if router.file.parent.name == OLDER else _layout(experts),
            config=config,
            experts=experts,
            router=router,
            num_experts=router.num_experts,
            top_k=top_k,
            temperature=temperature,
            hidden_size=router.hidden_size,
            skills=skills,
            pollution=tuple(
                StrayFile(name=str(path.relative_to(root)), nbytes=path.stat().st_size) for path in pollution
            ),
        )
        step, step_findings = _step(config, trainer)
        checkpoint = Checkpoint(
            path=root,
            format=NAME,
            family=FAMILY,
            evidence=f"{matches(listing) or 'format=lora_moe'}, {router.num_experts} experts and {router.file.name}",
            weights=_weights(root, experts, [source for _, source in opened.values()], router, router_source),
            details=details,
            base_name=_base_name(config, experts),
            step=step,
            training=trainer,
            missing=tuple(missing),
            unknown=tuple(weight_name(expert, name) for expert in experts for name in expert.adapter.unknown),
            findings=(*config_findings, *step_findings, *_findings(root, details)),
        )
    beside = () if skills is None else (partial(skill_source, skills),)
    return parts.reading(root, files, checkpoint, beside)


def _settings(
    root: Path, config: Mapping[str, Any], values: Mapping[str, Any], router: Router | None, parts: Parts
) -> tuple[int, float]:
    """top_k and temperature: from config.json or router.pt, which must agree, and soundly say how many experts."""
    said = {"config.json": config, router.file.name if router else "router": values}
    counts = {name: each["num_experts"] for name, each in said.items() if "num_experts" in each}
    if not counts:
        text = "config.json does not say num_experts; without it no expert is known to be missing"
        parts.refuse("config", f"{root}: {text}")
        return TOP_K, TEMPERATURE
    if wrong := {name: count for name, count in counts.items() if type(count) is not int or count < 1}:
        for name, count in wrong.items():
            parts.refuse("config", f"{root}: {name}: num_experts is {count!r}, not a number of experts")
        return TOP_K, TEMPERATURE
    highest = max(counts.values())
    found: dict[str, Any] = {"top_k": TOP_K, "temperature": TEMPERATURE}
    for name in found:
        given = [each[name] for each in said.values() if each.get(name) is not None]
        for value in given:
            if name == "top_k" and (type(value) is not int or not 1 <= value <= highest):
                text = f"{name} is {value!r}; with {highest} experts it is a number from 1 to {highest}"
                parts.refuse("config", f"{root}: {text}")
            if name == "temperature" and (type(value) not in (int, float) or not 0 < value < 1e9):
                parts.refuse("config", f"{root}: {name} is {value!r}, not a number above 0")
        if len(given) > 1 and given[0] != given[1]:
            text = f"{name} is {given[0]!r} in config.json but {given[1]!r} in {list(said)[1]}"
            parts.refuse("config", f"{root}: {text}")
        found[name] = given[0] if given else found[name]
    parts.is_sound("config", f"{', '.join(counts)}: {highest} experts, top_k {found['top_k']}")
    return found["top_k"], found["temperature"]


def _expert_places(root: Path, parts: Parts) -> tuple[list[str], dict[str, Path]]:
    """The experts' names by number, and of each that has an adapter where that lies: in the expert's own directory,
    or, as PEFT nests it, in one of the same name in it.

    Where experts lie in several directories, or an adapter in two places or in none, that is a problem of `layout`.
    """
    found: dict[Path, list[Path]] = {}
    for parent in (root / ADAPTERS, root, root / OLDER):
        entries = list(parent.iterdir()) if parent.is_dir() else []
        if experts := [entry for entry in entries if _EXPERT.fullmatch(entry.name)]:
            found[parent] = sorted(experts, key=lambda entry: int(entry.name.removeprefix("expert_")))
    if not found:
        parts.refuse("layout", f"{root}: holds no experts: no {ADAPTERS}/expert_0 in it")
    if len(found) > 1:
        held = " and in ".join(map(str, found))
        parts.refuse("layout", f"{root}: holds experts in {held}; keep those that are meant")
    places, kinds = {}, set()
    directories = next(iter(found.values()), [])
    for directory in directories:
        name = directory.name
        flat, nested = _is_adapter(directory), _is_adapter(directory / name)
        if flat and nested:
            text = f"an adapter both flat and nested ({name}/{name}); keep one of them"
            parts.refuse("layout", f"{directory}: {text}")
        elif not flat and not nested:
            seen = sorted(entry.name for entry in directory.iterdir()) if directory.is_dir() else []
            shown = f"it holds {', '.join(seen[:6])}" if seen else "it is empty"
            text = f"no adapter, neither flat nor nested in {name}/{name}; {shown}"
            parts.refuse("layout", f"{directory}: {text}")
        else:
            kinds.add("nested" if nested else "flat")
            places[name] = directory / name if nested else directory
    stray = [name for name in (ADAPTER_CONFIG, *WEIGHT_FILES) if (root / name).exists()]
    if stray and root not in found:
        text = f"{len(places)} adapters, and {', '.join(stray)} beside them: of no expert, and not read"
        parts.odd("layout", text)
    found_kinds = sorted(kinds)
    parts.is_sound("layout", f"{len(places)} adapters, {' and '.join(found_kinds)}", layout="+".join(found_kinds))
    return [directory.name for directory in directories], places


def _is_adapter(place: Path) -> bool:
    return any((place / file).exists() for file in (ADAPTER_CONFIG, *WEIGHT_FILES))


def _adapter_files(place: Path) -> list[Path]:
    return [place / name for name in WEIGHT_FILES if (place / name).is_file()]


def _layout(experts: Sequence[Expert]) -> str:
    nested = {expert.nested for expert in experts}
    return "mixed" if len(nested) > 1 else "nested" if nested == {True} else "flat"


def _agree_on_experts(
    config: Mapping[str, Any], router: Router, directories: Sequence[str], root: Path, parts: Parts
) -> None:
    """Config, router and directories must say the same of how many experts there are."""
    says = {name: value["num_experts"] for name, value in
            (("config.json", config), (router.file.name, router.values)) if "num_experts" in value}  # fmt: skip
    rows = router.num_experts
    parts.is_sound("experts", f"{rows} in config, router and directories")
    if any(count != rows for count in says.values()) or directories != [expert_name(i) for i in range(rows)]:
        claims = " and ".join(f"{name} says {count} experts" for name, count in says.items())
        text = f"{claims}, the router has {rows}, and the adapters are {', '.join(directories)}; they must be the same"
        parts.refuse("experts", f"{root}: {text}")


def _missing_keys(experts: Sequence[Expert], parts: Parts) -> list[str]:
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
        for expert in group:
            lacking = [key(module, matrix) for module in sorted(everything - own[expert.name]) for matrix in "AB"]
            others = [name for name in lacking if name not in expert.keys and name not in expert.adapter.missing]
            if others:
                parts.fail(
                    "keys", f"{expert.name} lacks {others[0]}, … ({len(others)} in all), which other experts have"
                )
            missing |= {weight_name(expert, name) for name in others}
    pairs = sum(expert.adapter.pairs for expert in experts)
    parts.is_sound("keys", f"{pairs} modules with A and B, nothing else")
    return sorted(missing)


def _compare_experts(experts: Sequence[Expert], router: Router | None, parts: Parts) -> None:
    """Modules have one size in all experts (ranks may differ), and router and adapters are made for one hidden size."""
    first: dict[tuple[str, str], tuple[int, str]] = {}
    for expert in experts:
        for module in expert.adapter.modules:
            sides = (("inputs", module.in_features, module.key_a), ("outputs", module.out_features, module.key_b))
            for what, size, name in sides:
                other, label = first.setdefault((module.name, what), (size, expert.name))
                if size != other:
                    parts.fail("shapes", f"{expert.name}: {name} is for {size} {what}, that of {label} for {other}")
        path = expert.adapter.weights_file
        if any(module.name.rpartition(".")[2] == "lm_head" for module in expert.adapter.modules):
            parts.refuse("adapters", f"{path}: adapts lm_head, which tokens cannot be routed through")
        if (text := size_contradiction(expert.adapter)) is not None:
            parts.refuse("hidden_size", text)
        for size in expert.adapter.hidden_sizes if router else ():
            if router is not None and size != router.hidden_size:
                text = f"reads a hidden size of {router.hidden_size}, but {expert.name} ({path}) is made for {size}"
                parts.refuse("hidden_size", f"{router.file}: {router.weight} {text}")
    ranks = sorted({expert.adapter.settings.r for expert in experts})
    parts.is_sound("adapters", f"{len(experts)} configs, r {', '.join(map(str, ranks))}")
    parts.is_sound("shapes", "ranks as the configs say")
    if router is not None:
        parts.is_sound("hidden_size", f"{router.hidden_size} in router and adapters")


def _look_for_strays(root: Path, places: Mapping[str, Path], pollution: Sequence[Path], parts: Parts) -> None:
    """Files that look like weights, and are neither a part of the layout nor a state that a Trainer leaves."""
    known = {*pollution, *(file for place in places.values() for file in _adapter_files(place))}
    stray = [
        str(path.relative_to(root))
        for path in sorted(root.rglob("*"))
        if path not in known and path.suffix in WEIGHT_SUFFIXES and may_be_weights(path.name)
        if path.name not in (*WEIGHT_FILES, "router.safetensors")
    ]
    if stray and not pollution:
        text = f"{', '.join(stray)}: weights that are no part of such a checkpoint, and not read"
        parts.odd("pollution", text)


def _weights(
    root: Path, experts: Sequence[Expert], sources: Sequence[TensorSource], router: Router, router_source: TensorSource
) -> TensorSource:
    prefix = "router." if router.weight.startswith("gate.") else "router.gate."
    parts = [(weight_name(expert, ""), source) for expert, source in zip(experts, sources, strict=True)]
    return compose(root, [*parts, (prefix, router_source)])


def _base_name(config: Mapping[str, Any], experts: Sequence[Expert]) -> str | None:
    named = (config.get("base_model_name_or_path"), config.get("model_name"), experts[0].adapter.settings.base_name)
    return next((name for name in named if isinstance(name, str) and name), None)


def _step(config: Mapping[str, Any], trainer: Mapping[str, Any]) -> tuple[int | None, list[str]]:
    own, saved = trainer.get("global_step"), config.get("_dylora_checkpoint_step")
    if type(own) is not int:
        return (saved if type(saved) is int else None), []
    differs = type(saved) is int and saved != own
    return own, [f"{TRAINER_STATE} says step {own}, config.json step {saved}"] if differs else []


def _findings(root: Path, details: MoeDetails) -> list[str]:
    findings = [text for expert in details.experts for text in settings_findings(expert.adapter, expert.name)]
    settings = [expert.adapter.settings for expert in details.experts]
    findings += _differences("r", [each.r for each in settings], details.config.get("lora_r"))
    findings += _differences("lora_alpha", [each.alpha for each in settings], details.config.get("lora_alpha"))
    findings += _differences("base model", [each.base_name for each in settings], None)
    unknown = sorted(set(details.router.values) - set(ROUTER_VALUES))
    if unknown:
        findings.append(f"{details.router.file.name} also holds {', '.join(unknown)}: not used")
    if details.pollution:
        size = sum(file.nbytes for file in details.pollution)
        names = ", ".join(file.name for file in details.pollution)
        findings.append(f"a merged model lies beside the adapters ({names}, {size} bytes): it is not read; delete it")
    stray = [name for name in (ADAPTER_CONFIG, *WEIGHT_FILES) if (root / name).exists()]
    return findings + ([f"{', '.join(stray)} beside the experts: not read"] if stray else [])


def _differences(what: str, values: Sequence[Any], configured: Any) -> list[str]:
    """Findings where the experts' `values` differ, or are not what an older config.json says of all of them."""
    shown = ", ".join(dict.fromkeys(str(value) for value in values))
    found = [f"the experts differ in {what}: {shown}"] if len(set(values)) > 1 else []
    if configured is not None and any(value != configured for value in values):
        found.append(f"config.json says {what} {configured}, the adapters {shown}; the adapters' own counts")
    return found


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """The fields of a result: `experts` is their number, `adapters` has one entry for each."""
    details: MoeDetails = checkpoint.details
    root = checkpoint.path
    return {
        "experts": details.num_experts,
        "adapters": [
            {
                "name": expert.name,
                **describe_adapter(expert.adapter),
                "file": str(expert.adapter.weights_file.relative_to(root)),
            }
            for expert in details.experts
        ],
        "layout": details.layout,
        "router": {
            "file": str(details.router.file.relative_to(root)),
            "num_experts": details.router.num_experts,
            "hidden_size": details.router.hidden_size,
        },
        "top_k": details.top_k,
        "temperature": details.temperature,
        "model_dim": details.hidden_size,
        "skills": None
        if details.skills is None
        else {"count": len(details.skills.ids), "ids": list(details.skills.ids), "size": details.skills.size},
        "pollution": [{"file": file.name, "bytes": file.nbytes} for file in details.pollution],
        "base_model": checkpoint.base_name,
        "training": dict(checkpoint.training),
    }


FORMATS = (
    CheckpointFormat(
        name=NAME, family=FAMILY, matches=matches, describe=describe, read=read, resembles=resembles, adapters=True
    ),
)


def check_base(checkpoint: Checkpoint, linears: Mapping[str, tuple[int, int]], hidden_size: int, base: object) -> None:
    """Check the checkpoint against a base: its linear modules by name with (inputs, outputs), and its hidden size.

    Raises ModelError where the two do not fit, CheckpointError for missing or unknown keys.
    """
    checkpoint.require_complete()
    details: MoeDetails = checkpoint.details
    if details.hidden_size != hidden_size:
        raise ModelError(
            f"{details.router.file}: the router reads a hidden size of {details.hidden_size}, but the base {base} has "
            f"{hidden_size}; give its own base as base="
        )
    for expert in details.experts:
        check_fit(expert.adapter, linears, base)


def read_experts(checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device) -> tuple[Factors, ...]:
    """Each expert's matrices by module. Raises CheckpointError for NaN or Inf."""
    return tuple(
        read_factors(checkpoint.weights, expert.adapter, prefix=weight_name(expert, ""), dtype=dtype, device=device)
        for expert in checkpoint.details.experts
    )


def read_router(
    checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The router's weight [experts, hidden size] and bias [experts]. Raises CheckpointError for NaN or Inf."""
    router = checkpoint.details.router

    def read(name: str, own: str) -> torch.Tensor:
        return read_finite(checkpoint.weights, name, f"{router.file}: {own}", dtype, device)

    return read("router.gate.weight", router.weight), read("router.gate.bias", router.bias)
