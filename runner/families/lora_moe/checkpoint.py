"""`lora_moe`: DyLoRA-MoE, several LoRA experts and a router over one base model.

Where the experts' adapters lie, whether they agree with each other, the config and the router; and from an opened
checkpoint to tensors.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.checkpoints.checkpoint import Checkpoint, CheckpointFormat, Listing
from runner.checkpoints.reading import Parts, Reading, look_for_merged_model
from runner.errors import ModelError
from runner.families.lora import checkpoint as lora
from runner.families.lora.config import FILE_NAME as ADAPTER_CONFIG
from runner.families.lora_moe import state
from runner.families.lora_moe.state import ADAPTERS, OLDER, Router, Skills
from runner.files.file_type import WEIGHT_SUFFIXES, may_be_weights
from runner.files.strict_json import read_object
from runner.files.tensors import TensorSource

if TYPE_CHECKING:
    import torch

NAME = "lora_moe"
FAMILY = "lora_moe"
TEMPERATURE = 2.0
TOP_K = 1
_EXPERT = re.compile(r"expert_(\d+)")


@dataclass(frozen=True, kw_only=True)
class Expert:
    """One expert and its adapter, which may lie in a further directory of the expert's name (as PEFT nests it)."""

    name: str
    adapter: lora.AdapterDetails


@dataclass(frozen=True, kw_only=True)
class MoeDetails:
    """What names, shapes and configs say. `layout`: nested, flat or mixed adapters, or dylo_moe_state (the older one).

    In the checkpoint's weights the experts' keys stand as `experts.expert_0.<key>`, the router's as
    `router.gate.weight` and `router.gate.bias`. `pollution`: the files of a merged model.
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
    pollution: tuple[Path, ...]


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
        if config.get("model_type") == state.MODEL_TYPE:
            return f"config.json says model_type {state.MODEL_TYPE}"
    return None


def resembles(listing: Listing) -> int:
    """4 where a router or directories of experts are there."""
    parts = state.router_files(listing.path) if listing.path.is_dir() else []
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
        config, config_findings = state.read_config(root)
    router = state.open_router(root, parts)
    # What says how many experts there are.
    said: dict[str, Mapping[str, Any]] = {} if config is None else {"config.json": config}
    said |= {} if router is None else {router.file.name: router.values}
    top_k, temperature = _settings(root, said, parts) if config is not None else (TOP_K, TEMPERATURE)
    names, places = _expert_places(root, parts)
    if router is not None:
        parts.is_sound("gate", f"{router.file.name}: {router.num_experts} experts, hidden size {router.hidden_size}")
        if config is not None and names:
            _agree_on_experts(said, router, names, root, parts)
    adapter_files = {place / name for place in places.values() for name in lora.WEIGHT_FILES}
    files = tuple(sorted({*state.router_files(root), *(file for file in adapter_files if file.is_file())}))
    adapters = {name: lora.read_adapter(place, name, parts) for name, place in places.items()}
    experts = tuple(Expert(name=name, adapter=adapter) for name, adapter in adapters.items() if adapter is not None)
    missing = _missing_keys(experts, parts)
    _compare_experts(experts, router, parts)
    skills = state.read_library(root, parts)
    if skills is not None and router is not None and skills.size not in (None, router.hidden_size):
        text = f"{skills.file.name}: embeddings of {skills.size}, but the hidden size is {router.hidden_size}"
        parts.fail("skill_library", text)
    pollution = look_for_merged_model(parts, root, "the adapters", deep=True)
    if not pollution:
        _look_for_strays(root, adapter_files, parts)
    trainer: dict[str, Any] = {}
    with parts.within("config"):
        trainer = state.read_trainer_state(root)
    checkpoint = None
    if config is not None and router is not None and experts:
        kinds = {"nested" if places[each.name].parent.name == each.name else "flat" for each in experts}
        details = MoeDetails(
            layout=OLDER if router.file.parent.name == OLDER else kinds.pop() if len(kinds) == 1 else "mixed",
            config=config,
            experts=experts,
            router=router,
            num_experts=router.num_experts,
            top_k=top_k,
            temperature=temperature,
            hidden_size=router.hidden_size,
            skills=skills,
            pollution=tuple(pollution),
        )
        step, step_findings = _step(config, trainer)
        named = (config.get("base_model_name_or_path"), config.get("model_name"), experts[0].adapter.settings.base_name)
        checkpoint = Checkpoint(
            path=root,
            format=NAME,
            family=FAMILY,
            evidence=f"{matches(listing) or 'format=lora_moe'}, {router.num_experts} experts and {router.file.name}",
            weights=_weights(root, experts, router),
            details=details,
            base_name=next((name for name in named if isinstance(name, str) and name), None),
            step=step,
            training=trainer,
            missing=tuple(missing),
            unknown=tuple(weight_name(expert, name) for expert in experts for name in expert.adapter.unknown),
            findings=(*config_findings, *step_findings, *_findings(root, details)),
        )
    beside = () if skills is None else (partial(state.skill_source, skills),)
    return parts.reading(root, files, checkpoint, beside)


def _settings(root: Path, said: Mapping[str, Mapping[str, Any]], parts: Parts) -> tuple[int, float]:
    """top_k and temperature: from config.json or router.pt, which must agree, and soundly say how many experts."""
    counts = {name: each["num_experts"] for name, each in said.items() if "num_experts" in each}
    wrong = [
        f"{name}: num_experts is {count!r}, not a number of experts"
        for name, count in counts.items()
        if type(count) is not int or count < 1
    ]
    if not counts:
        wrong = ["config.json does not say num_experts; without it no expert is known to be missing"]
    for text in wrong:
        parts.refuse("config", f"{root}: {text}")
    if wrong:
        return TOP_K, TEMPERATURE
    highest = max(counts.values())
    found: dict[str, Any] = {"top_k": TOP_K, "temperature": TEMPERATURE}
    for name in found:
        given = {place: each[name] for place, each in said.items() if each.get(name) is not None}
        for value in given.values():
            if name == "top_k" and (type(value) is not int or not 1 <= value <= highest):
                text = f"{name} is {value!r}; with {highest} experts it is a number from 1 to {highest}"
                parts.refuse("config", f"{root}: {text}")
            if name == "temperature" and (type(value) not in (int, float) or not 0 < value < 1e9):
                parts.refuse("config", f"{root}: {name} is {value!r}, not a number above 0")
            found[name] = value
        if any(value != found[name] for value in given.values()):
            text = " but ".join(f"{value!r} in {place}" for place, value in given.items())
            parts.refuse("config", f"{root}: {name} is {text}")
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
    stray = [name for name in (ADAPTER_CONFIG, *lora.WEIGHT_FILES) if (root / name).exists()]
    if stray and root not in found:
        text = f"{len(places)} adapters, and {', '.join(stray)} beside them: of no expert, and not read"
        parts.odd("layout", text)
    found_kinds = sorted(kinds)
    parts.is_sound("layout", f"{len(places)} adapters, {' and '.join(found_kinds)}", layout="+".join(found_kinds))
    return [directory.name for directory in directories], places


def _is_adapter(place: Path) -> bool:
    return any((place / file).exists() for file in (ADAPTER_CONFIG, *lora.WEIGHT_FILES))


def _agree_on_experts(
    said: Mapping[str, Mapping[str, Any]], router: Router, directories: Sequence[str], root: Path, parts: Parts
) -> None:
    """Config, router and directories must say the same of how many experts there are."""
    says = {name: value["num_experts"] for name, value in said.items() if "num_experts" in value}
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
            lacking = [lora.key(module, matrix) for module in sorted(everything - own[expert.name]) for matrix in "AB"]
            others = [
                name
                for name in lacking
                if name not in expert.adapter.source.infos and name not in expert.adapter.missing
            ]
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
        path = expert.adapter.source.path
        if any(module.name.rpartition(".")[2] == "lm_head" for module in expert.adapter.modules):
            parts.refuse("adapters", f"{path}: adapts lm_head, which tokens cannot be routed through")
        if (text := lora.size_contradiction(expert.adapter)) is not None:
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


def _look_for_strays(root: Path, known: Container[Path], parts: Parts) -> None:
    """Files that look like weights, and are neither a part of the layout nor a state that a Trainer leaves."""
    stray = [
        str(path.relative_to(root))
        for path in sorted(root.rglob("*"))
        if path not in known and path.suffix in WEIGHT_SUFFIXES and may_be_weights(path.name)
        if path.name not in (*lora.WEIGHT_FILES, "router.safetensors")
    ]
    if stray:
        text = f"{', '.join(stray)}: weights that are no part of such a checkpoint, and not read"
        parts.odd("pollution", text)


def _weights(root: Path, experts: Sequence[Expert], router: Router) -> TensorSource:
    """All files as one source."""
    gate = "router." if router.weight.startswith("gate.") else "router.gate."
    sources = [(weight_name(expert, ""), expert.adapter.source) for expert in experts] + [(gate, router.source)]
    held = {prefix + name: (source, name) for prefix, source in sources for name in source.infos}
    return TensorSource(
        path=root,
        files=tuple(dict.fromkeys(file for source, _ in held.values() for file in source.files)),
        infos={name: replace(source.infos[own], name=name) for name, (source, own) in held.items()},
        reader=lambda name: held[name][0].read(held[name][1]),
    )


def _step(config: Mapping[str, Any], trainer: Mapping[str, Any]) -> tuple[int | None, list[str]]:
    own, saved = trainer.get("global_step"), config.get("_dylora_checkpoint_step")
    if type(own) is not int:
        return (saved if type(saved) is int else None), []
    differs = type(saved) is int and saved != own
    return own, [f"{state.TRAINER_STATE} says step {own}, config.json step {saved}"] if differs else []


def _findings(root: Path, details: MoeDetails) -> list[str]:
    findings = [text for expert in details.experts for text in lora.settings_findings(expert.adapter, expert.name)]
    settings = [expert.adapter.settings for expert in details.experts]
    findings += _differences("r", [each.r for each in settings], details.config.get("lora_r"))
    findings += _differences("lora_alpha", [each.alpha for each in settings], details.config.get("lora_alpha"))
    findings += _differences("base model", [each.base_name for each in settings], None)
    unknown = sorted(set(details.router.values) - set(state.ROUTER_VALUES))
    if unknown:
        findings.append(f"{details.router.file.name} also holds {', '.join(unknown)}: not used")
    if details.pollution:
        size = sum(file.stat().st_size for file in details.pollution)
        names = ", ".join(str(file.relative_to(root)) for file in details.pollution)
        findings.append(f"a merged model lies beside the adapters ({names}, {size} bytes): it is not read; delete it")
    stray = [name for name in (ADAPTER_CONFIG, *lora.WEIGHT_FILES) if (root / name).exists()]
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
    skills = details.skills

    def name(file: Path) -> str:
        return str(file.relative_to(checkpoint.path))

    return {
        "experts": details.num_experts,
        "adapters": [
            {
                "name": expert.name,
                **lora.describe_adapter(expert.adapter),
                "file": name(expert.adapter.source.path),
            }
            for expert in details.experts
        ],
        "layout": details.layout,
        "router": {
            "file": name(details.router.file),
            "num_experts": details.router.num_experts,
            "hidden_size": details.router.hidden_size,
        },
        "top_k": details.top_k,
        "temperature": details.temperature,
        "model_dim": details.hidden_size,
        "skills": skills and {"count": len(skills.ids), "ids": list(skills.ids), "size": skills.size},
        "pollution": [{"file": name(file), "bytes": file.stat().st_size} for file in details.pollution],
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
        lora.check_fit(expert.adapter, linears, base)


def read_experts(checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device) -> tuple[lora.Factors, ...]:
    """Each expert's matrices by module. Raises CheckpointError for NaN or Inf."""
    return tuple(lora.read_factors(each.adapter, dtype=dtype, device=device) for each in checkpoint.details.experts)


def read_router(
    checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The router's weight [experts, hidden size] and bias [experts]. Raises CheckpointError for NaN or Inf."""
    router: Router = checkpoint.details.router
    weight, bias = (lora.read_finite(router.source, name, dtype, device) for name in (router.weight, router.bias))
    return weight, bias
