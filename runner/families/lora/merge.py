"""Merging PEFT adapters of one base, by what each adds to the weights: the update scaling · B A of each module.

`cat` and `linear` are exact at the sum of the ranks; `svd`, and ties and dare, whose masks are over whole updates, are
factored again at the rank that is given. `into_base` adds the updates to the base and writes a whole model.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from runner.checkpoints.checkpoint import Checkpoint
from runner.checkpoints.detect import open_checkpoint
from runner.errors import CheckpointError, ConfigError
from runner.families.hf.merge import FAMILY, beside_model, model_output, open_model
from runner.families.lora.checkpoint import NAME, WEIGHT_FILES, AdapterDetails, LoraModule, key
from runner.families.lora.config import FILE_NAME
from runner.merge.apply import Planned, maker
from runner.merge.combination import steps
from runner.merge.lazy_tensor import LazyTensor, from_source, name_of, promoted, split
from runner.merge.plan import (
    MergeOutput,
    Source,
    TensorFile,
    base_written,
    check_bases,
    check_distinct,
    latest_step,
)
from runner.merge.recipe import Part, Recipe, Slice
from runner.merge.spec import MergeSpec, SourceSpec

RULES = ("average", "linear", "cat", "svd", "task_arithmetic", "ties", "dare_linear", "dare_ties", "into_base")
# Those whose masks are over whole updates.
_DENSE = ("ties", "dare_linear", "dare_ties")


@dataclass(frozen=True, kw_only=True)
class Adapter(Source):
    """One adapter, by module, and its weight in the sum."""

    modules: Mapping[str, LoraModule]
    weight: float

    @property
    def details(self) -> AdapterDetails:
        """What its files say."""
        details: AdapterDetails = self.checkpoint.details
        return details

    def factors(self, module: LoraModule) -> tuple[torch.Tensor, torch.Tensor]:
        """A [r, in] and B [out, r], float64."""
        weights = self.checkpoint.weights
        return weights.read(module.key_a).double(), weights.read(module.key_b).double()

    def update(self, module: LoraModule) -> torch.Tensor:
        """What it adds to the module's weight, [out, in], float64."""
        a, b = self.factors(module)
        return module.scaling * (b @ a)


def plan_merge(
    spec: MergeSpec, paths: Sequence[Path], checkpoints: Sequence[Checkpoint], base: str | None, output: Path
) -> MergeOutput:
    """Plan a merge of adapters. Raises ConfigError or CheckpointError where it is impossible or not allowed."""
    if spec.rule not in RULES:
        raise ConfigError(f"merge={spec.rule} is not for adapters; choose {', '.join(RULES)}")
    adapters = [_open(*each, spec) for each in zip(spec.sources, paths, checkpoints, strict=True)]
    check_distinct(adapters)
    if spec.rule in ("average", "linear") and spec.parameters.get("normalize", True):
        total = sum(adapter.weight for adapter in adapters)
        if abs(total) < 1e-8:
            raise ConfigError(f"merge={spec.rule}: the weights sum to 0, and normalize divides by their sum")
        adapters = [replace(adapter, weight=adapter.weight / total) for adapter in adapters]
    if spec.rule == "into_base":
        return _into_base(spec, adapters, base)
    said = check_bases(adapters, base, lambda *_: None)
    modules = {name: [each for each in adapters if name in each.modules] for each in adapters for name in each.modules}
    _check_sizes(modules)
    ranks = {name: _rank(spec, name, having) for name, having in modules.items()}
    tensors: dict[str, LazyTensor] = {}
    for name, having in modules.items():
        tensors |= _factors(spec, name, having, ranks[name], adapters)
    weights = dict(sorted(tensors.items()))
    base_name, moved = base_written(adapters, base, output)
    names = [str(adapter.path) for adapter in adapters]
    rows = [
        {"source": name, "weight": each.weight, "rank": each.details.settings.r}
        for name, each in zip(names, adapters, strict=True)
    ]
    if spec.rule in (*_DENSE, "svd") and (spec.rule in _DENSE or spec.rank is not None or len(adapters) > 1):
        said.append(
            f"the merged updates are written at rank {max(ranks.values())}; what a larger rank would hold is lost"
        )
    return MergeOutput(
        format=NAME,
        family=FAMILY,
        sources=tuple(adapters),
        weights=weights,
        tensor_files=(TensorFile(name=WEIGHT_FILES[0], value=weights),),
        texts={FILE_NAME: _config(adapters, modules, ranks, base_name)},
        summary={
            "merged_from": names,
            "how": spec.rule,
            "adapters": rows,
            "total_parameters": sum(tensor.numel for tensor in weights.values()),
            "checkpoint_keys": len(weights),
            "conflicts": [],
        },
        details={"how": spec.rule, "merged": rows},
        step=latest_step(adapters),
        findings=(*said, *moved, "computed in float64 on the updates scaling · B A, and rounded once"),
        content=f"the {spec.rule} of the updates, computed again",
        read_back=lambda written: ({"modules": len(modules)}, f"reads back as planned: {written.evidence}"),
    )


def _open(spec: SourceSpec, path: Path, checkpoint: Checkpoint, merge: MergeSpec) -> Adapter:
    if checkpoint.format != NAME:
        raise CheckpointError(f"{path} is {checkpoint.format}: adapters are merged with adapters, or merge=into_base")
    checkpoint.require_complete()
    details: AdapterDetails = checkpoint.details
    if merge.rule in ("cat", "svd", "into_base") and (more := [name for name in spec.parameters if name != "weight"]):
        raise ConfigError(f"merge={merge.rule} takes no {more[0]} of a source")
    given = spec.weight if spec.weight is not None else merge.parameters.get("weight", 1.0)
    if isinstance(given, bool) or not isinstance(given, (int, float)):
        raise ConfigError(f"{path}: the weight of an adapter is one number, not {given}")
    return Adapter(
        spec=spec,
        path=path,
        checkpoint=checkpoint,
        files=(*checkpoint.weights.files, checkpoint.weights.files[0].parent / FILE_NAME),
        modules={module.name: module for module in details.modules},
        weight=float(given),
    )


def _check_sizes(modules: Mapping[str, Sequence[Adapter]]) -> None:
    """Raise CheckpointError where a module is adapted from or to other sizes: the bases differ."""
    for name, having in modules.items():
        first, *others = having
        sizes = [(a.modules[name].in_features, a.modules[name].out_features) for a in having]
        for other, size in zip(others, sizes[1:], strict=True):
            if size != sizes[0]:
                raise CheckpointError(
                    f"{name} has {sizes[0][0]} inputs and {sizes[0][1]} outputs in {first.path}, {size[0]} and "
                    f"{size[1]} in {other.path}: they stand on different bases"
                )


def _rank(spec: MergeSpec, name: str, having: Sequence[Adapter]) -> int:
    """At which rank a module is written: by svd and masks as given, else exactly."""
    ranks = [adapter.modules[name].r for adapter in having]
    sizes = (having[0].modules[name].in_features, having[0].modules[name].out_features)
    if spec.rule == "svd":
        return min(spec.rank or max(ranks), *sizes)
    if spec.rule in _DENSE:
        return min(spec.rank or sum(ranks), *sizes)
    if spec.rank is not None:
        raise ConfigError(f"merge={spec.rule} is exact at the sum of the ranks; merge.rank is for svd, ties and dare")
    return sum(ranks)


def _factors(
    spec: MergeSpec, name: str, having: Sequence[Adapter], rank: int, adapters: Sequence[Adapter]
) -> dict[str, LazyTensor]:
    """A [rank, in] and B [out, rank] of one module of the output, whose scaling is 1."""
    module = having[0].modules[name]
    infos = [
        each.checkpoint.weights.infos[getattr(each.modules[name], k)] for each in having for k in ("key_a", "key_b")
    ]
    dtype = getattr(torch, spec.dtype) if spec.dtype else promoted([info.dtype for info in infos])
    origin = " with ".join(f"{each.path}: {name}" for each in having)
    made: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    if spec.rule in _DENSE:
        made = cache(partial(_masked, spec, name, having, rank, adapters))
    else:
        made = partial(_summed, name, having, rank if spec.rule == "svd" else None)
    shapes = {"A": (rank, module.in_features), "B": (module.out_features, rank)}
    return {
        key(name, matrix): LazyTensor(
            origin=origin,
            dtype_name=name_of(dtype),
            shape=shape,
            parts=lambda number=number: split(made()[number].to(dtype)),  # type: ignore[misc]
        )
        for number, (matrix, shape) in enumerate(shapes.items())
    }


def _summed(name: str, having: Sequence[Adapter], rank: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of the weighted sum of the updates: one below the other, or at `rank` by their singular values."""
    found = [(each.weight * each.modules[name].scaling, *each.factors(each.modules[name])) for each in having]
    a, b = torch.cat([factor * one for factor, one, _ in found]), torch.cat([other for *_, other in found], dim=1)
    if rank is None:
        return a, b
    # The singular values of B A are those of the small matrix between the two orthogonal ones.
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    a, b = _at_rank(r_b @ r_a.T, rank)
    return a @ q_a.T, q_b @ b


def _masked(
    spec: MergeSpec, name: str, having: Sequence[Adapter], rank: int, adapters: Sequence[Adapter]
) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of the updates, each of whole size, merged as whole models over a base of zeros."""
    parts = tuple(Part(source=adapters.index(each), parameters=each.spec.settings) for each in having)
    slice_ = Slice(parts=parts)
    recipe = Recipe(method=spec.rule, slices=(slice_,), parameters=spec.parameters)
    make = maker(recipe, Planned(name=name, slice=slice_, t=0.0, names=(name,) * len(parts)), parts, spec.seed)
    assert not isinstance(make, float)
    updates = [each.update(each.modules[name]) for each in having]
    mixed = make(updates, torch.zeros_like(updates[0]))
    whole = torch.cat([mixed.part(*step) for step in steps(updates[0].numel())]).reshape(updates[0].shape)
    return _at_rank(whole, rank)


def _at_rank(update: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of the largest singular values of an update, each with their roots; zeros where there are fewer."""
    u, values, vh = torch.linalg.svd(update, full_matrices=False)
    roots = values[:rank].sqrt()
    a, b = roots[:, None] * vh[:rank], u[:, :rank] * roots
    lacking = rank - len(roots)
    if lacking > 0:
        a, b = torch.cat([a, a.new_zeros(lacking, a.shape[1])]), torch.cat([b, b.new_zeros(b.shape[0], lacking)], dim=1)
    return a, b


def _config(
    adapters: Sequence[Adapter],
    modules: Mapping[str, Sequence[Adapter]],
    ranks: Mapping[str, int],
    base_name: str | None,
) -> dict[str, Any]:
    """adapter_config.json: the first's, with the ranks that are written and a scaling of 1 everywhere."""
    first = adapters[0].details.settings
    same = all(set(each.modules) == set(modules) for each in adapters) and first.targets is not None
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: found for name, found in ranks.items() if found != rank}
    return {
        **first.raw,
        "base_model_name_or_path": base_name or first.raw.get("base_model_name_or_path") or "",
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "use_rslora": False,
        "init_lora_weights": True,
        "target_modules": first.raw["target_modules"] if same else sorted(modules),
        **({} if same else {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}),
        "inference_mode": True,
    }


def _into_base(spec: MergeSpec, adapters: Sequence[Adapter], base: str | None) -> MergeOutput:
    """A whole model: the base with the weighted updates added."""
    place = _base_place(spec.base or base, adapters)
    checkpoint = open_checkpoint(place)
    if checkpoint.format != "hf":
        raise CheckpointError(f"{place}: is {checkpoint.format}, not a whole model that adapters stand on")
    model = open_model(SourceSpec(path=str(place)), place, checkpoint)
    adapted: dict[str, list[Adapter]] = {}
    for adapter in adapters:
        for name, module in adapter.modules.items():
            info = model.infos.get(f"{name}.weight")
            if info is None or tuple(info.shape) != (module.out_features, module.in_features):
                shape = "it has not" if info is None else f"is {list(info.shape)} there"
                raise CheckpointError(
                    f"{adapter.path}: adapts {name} from {module.in_features} to "
                    f"{module.out_features} features, which {shape} (base {place})"
                )
            adapted.setdefault(f"{name}.weight", []).append(adapter)
    weights = {
        name: _added(spec, model, name, adapted[name]) if name in adapted else from_source(checkpoint.weights, info)
        for name, info in model.infos.items()
    }
    sources = (*adapters, beside_model(model))
    return model_output(
        spec, sources, model, weights, how="into_base", rows=_rows(adapters), text="",
        findings=[f"{len(adapted)} of {len(weights)} tensors get an update; the others are copies"],
    )  # fmt: skip


def _rows(adapters: Sequence[Adapter]) -> list[dict[str, Any]]:
    return [{"source": str(each.path), "weight": each.weight, "rank": each.details.settings.r} for each in adapters]


def _base_place(given: str | None, adapters: Sequence[Adapter]) -> Path:
    from runner.evaluation.base_models import find_base

    return find_base(adapters[0].checkpoint, given)


def _added(spec: MergeSpec, model: Source, name: str, having: Sequence[Adapter]) -> LazyTensor:
    """The base's tensor with the updates, row by row."""
    info = model.checkpoint.weights.infos[name]
    dtype = getattr(torch, spec.dtype) if spec.dtype else info.dtype
    rows, columns = info.shape
    step = max((1 << 20) // max(columns, 1), 1)

    def parts() -> Iterator[torch.Tensor]:
        weight = model.checkpoint.weights.read(name)
        factors = []
        for each in having:
            module = each.modules[name.removesuffix(".weight")]
            a, b = each.factors(module)
            factors.append((a, b, each.weight * module.scaling))
        for start in range(0, rows, step):
            total = weight[start : start + step].double()
            for a, b, factor in factors:
                total = total + factor * (b[start : start + step] @ a)
            yield from split(total.to(dtype))

    origin = " with ".join([f"{model.path}: {name}", *(str(each.path) for each in having)])
    return LazyTensor(origin=origin, dtype_name=name_of(dtype), shape=tuple(info.shape), parts=parts)
