"""Merging lora_moe checkpoints: all experts in the order of the sources, and their rows of the routers alike.

config.json of merged lora_moe checkpoints: the first one's, with the number of experts and where they come from.

Uniting skill libraries: numbers continue from one source to the next, names that collide are a conflict.

Whether each expert of a merged lora_moe gives, alone over the base, the logits of its source: bit for bit.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from runner.checkpoints import model_directory as hf
from runner.checkpoints.checkpoint import Checkpoint
from runner.checkpoints.detect import open_checkpoint
from runner.errors import CheckpointError, ConfigError, RunnerError
from runner.evaluation.base_models import Base
from runner.families.lora.adapter import WEIGHT_FILES, Factors
from runner.families.lora.config import FILE_NAME as ADAPTER_CONFIG
from runner.families.lora.model import linear_shapes
from runner.families.lora_moe import checkpoint as lora_moe
from runner.families.lora_moe.checkpoint import (
    ADAPTERS,
    TEMPERATURE,
    TOP_K,
    Expert,
    MoeDetails,
    check_base,
    expert_name,
    read_experts,
    weight_name,
)
from runner.families.lora_moe.model import LoraForCausalLM
from runner.families.lora_moe.state import (
    CONFIG,
    MODEL_TYPE,
    OLDER,
    ROUTERS,
    SKILLS,
    TRAINER_STATE,
    Skills,
    read_skills,
)
from runner.files.file_type import sha256_of
from runner.merge.execute import TensorFile
from runner.merge.files import Files, OpenedSource
from runner.merge.lazy_tensor import Piece, from_source, from_tensor, mean, rows
from runner.merge.sources import check_bases, check_distinct, rebased
from runner.merge.spec import MergeSpec, SourceSpec

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


SkillId = int | str
_Entry = tuple[OpenedSource, SkillId, Piece]  # a skill of one source, its id there, its embedding


@dataclass(frozen=True, kw_only=True)
class United:
    """The merged library; `file` is None where no source has one. `sources`: skill id → {path, skill} it was."""

    file: TensorFile | None
    sources: Mapping[str, Any]
    findings: tuple[str, ...]
    conflicts: tuple[dict[str, Any], ...]


def unite_skills(spec: MergeSpec, sources: Sequence[OpenedSource]) -> United:
    """Every skill of every source. Raises CheckpointError where sizes differ, or names collide under error."""
    having = [source for source in sources if _skills(source) is not None]
    _check_sizes_moe_skills(having)
    found: dict[SkillId, list[_Entry]] = {}
    findings, number = [], 0
    for source in having:
        kept, said = _kept(source)
        findings += said
        offset = number
        for own, piece in kept.items():
            new = own + offset if isinstance(own, int) else own
            number = max(number, new + 1) if isinstance(new, int) else number
            found.setdefault(new, []).append((source, own, piece))
    findings += [f"{source.path}: has no {SKILLS}" for source in sources if having and source not in having]
    library: dict[SkillId, Piece] = {}
    origins: dict[str, Any] = {}
    conflicts = []
    for name, entries in found.items():
        chosen, how = _resolved(spec.on_conflict, name, entries)
        library[name] = mean([piece for _, _, piece in chosen]) if len(chosen) > 1 else chosen[0][2]
        where = [{"path": str(source.path), "skill": own} for source, own, _ in chosen]
        origins[str(name)] = where[0] if len(where) == 1 else where
        if len(entries) > 1:
            paths = [str(source.path) for source, _, _ in entries]
            conflicts.append({"skill": name, "sources": paths, "resolution": how})
            findings.append(f"skill {name} is in {' and '.join(paths)}: {how}")
    file = TensorFile(name=SKILLS, value=library) if having else None
    return United(file=file, sources=origins, findings=tuple(findings), conflicts=tuple(conflicts))


def _skills(source: OpenedSource) -> Skills | None:
    found: Skills | None = source.checkpoint.details.skills
    return found


def _check_sizes_moe_skills(having: Sequence[OpenedSource]) -> None:
    first: tuple[OpenedSource, int] | None = None
    for source in having:
        skills = _skills(source)
        size = skills.size if skills else None
        if size is None:
            continue
        first = first or (source, size)
        if size != first[1]:
            raise CheckpointError(
                f"{source.path}: its skills are embeddings of size {size}, those of {first[0].path} of {first[1]}; "
                "they cannot be compared in one library"
            )


def _kept(source: OpenedSource) -> tuple[dict[SkillId, Piece], list[str]]:
    """The skills to take, renumbered from 0 where experts were chosen and each expert has its skill by number."""
    skills = _skills(source)
    assert skills is not None
    read = {name: from_tensor(t, f"{skills.file}: skill {name}") for name, t in read_skills(skills).items()}
    chosen = source.spec.experts
    if chosen is None:
        return read, []
    if set(read) == set(range(source.checkpoint.details.num_experts)):
        return {number: read[index] for number, index in enumerate(chosen)}, []
    return read, [f"{source.path}: its skills do not name its experts one by one, so all of them are taken"]


def _resolved(on_conflict: str, name: SkillId, entries: Sequence[_Entry]) -> tuple[list[_Entry], str]:
    """The entries that make the skill, and how that was decided."""
    if len(entries) == 1:
        return list(entries), ""
    paths = " and ".join(str(source.path) for source, _, _ in entries)
    rule = f"(merge.on_conflict={on_conflict})"
    if on_conflict == "error":
        raise CheckpointError(f"skill {name} is in {paths}; rename one of them, or choose merge.on_conflict=first")
    if on_conflict == "average":
        return list(entries), f"the mean of their embeddings {rule}"
    if on_conflict == "newest":
        unknown = next((source for source, _, _ in entries if source.step is None), None)
        if unknown:
            raise CheckpointError(
                f"{unknown.path}: reports no step, so merge.on_conflict=newest cannot compare its skill {name} with "
                "others; choose first or last"
            )
        chosen = max(entries, key=lambda entry: entry[0].step or 0)
    else:
        chosen = entries[0 if on_conflict == "first" else -1]
    return [chosen], f"that of {chosen[0].path} is taken {rule}"


_GATE = ("gate.weight", "gate.bias")
_TRAINERS = ("optimizer.pt", "scheduler.pt")


@dataclass(frozen=True, kw_only=True)
class ChosenExpert:
    """One expert of the output: number `index` of `source`."""

    source: OpenedSource
    index: int
    expert: Expert

    @property
    def where(self) -> str:
        """Its name in its source, for messages."""
        return f"{self.expert.name} of {self.source.path}"


def open_moe_source(spec: SourceSpec, path: Path, checkpoint: Checkpoint) -> OpenedSource:
    """A lora_moe as a source. Raises ConfigError for an expert that it lacks, CheckpointError for missing keys."""
    details: MoeDetails = checkpoint.details
    checkpoint.require_complete()
    if spec.layers is not None:
        raise ConfigError(f"{path}: a lora_moe is merged by experts, not by layers; choose experts: […] of it")
    for index in spec.experts or ():
        if index >= details.num_experts:
            raise ConfigError(f"{path}: has no expert {index}; it has 0 to {details.num_experts - 1}")
    places = (checkpoint.path, checkpoint.path / OLDER)
    beside = [place / name for place in places for name in (CONFIG, TRAINER_STATE)]
    configs = [expert.adapter.directory / ADAPTER_CONFIG for expert in details.experts]
    skills = [details.skills.file] if details.skills else []
    files = (*checkpoint.weights.files, *configs, *skills, *(file for file in beside if file.is_file()))
    return OpenedSource(spec=spec, path=path, checkpoint=checkpoint, files=files)


def gather_moe(spec: MergeSpec, sources: Sequence[OpenedSource], base: str | None, output: Path) -> Files:
    """Plan the union. Raises ConfigError or CheckpointError where it is impossible or not allowed."""
    if spec.rule != "layers":
        raise ConfigError(
            f"merge={spec.rule}: the experts of lora_moe checkpoints are united (merge=layers); a mean of their "
            "matrices would be the mean of no two experts"
        )
    if spec.layers is not None or spec.drop:
        raise ConfigError("merge.layers and merge.drop are for NPT layers; choose {path: …, experts: […]} of a source")
    check_distinct(sources)
    experts = [
        ChosenExpert(source=source, index=index, expert=source.checkpoint.details.experts[index])
        for source in sources
        for index in (source.spec.experts or range(source.checkpoint.details.num_experts))
    ]
    _check_sizes(sources, experts)
    said = check_bases(sources, base, _check_fit)
    conflicts = _duplicates(spec, experts)
    skills = unite_skills(spec, sources)
    steps = [source.step for source in sources if source.step is not None]
    step = max(steps, default=None)
    name, base_findings = base_written(sources, base, output)
    pairs = [(chosen.source, chosen.expert.name) for chosen in experts]
    config, config_findings = merged_config(sources, pairs, name, step)
    adapters = [_tensors(chosen) for chosen in experts]
    router = {gate: rows([_rows(source, experts, gate) for source in sources]) for gate in _GATE}
    places = [f"{ADAPTERS}/{expert_name(i)}/{expert_name(i)}" for i in range(len(experts))]
    tensor_files = [
        *(
            TensorFile(name=f"{p}/{WEIGHT_FILES[0]}", value=tensors)
            for p, tensors in zip(places, adapters, strict=True)
        ),
        TensorFile(name=ROUTERS[0], value=router),
        *([skills.file] if skills.file else []),
    ]
    weights = {f"experts.{expert_name(i)}.{key}": p for i, each in enumerate(adapters) for key, p in each.items()}
    weights |= {f"router.{gate}": piece for gate, piece in router.items()}
    texts = {f"{place}/{ADAPTER_CONFIG}": _adapter_config(e, name) for place, e in zip(places, experts, strict=True)}
    table = [_row(i, chosen) for i, chosen in enumerate(experts)]
    info = merge_info(sources, pairs)
    return Files(
        format=lora_moe.NAME,
        family=lora_moe.FAMILY,
        sources=tuple(sources),
        weights=weights,
        tensor_files=tuple(tensor_files),
        texts={**texts, CONFIG: config},
        summary={
            **info,
            "experts": table,
            "skills": skills.sources,
            "total_parameters": sum(piece.numel for piece in weights.values()),
            "checkpoint_keys": len(weights),
            "global_step": step,
        },
        details={
            "expected_experts": list(range(len(experts))),
            "experts": table,
            "skills": list(skills.sources),
            "sources": {str(i): str(chosen.source.path) for i, chosen in enumerate(experts)},
        },
        step=step,
        findings=(*said, *base_findings, *config_findings, *skills.findings, *_said(sources, conflicts)),
        conflicts=(*conflicts, *skills.conflicts),
    )


def _check_sizes(sources: Sequence[OpenedSource], experts: Sequence[ChosenExpert]) -> None:
    """Raise CheckpointError where routers or adapters are made for different sizes."""
    first = sources[0]
    for source in sources[1:]:
        a, b = first.checkpoint.details.hidden_size, source.checkpoint.details.hidden_size
        if a != b:
            raise CheckpointError(
                f"{source.path}: its router reads a hidden size of {b}, that of {first.path} {a}; they stand on "
                "different base models and cannot be merged"
            )
    seen: dict[str, tuple[ChosenExpert, tuple[int, int]]] = {}
    for chosen in experts:
        for module in chosen.expert.adapter.modules:
            sizes = (module.in_features, module.out_features)
            other, known = seen.setdefault(module.name, (chosen, sizes))
            if known != sizes:
                raise CheckpointError(
                    f"{module.name} goes from {sizes[0]} to {sizes[1]} features in {chosen.where}, but from {known[0]} "
                    f"to {known[1]} in {other.where}; they stand on different base models and cannot be merged"
                )


def _check_fit(source: OpenedSource, base: Path) -> None:
    """Raise CheckpointError where the base's config.json says that the checkpoint cannot stand on it."""
    if not (base / hf.CONFIG).is_file():
        return
    size, found = source.checkpoint.details.hidden_size, hf.read_config(base).get("hidden_size")
    if found not in (None, size):
        raise CheckpointError(
            f"{source.path}: its router reads a hidden size of {size}, but its base {base} has {found}; give the right "
            "one as base="
        )


def _duplicates(spec: MergeSpec, experts: Sequence[ChosenExpert]) -> list[dict[str, Any]]:
    """Experts whose weights files are the same. Raises CheckpointError for them under merge.on_conflict=error."""
    seen: dict[tuple[int, str], int] = {}
    conflicts = []
    for number, chosen in enumerate(experts):
        file = chosen.expert.adapter.weights_file
        other = seen.setdefault((file.stat().st_size, sha256_of(file)), number)
        if other == number:
            continue
        paths = [str(experts[other].source.path), str(chosen.source.path)]
        if spec.on_conflict == "error":
            raise CheckpointError(
                f"{chosen.where} is the same as {experts[other].where}; choose experts for each source, or "
                "merge.on_conflict=first, which keeps both"
            )
        resolution = f"the same weights as expert {other}; both are kept, each with its row of the router"
        conflicts.append({"expert": number, "sources": paths, "resolution": resolution})
    return conflicts


def _said(sources: Sequence[OpenedSource], conflicts: Sequence[Mapping[str, Any]]) -> list[str]:
    said = [f"expert {c['expert']} is in {' and '.join(c['sources'])}: {c['resolution']}" for c in conflicts]
    for source in sources:
        found = [name for name in _TRAINERS if (source.checkpoint.path / name).is_file()]
        if found:
            said.append(f"{source.path}: {', '.join(found)} not merged: training goes on with a fresh optimizer")
    dtypes = {source.checkpoint.weights.infos[f"router.{_GATE[0]}"].dtype: None for source in sources}
    if len(dtypes) > 1:
        stored = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        said.append(f"the routers are stored as {stored}: the joint one is written in a dtype that holds both")
    if len(sources) > 1:
        said.append(
            "the routers were trained apart: how the joint one chooses between experts of different sources is new; "
            "merge.verify=functional measures it"
        )
    return said


def _tensors(chosen: ChosenExpert) -> dict[str, Piece]:
    """The expert's tensors under the keys of its file."""
    prefix, weights = weight_name(chosen.expert, ""), chosen.source.checkpoint.weights
    return {
        name.removeprefix(prefix): from_source(weights, info)
        for name, info in weights.infos.items()
        if name.startswith(prefix)
    }


def _rows(source: OpenedSource, experts: Sequence[ChosenExpert], gate: str) -> tuple[Piece, list[int]]:
    weights = source.checkpoint.weights
    chosen = [each.index for each in experts if each.source is source]
    return from_source(weights, weights.infos[f"router.{gate}"]), chosen


def _adapter_config(chosen: ChosenExpert, base_name: str | None) -> dict[str, Any]:
    """The expert's own adapter_config.json, with the base as the merged checkpoint names it."""
    named = {} if base_name is None else {"base_model_name_or_path": base_name}
    return {**chosen.expert.adapter.settings.raw, **named}


def _row(number: int, chosen: ChosenExpert) -> dict[str, Any]:
    adapter = chosen.expert.adapter
    return {
        "expert": number,
        "source": str(chosen.source.path),
        "source_expert": chosen.index,
        "ranks": sorted({module.r for module in adapter.modules}),
        "lora_alpha": adapter.settings.alpha,
        "modules": len(adapter.modules),
        "parameters": adapter.parameters,
    }


def check_experts(written: Path, files: Files, base: Base, prompts: Mapping[str, torch.Tensor]) -> list[int]:
    """The experts whose logits, alone and unweighted over the base, equal their source's on all `prompts`.

    `prompts`: text → token ids [T]. Raises RunnerError where a logit differs in a bit, ModelError or CheckpointError
    where the merged checkpoint does not fit the base.
    """
    merged = _experts(open_checkpoint(written), base)
    sources = {str(source.path): source for source in files.sources}
    known = {path: _experts(source.checkpoint, base) for path, source in sources.items()}
    checked = []
    for row, ours in zip(files.details["experts"], merged, strict=True):
        theirs = known[row["source"]][row["source_expert"]]
        for text, token_ids in prompts.items():
            if not torch.equal(_alone(ours, base, token_ids), _alone(theirs, base, token_ids)):
                raise RunnerError(
                    f"{written}: verification failed: on {text!r}, expert {row['expert']} alone gives other logits "
                    f"than in {row['source']}"
                )
        checked.append(row["expert"])
    return checked


def _experts(checkpoint: Checkpoint, base: Base) -> tuple[Factors, ...]:
    model = base.model
    check_base(checkpoint, linear_shapes(model), model.config.hidden_size, base.path)
    return read_experts(checkpoint, dtype=model.dtype, device=model.device)


@torch.inference_mode()
def _alone(factors: Factors, base: Base, token_ids: torch.Tensor) -> torch.Tensor:
    """The bits of the logits [1, T, V] of the base with one expert."""
    model = LoraForCausalLM(base.model, [factors]).eval()
    return model(token_ids.to(model.device)[None]).logits.contiguous().view(torch.uint8)
