"""Merging lora_moe checkpoints: all experts in the order of the sources, and their rows of the routers alike."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.checkpoints.checkpoint import Checkpoint
from runner.checkpoints.content import sha256_of
from runner.checkpoints.lora_moe_experts import ADAPTERS, Expert, expert_name, weight_name
from runner.errors import CheckpointError, ConfigError
from runner.families.hf import checkpoint as hf
from runner.families.lora.adapter import WEIGHT_FILES
from runner.families.lora.config import FILE_NAME as ADAPTER_CONFIG
from runner.families.lora_moe import checkpoint as lora_moe
from runner.families.lora_moe.checkpoint import MoeDetails
from runner.families.lora_moe.state import CONFIG, OLDER, ROUTERS, TRAINER_STATE
from runner.merge.base_models import check_bases
from runner.merge.execute import TensorFile
from runner.merge.lazy_tensor import Piece, from_source, rows
from runner.merge.sources import check_distinct
from runner.merge.spec import MergeSpec, SourceSpec
from runner.merging.files import Files, OpenedSource
from runner.merging.moe_config import base_written, merge_info, merged_config
from runner.merging.moe_skills import unite_skills

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
