"""config.json of merged lora_moe checkpoints: the first one's, with the number of experts and where they come from."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runner.checkpoints.lora_moe_experts import expert_name
from runner.families.lora_moe.checkpoint import TEMPERATURE, TOP_K, MoeDetails
from runner.families.lora_moe.state import MODEL_TYPE
from runner.merge.sources import rebased
from runner.merging.files import OpenedSource

# An expert of the output: its source, and its name there.
Chosen = tuple[OpenedSource, str]
STEP = "_dylora_checkpoint_step"


def base_written(sources: Sequence[OpenedSource], base: str | None, output: Path) -> tuple[str | None, list[str]]:
    """The base's name as the output writes it: that of the first source, made to lead there from `output`."""
    named = next((source for source in sources if source.checkpoint.base_name), None)
    if named is not None:
        name = rebased(named, output)
        moved = f"config.json names the base as {name}, which leads there from {output}"
        return name, [moved] if name != named.checkpoint.base_name else []
    if base is None:
        return None, []
    there = os.path.realpath(base)
    return (os.path.relpath(there, os.path.realpath(output)) if Path(there).is_dir() else base), []


def merged_config(
    sources: Sequence[OpenedSource], experts: Sequence[Chosen], base_name: str | None, step: int | None
) -> tuple[dict[str, Any], list[str]]:
    """config.json, and what should be said of settings on which the sources differ."""
    details: list[MoeDetails] = [source.checkpoint.details for source in sources]
    dropped = ("merge_info", "model_name", "lora_r", "lora_alpha")  # of the older layout: adapters say it of themselves
    config = {name: value for name, value in details[0].config.items() if name not in dropped}
    config |= {"model_type": MODEL_TYPE, "num_experts": len(experts)}
    config |= {} if base_name is None else {"base_model_name_or_path": base_name}
    config |= {} if step is None else {STEP: step}
    findings = []
    for name, default in (("top_k", TOP_K), ("temperature", TEMPERATURE)):
        kept = getattr(details[0], name)
        for source, each in zip(sources, details, strict=True):
            value = getattr(each, name)
            if value != kept:
                findings.append(f"{source.path}: {name} is {value}; {kept} of {sources[0].path}, the first, is kept")
        if name == "top_k" and kept > len(experts):
            findings.append(f"top_k is {kept} in {sources[0].path}; with {len(experts)} experts, {len(experts)} is")
            kept = len(experts)
        if kept != default or name in config:
            config[name] = kept
    return config | {"merge_info": merge_info(sources, experts)}, findings


def merge_info(sources: Sequence[OpenedSource], experts: Sequence[Chosen]) -> dict[str, Any]:
    """Where the experts come from, through earlier merges."""
    origins = [_origin(source, name) for source, name in experts]
    merged_from = [path for source in sources for path in _merged_from(source)]
    return {
        "merged_from": list(dict.fromkeys(merged_from)),
        "expert_sources": {expert_name(i): origin for i, origin in enumerate(origins)},
    }


def _merged_from(source: OpenedSource) -> list[str]:
    found = _info(source).get("merged_from")
    return [str(path) for path in found] if isinstance(found, list) and found else [str(source.path)]


def _origin(source: OpenedSource, name: str) -> dict[str, str]:
    known = _info(source).get("expert_sources")
    found = known.get(name) if isinstance(known, Mapping) else None
    if isinstance(found, Mapping) and set(found) == {"path", "expert"}:
        return {key: str(value) for key, value in found.items()}
    return {"path": str(source.path), "expert": name}


def _info(source: OpenedSource) -> Mapping[str, Any]:
    """What an earlier merge left in it; {} where it is none."""
    info = source.checkpoint.details.config.get("merge_info")
    return info if isinstance(info, Mapping) else {}
