"""`lora_moe`: DyLoRA-MoE, several LoRA experts and a router over one base model (spec/formats.md §4)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.checkpoints.adapter_tensors import compose
from runner.checkpoints.checkpoint import Checkpoint, CheckpointFormat, Listing
from runner.checkpoints.lora_moe_experts import (
    ADAPTERS,
    Expert,
    agree_on_experts,
    check_hidden_size,
    expert_directories,
    missing_keys,
    open_expert,
    weight_name,
)
from runner.errors import CheckpointError
from runner.families.lora.adapter import WEIGHT_FILES, describe_adapter, settings_findings
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
