"""Merging lora_moe checkpoints: all experts in the order of the sources, and their rows of the routers alike.

config.json is the first source's. Skill libraries are joined: numbers continue from one source to the next, names that
collide are a conflict. Each expert of the output gives, alone over the base, the logits of its source.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from runner.checkpoints.checkpoint import Checkpoint, dtype_name
from runner.errors import CheckpointError, ConfigError, RunnerError
from runner.evaluation.base_models import Base
from runner.families.lora.checkpoint import WEIGHT_FILES, Factors
from runner.families.lora.config import FILE_NAME as ADAPTER_CONFIG
from runner.families.lora.model import linear_shapes
from runner.families.lora_moe import checkpoint as lora_moe
from runner.families.lora_moe import state
from runner.families.lora_moe.checkpoint import Expert, MoeDetails, expert_name
from runner.families.lora_moe.model import LoraForCausalLM
from runner.families.lora_moe.state import ADAPTERS, CONFIG, GATE, SKILLS, Skills
from runner.files.file_type import sha256_of
from runner.merge.lazy_tensor import LazyTensor, from_source, from_tensor, mean, rows
from runner.merge.plan import (
    JsonObject,
    MergeOutput,
    Source,
    TensorFile,
    base_written,
    check_bases,
    check_distinct,
    latest_step,
)
from runner.merge.spec import MergeSpec, SourceSpec

STEP = "_dylora_checkpoint_step"
_TRAINERS = ("optimizer.pt", "scheduler.pt")
SkillId = int | str
_Skill = tuple[Source, SkillId, LazyTensor]  # a skill of one source, its id there, its embedding


@dataclass(frozen=True, kw_only=True)
class ChosenExpert:
    """One expert of the output: number `index` of `source`."""

    source: Source
    index: int
    expert: Expert

    @property
    def where(self) -> str:
        """Its name in its source, for messages."""
        return f"{self.expert.name} of {self.source.path}"

    def tensors(self) -> dict[str, LazyTensor]:
        """Its tensors under the keys of its file."""
        prefix, weights = lora_moe.weight_name(self.expert, ""), self.source.checkpoint.weights
        infos = weights.infos.items()
        return {name.removeprefix(prefix): from_source(weights, i) for name, i in infos if name.startswith(prefix)}

    def row(self, number: int) -> dict[str, Any]:
        """What is said of it as expert `number` of the output."""
        adapter = self.expert.adapter
        return {
            "expert": number,
            "source": str(self.source.path),
            "source_expert": self.index,
            "ranks": sorted({module.r for module in adapter.modules}),
            "lora_alpha": adapter.settings.alpha,
            "modules": len(adapter.modules),
            "parameters": adapter.parameters,
        }


def plan_merge(
    spec: MergeSpec, paths: Sequence[Path], checkpoints: Sequence[Checkpoint], base: str | None, output: Path
) -> MergeOutput:
    """Plan the union of `checkpoints` from `paths` in `output`, which stand on `base` or on the bases that they name.

    Raises ConfigError or CheckpointError where it is impossible or not allowed.
    """
    sources = [_open_source(*each) for each in zip(spec.sources, paths, checkpoints, strict=True)]
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
    duplicates = _duplicates(spec, experts)
    skills = merge_skills(spec, sources)
    step = latest_step(sources)
    base_name, base_findings = base_written(sources, base, output)
    info = _merge_info(sources, experts)
    named = {} if base_name is None else {"base_model_name_or_path": base_name}
    config, config_findings = _config(sources, len(experts), {**named, **({} if step is None else {STEP: step})})
    adapters = [chosen.tensors() for chosen in experts]
    router = {gate: rows([_rows(source, experts, gate) for source in sources]) for gate in GATE}
    places = [f"{ADAPTERS}/{expert_name(i)}/{expert_name(i)}" for i in range(len(experts))]
    files = dict(zip(places, adapters, strict=True))
    weights = {f"experts.{expert_name(i)}.{key}": t for i, each in enumerate(adapters) for key, t in each.items()}
    weights |= {f"router.{gate}": tensor for gate, tensor in router.items()}
    table = [chosen.row(number) for number, chosen in enumerate(experts)]
    conflicts = (*duplicates, *skills.conflicts)
    return MergeOutput(
        format=lora_moe.NAME,
        family=lora_moe.FAMILY,
        sources=tuple(sources),
        weights=weights,
        tensor_files=(
            *(TensorFile(name=f"{place}/{WEIGHT_FILES[0]}", value=tensors) for place, tensors in files.items()),
            TensorFile(name=state.ROUTERS[0], value=router),
            *([TensorFile(name=SKILLS, value=skills.library)] if skills.library is not None else []),
        ),
        texts={
            **{
                f"{place}/{ADAPTER_CONFIG}": {**chosen.expert.adapter.settings.raw, **named}
                for place, chosen in zip(places, experts, strict=True)
            },
            CONFIG: {**config, "merge_info": info},
        },
        summary={
            **info,
            "experts": table,
            "skills": skills.sources,
            "total_parameters": sum(tensor.numel for tensor in weights.values()),
            "checkpoint_keys": len(weights),
            "global_step": step,
            "conflicts": conflicts,
        },
        details={
            "expected_experts": list(range(len(experts))),
            "experts": table,
            "skills": list(skills.sources),
            "sources": {str(i): str(chosen.source.path) for i, chosen in enumerate(experts)},
        },
        step=step,
        findings=(*said, *base_findings, *config_findings, *skills.findings, *_said(sources, duplicates)),
        conflicts=conflicts,
        read_back=_read_back,
        check_functions=partial(check_experts, experts),
    )


def _open_source(spec: SourceSpec, path: Path, checkpoint: Checkpoint) -> Source:
    """A lora_moe as a source. Raises ConfigError for an expert that it lacks, CheckpointError for missing keys."""
    details: MoeDetails = checkpoint.details
    checkpoint.require_complete()
    if spec.layers is not None:
        raise ConfigError(f"{path}: a lora_moe is merged by experts, not by layers; choose experts: […] of it")
    for index in spec.experts or ():
        if index >= details.num_experts:
            raise ConfigError(f"{path}: has no expert {index}; it has 0 to {details.num_experts - 1}")
    places = (checkpoint.path, checkpoint.path / state.OLDER)
    beside = [place / name for place in places for name in (CONFIG, state.TRAINER_STATE)]
    configs = [expert.adapter.source.path.parent / ADAPTER_CONFIG for expert in details.experts]
    skills = [details.skills.file] if details.skills else []
    files = (*checkpoint.weights.files, *configs, *skills, *(file for file in beside if file.is_file()))
    return Source(spec=spec, path=path, checkpoint=checkpoint, files=files)


def _check_sizes(sources: Sequence[Source], experts: Sequence[ChosenExpert]) -> None:
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


def _check_fit(source: Source, base: Path, config: JsonObject) -> None:
    """Raise CheckpointError where the base's config.json says that the checkpoint cannot stand on it."""
    size, found = source.checkpoint.details.hidden_size, config.get("hidden_size")
    if found not in (None, size):
        raise CheckpointError(
            f"{source.path}: its router reads a hidden size of {size}, but its base {base} has {found}; give the right "
            "one as base="
        )


def _duplicates(spec: MergeSpec, experts: Sequence[ChosenExpert]) -> list[JsonObject]:
    """Experts whose weights files are the same. Raises CheckpointError for them under merge.on_conflict=error."""
    seen: dict[tuple[int, str], int] = {}
    conflicts: list[JsonObject] = []
    for number, chosen in enumerate(experts):
        file = chosen.expert.adapter.source.path
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


def _said(sources: Sequence[Source], duplicates: Sequence[JsonObject]) -> list[str]:
    said = [f"expert {c['expert']} is in {' and '.join(c['sources'])}: {c['resolution']}" for c in duplicates]
    for source in sources:
        found = [name for name in _TRAINERS if (source.checkpoint.path / name).is_file()]
        if found:
            said.append(f"{source.path}: {', '.join(found)} not merged: training goes on with a fresh optimizer")
    dtypes = {source.checkpoint.weights.infos[f"router.{GATE[0]}"].dtype for source in sources}
    if len(dtypes) > 1:
        stored = " and ".join(sorted(map(dtype_name, dtypes)))
        said.append(f"the routers are stored as {stored}: the joint one is written in a dtype that holds both")
    if len(sources) > 1:
        said.append(
            "the routers were trained apart: how the joint one chooses between experts of different sources is new; "
            "merge.verify=functional measures it"
        )
    return said


def _rows(source: Source, experts: Sequence[ChosenExpert], gate: str) -> tuple[LazyTensor, list[int]]:
    weights = source.checkpoint.weights
    chosen = [each.index for each in experts if each.source is source]
    return from_source(weights, weights.infos[f"router.{gate}"]), chosen


def _config(sources: Sequence[Source], count: int, own: JsonObject) -> tuple[dict[str, Any], list[str]]:
    """config.json for `count` experts, with the output's `own` values, and where the sources differ in settings."""
    details: list[MoeDetails] = [source.checkpoint.details for source in sources]
    dropped = ("merge_info", "model_name", "lora_r", "lora_alpha")  # of the older layout: adapters say it of themselves
    config = {name: value for name, value in details[0].config.items() if name not in dropped}
    config |= {"model_type": state.MODEL_TYPE, "num_experts": count, **own}
    findings = []
    for name, default in (("top_k", lora_moe.TOP_K), ("temperature", lora_moe.TEMPERATURE)):
        kept = getattr(details[0], name)
        for source, each in zip(sources, details, strict=True):
            value = getattr(each, name)
            if value != kept:
                findings.append(f"{source.path}: {name} is {value}; {kept} of {sources[0].path}, the first, is kept")
        if name == "top_k" and kept > count:
            findings.append(f"top_k is {kept} in {sources[0].path}; with {count} experts, {count} is")
            kept = count
        if kept != default or name in config:
            config[name] = kept
    return config, findings


def _merge_info(sources: Sequence[Source], experts: Sequence[ChosenExpert]) -> dict[str, Any]:
    """Where the experts come from, through earlier merges."""
    merged_from = [path for source in sources for path in _merged_from(source)]
    return {
        "merged_from": list(dict.fromkeys(merged_from)),
        "expert_sources": {expert_name(i): _origin(chosen) for i, chosen in enumerate(experts)},
    }


def _merged_from(source: Source) -> list[str]:
    found = _earlier(source).get("merged_from")
    return [str(path) for path in found] if isinstance(found, list) and found else [str(source.path)]


def _origin(chosen: ChosenExpert) -> dict[str, str]:
    known = _earlier(chosen.source).get("expert_sources")
    found = known.get(chosen.expert.name) if isinstance(known, Mapping) else None
    if isinstance(found, Mapping) and set(found) == {"path", "expert"}:
        return {key: str(value) for key, value in found.items()}
    return {"path": str(chosen.source.path), "expert": chosen.expert.name}


def _earlier(source: Source) -> JsonObject:
    """What an earlier merge left in it; {} where it is none."""
    info = source.checkpoint.details.config.get("merge_info")
    return info if isinstance(info, Mapping) else {}


@dataclass(frozen=True, kw_only=True)
class MergedSkills:
    """The merged library, None where no source has one. `sources`: skill id → the {path, skill} that it was."""

    library: Mapping[SkillId, LazyTensor] | None
    sources: JsonObject
    findings: tuple[str, ...]
    conflicts: tuple[JsonObject, ...]


def merge_skills(spec: MergeSpec, sources: Sequence[Source]) -> MergedSkills:
    """Every skill of every source. Raises CheckpointError where sizes differ, or names collide under error."""
    libraries: dict[int, Skills] = {i: s.checkpoint.details.skills for i, s in enumerate(sources)}
    having = [(source, skills) for i, source in enumerate(sources) if (skills := libraries[i]) is not None]
    _check_skill_sizes(having)
    found: dict[SkillId, list[_Skill]] = {}
    findings, number = [], 0
    for source, skills in having:
        kept, said = _kept(source, skills)
        findings += said
        offset = number
        for own, embedding in kept.items():
            new = own + offset if isinstance(own, int) else own
            number = max(number, new + 1) if isinstance(new, int) else number
            found.setdefault(new, []).append((source, own, embedding))
    lacking = [source for i, source in enumerate(sources) if libraries[i] is None] if having else []
    findings += [f"{source.path}: has no {SKILLS}" for source in lacking]
    library: dict[SkillId, LazyTensor] = {}
    origins: dict[str, Any] = {}
    conflicts = []
    for name, entries in found.items():
        chosen, how = _resolved(spec.on_conflict, name, entries)
        library[name] = mean([embedding for _, _, embedding in chosen]) if len(chosen) > 1 else chosen[0][2]
        where = [{"path": str(source.path), "skill": own} for source, own, _ in chosen]
        origins[str(name)] = where[0] if len(where) == 1 else where
        if len(entries) > 1:
            paths = [str(source.path) for source, _, _ in entries]
            conflicts.append({"skill": name, "sources": paths, "resolution": how})
            findings.append(f"skill {name} is in {' and '.join(paths)}: {how}")
    return MergedSkills(
        library=library if having else None, sources=origins, findings=tuple(findings), conflicts=tuple(conflicts)
    )


def _check_skill_sizes(having: Sequence[tuple[Source, Skills]]) -> None:
    sized = [(source, skills.size) for source, skills in having if skills.size is not None]
    for source, size in sized:
        if size != sized[0][1]:
            raise CheckpointError(
                f"{source.path}: its skills are embeddings of size {size}, those of {sized[0][0].path} of "
                f"{sized[0][1]}; they cannot be compared in one library"
            )


def _kept(source: Source, skills: Skills) -> tuple[dict[SkillId, LazyTensor], list[str]]:
    """The skills to take, renumbered from 0 where experts were chosen and each expert has its skill by number."""
    read = {name: from_tensor(t, f"{skills.file}: skill {name}") for name, t in state.read_skills(skills).items()}
    chosen = source.spec.experts
    if chosen is None:
        return read, []
    if set(read) == set(range(source.checkpoint.details.num_experts)):
        return {number: read[index] for number, index in enumerate(chosen)}, []
    return read, [f"{source.path}: its skills do not name its experts one by one, so all of them are taken"]


def _resolved(on_conflict: str, name: SkillId, entries: Sequence[_Skill]) -> tuple[list[_Skill], str]:
    """The entries that make the skill, and how that was decided."""
    if len(entries) == 1:
        return list(entries), ""
    rule = f"(merge.on_conflict={on_conflict})"
    if on_conflict == "error":
        paths = " and ".join(str(source.path) for source, _, _ in entries)
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


def _read_back(written: Checkpoint) -> tuple[JsonObject, str]:
    found = list(range(written.details.num_experts))
    return {"found_experts": found}, f"reads back as planned: {written.evidence}"


def check_experts(
    experts: Sequence[ChosenExpert], written: Checkpoint, base: Base, prompts: Mapping[str, torch.Tensor]
) -> str:
    """Whether each expert gives, alone and unweighted over the base, the logits of its source, bit for bit; in words.

    `prompts`: text → token ids [T]. Raises RunnerError where a bit differs, ModelError or CheckpointError where the
    merged checkpoint does not fit the base.
    """
    merged = _factors(written, base)
    known = {id(chosen.source): chosen.source.checkpoint for chosen in experts}
    of_source = {key: _factors(checkpoint, base) for key, checkpoint in known.items()}
    for number, (chosen, ours) in enumerate(zip(experts, merged, strict=True)):
        theirs = of_source[id(chosen.source)][chosen.index]
        for text, token_ids in prompts.items():
            if not torch.equal(_alone(ours, base, token_ids), _alone(theirs, base, token_ids)):
                raise RunnerError(
                    f"{written.path}: verification failed: on {text!r}, expert {number} alone gives other logits than "
                    f"in {chosen.source.path}"
                )
    return f"experts {', '.join(map(str, range(len(experts))))}, each alone: the logits of their sources, bit for bit"


def _factors(checkpoint: Checkpoint, base: Base) -> tuple[Factors, ...]:
    model = base.model
    lora_moe.check_base(checkpoint, linear_shapes(model), model.config.hidden_size, base.path)
    return lora_moe.read_experts(checkpoint, dtype=model.dtype, device=model.device)


@torch.inference_mode()
def _alone(factors: Factors, base: Base, token_ids: torch.Tensor) -> torch.Tensor:
    """The bits of the logits [1, T, V] of the base with one expert."""
    model = LoraForCausalLM(base.model, [factors]).eval()
    return model(token_ids.to(model.device)[None]).logits.contiguous().view(torch.uint8)
