"""`lora_moe`: DyLoRA-MoE, several LoRA experts and a router over one base model (spec/formats.md §4).

The experts of a lora_moe checkpoint: where their adapters lie, and whether they agree with each other, the config
and the router.

From an opened lora_moe checkpoint to tensors: whether it fits a base model, its experts and its router.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from runner.checkpoints.checkpoint import Checkpoint, CheckpointFormat, Listing
from runner.errors import CheckpointError, ModelError
from runner.families.lora.adapter import (
    WEIGHT_FILES,
    AdapterDetails,
    Factors,
    check_fit,
    compose,
    describe_adapter,
    key,
    open_adapter,
    read_factors,
    read_finite,
    settings_findings,
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
    find_merged_models,
    open_router,
    open_skills,
    read_config,
    read_trainer_state,
)
from runner.files.strict_json import read_object
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


NAME = "lora_moe"
FAMILY = "lora_moe"
TEMPERATURE = 2.0
TOP_K = 1


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


def open_moe(listing: Listing) -> Checkpoint:
    """The checkpoint, from headers. Raises CheckpointError where parts are missing or contradict each other."""
    root = listing.path
    if not root.is_dir():
        raise CheckpointError(f"{root}: is a file; a {NAME} checkpoint is the directory with config.json and a router")
    config, config_findings = read_config(root)
    router, router_source = open_router(root)
    parent, directories = expert_directories(root)
    num_experts = agree_on_experts(root, config, router, directories)
    opened = [open_expert(parent / name) for name in directories]
    experts = tuple(expert for expert, _ in opened)
    check_hidden_size(experts, router)
    skills = open_skills(root)
    trainer = read_trainer_state(root)
    nested = {expert.nested for expert in experts}
    layout = "mixed" if len(nested) > 1 else "nested" if nested == {True} else "flat"
    places = {root, parent, *(parent / name for name in directories), *(e.adapter.directory for e in experts)}
    pollution = find_merged_models(root, places | ({root / OLDER} if (root / OLDER).is_dir() else set()))
    details = MoeDetails(
        layout=OLDER if router.file.parent.name == OLDER else layout,
        config=config,
        experts=experts,
        router=router,
        num_experts=num_experts,
        top_k=_setting(root, config, router, "top_k", TOP_K, num_experts),
        temperature=_setting(root, config, router, "temperature", TEMPERATURE, None),
        hidden_size=router.hidden_size,
        skills=skills,
        pollution=pollution,
    )
    step, step_findings = _step(config, trainer)
    return Checkpoint(
        path=root,
        format=NAME,
        family=FAMILY,
        evidence=f"{matches(listing) or 'format=lora_moe'}, {num_experts} experts and {router.file.name}",
        weights=_weights(root, experts, [source for _, source in opened], router, router_source),
        details=details,
        base_name=_base_name(config, experts),
        step=step,
        training=trainer,
        missing=tuple(missing_keys(experts)),
        unknown=tuple(weight_name(expert, name) for expert in experts for name in expert.adapter.unknown),
        findings=(*config_findings, *step_findings, *_findings(root, details)),
    )


def _setting(
    root: Path, config: Mapping[str, Any], router: Router, name: str, default: Any, highest: int | None
) -> Any:
    """top_k or temperature: from config.json or router.pt, which must agree."""
    values = [source[name] for source in (config, router.values) if source.get(name) is not None]
    for value in values:
        if highest is not None and (type(value) is not int or not 1 <= value <= highest):
            raise CheckpointError(
                f"{root}: {name} is {value!r}; with {highest} experts it is a number from 1 to {highest}"
            )
        if highest is None and (type(value) not in (int, float) or not 0 < value < 1e9):
            raise CheckpointError(f"{root}: {name} is {value!r}, not a number above 0")
    if len(values) > 1 and values[0] != values[1]:
        raise CheckpointError(f"{root}: {name} is {values[0]!r} in config.json but {values[1]!r} in {router.file.name}")
    return values[0] if values else default


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


FORMATS = (CheckpointFormat(name=NAME, family=FAMILY, matches=matches, open=open_moe, describe=describe),)


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
