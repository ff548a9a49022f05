"""Averaging GPT checkpoints of one architecture, and going along a line or an arc between two of them."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from runner.checkpoints.checkpoint import Checkpoint
from runner.errors import CheckpointError, ConfigError
from runner.families.gpt.checkpoint import FAMILY, NAMES, STATE, Provenance, metadata, provenance
from runner.families.gpt.layouts import GptDetails
from runner.families.gpt.save import WEIGHT_FILES, noted
from runner.merge import lazy_tensor
from runner.merge.lazy_tensor import LazyTensor
from runner.merge.plan import (
    JsonObject,
    MergeOutput,
    Source,
    TensorFile,
    check_distinct,
    furthest,
    interpolation_weights,
)
from runner.merge.spec import MergeSpec, SourceSpec

_SIZES = ("num_layers", "model_dim", "vocab_size", "head_rows", "head_dim")


def plan_merge(
    spec: MergeSpec, paths: Sequence[Path], checkpoints: Sequence[Checkpoint], base: str | None, output: Path
) -> MergeOutput:
    """Plan the average of `checkpoints` from `paths`; a GPT is complete, so `base` and `output` change nothing.

    Raises ConfigError or CheckpointError where it is impossible or not allowed.
    """
    sources = [_open_source(*each) for each in zip(spec.sources, paths, checkpoints, strict=True)]
    if spec.layers is not None or spec.drop:
        raise ConfigError("merge.layers and merge.drop are for NPT layers; GPT checkpoints are averaged as a whole")
    how, shares, findings = _rule(spec)
    check_distinct(sources)
    for source in sources[1:]:
        _check_same(sources[0], source)
    leader = furthest(sources)
    details: GptDetails = leader.checkpoint.details
    weights = {name: _combined(how, sources, name, shares, spec.t) for name in details.keys}
    origins = [provenance(source.checkpoint.weights) for source in sources]
    origin = Provenance(step=leader.step, code=origins[sources.index(leader)].code)
    origin = noted(origin, details, always=spec.format == "safetensors")
    names = [str(source.path) for source in sources]
    rows = [
        {"source": name, "weight": share, "step": source.step, "val_loss": each.val_loss}
        for name, share, source, each in zip(names, shares, sources, origins, strict=True)
    ]
    return MergeOutput(
        format=leader.checkpoint.format,
        family=FAMILY,
        sources=tuple(sources),
        weights=weights,
        tensor_files=(_file(spec.format, weights, origin),),
        texts={},
        summary={
            "merged_from": names,
            "how": how,
            "averaged": rows,
            "total_parameters": sum(tensor.numel for tensor in weights.values()),
            "checkpoint_keys": len(weights),
            "global_step": leader.step,
            "conflicts": [],
        },
        details={
            "expected_layers": list(range(details.num_layers)),
            "how": how,
            "averaged": rows,
            "sources": {str(layer): names for layer in range(details.num_layers)},
        },
        step=leader.step,
        findings=(*findings, *_said(sources, weights)),
        content=f"the {how} of what the sources hold",
        read_back=_read_back,
    )


def _open_source(spec: SourceSpec, path: Path, checkpoint: Checkpoint) -> Source:
    """A GPT as a source: all of it. Raises ConfigError where layers or experts of it are asked for."""
    for key in ("layers", "experts"):
        if getattr(spec, key) is not None:
            raise ConfigError(f"{path}: a GPT checkpoint is averaged as a whole; leave {key}: […] out")
    checkpoint.require_complete()
    return Source(spec=spec, path=path, checkpoint=checkpoint, files=checkpoint.weights.files)


def _read_back(written: Checkpoint) -> tuple[JsonObject, str]:
    found = list(range(written.details.num_layers))
    return {"found_layers": found}, f"reads back as planned: {written.evidence}"


def _rule(spec: MergeSpec) -> tuple[str, tuple[float, ...], list[str]]:
    """How the sources are combined and the share of each."""
    if spec.rule != "layers":
        return spec.rule, interpolation_weights(spec), []
    if spec.on_conflict not in ("first", "average"):
        raise ConfigError(
            f"merge.on_conflict={spec.on_conflict}: complete models have all layers in common; choose merge=average, "
            "linear or slerp"
        )
    if len(spec.sources) < 2:
        raise ConfigError("GPT checkpoints are averaged: give two sources or more")
    said = "GPT checkpoints are complete models with all layers in common: they are averaged (merge=average)"
    return "average", spec.shares, [said]


def _check_same(first: Source, other: Source) -> None:
    """Raise CheckpointError where two sources are not of one dialect and size."""
    a: GptDetails = first.checkpoint.details
    b: GptDetails = other.checkpoint.details
    if a.record != b.record:
        one, another = (NAMES.get(each.record.name, each.record.name) for each in (a, b))
        raise CheckpointError(
            f"{first.path} is {one}, {other.path} {another}: they compute different functions and cannot be averaged"
        )
    if a.before_split != b.before_split:
        early, late = (first, other) if a.before_split else (other, first)
        raise CheckpointError(
            f"{early.path} was saved before embedding and head part, {late.path} after: their embeddings have no mean"
        )
    sizes = [{name: getattr(details, name) for name in _SIZES} for details in (a, b)]
    if differing := [name for name in _SIZES if sizes[0][name] != sizes[1][name]]:
        shown = [", ".join(f"{name} {size[name]}" for name in differing) for size in sizes]
        raise CheckpointError(
            f"{first.path} has {shown[0]}, {other.path} {shown[1]}: only GPTs of one architecture are averaged"
        )


def _combined(how: str, sources: Sequence[Source], name: str, shares: Sequence[float], t: float) -> LazyTensor:
    weights = [source.checkpoint.weights for source in sources]
    found = [lazy_tensor.from_source(each, each.infos[name]) for each in weights]
    if name == "scalars" and len({piece.shape for piece in found}) > 1:
        # Padded for different numbers of training processes: padding has no meaning.
        used = range(sources[0].checkpoint.details.used_scalars)
        found = [lazy_tensor.rows([(tensor, used)]) for tensor in found]
    return lazy_tensor.combined(how, found, shares, t)


def _file(layout: str, weights: dict[str, LazyTensor], origin: Provenance) -> TensorFile:
    name = WEIGHT_FILES[layout == "safetensors"]
    if layout == "safetensors":
        return TensorFile(name=name, value=weights, metadata=metadata(origin))
    beside: dict[str, Any] = {name: value for name, value in asdict(origin).items() if value is not None}
    return TensorFile(name=name, value={**beside, STATE: weights})


def _said(sources: Sequence[Source], weights: dict[str, LazyTensor]) -> list[str]:
    """What happens to precision, optimizers and validation losses."""
    dtypes = sorted({tensor.dtype_name for tensor in weights.values()})
    said = [f"computed in float64 and rounded to the dtypes in which the weights are stored: {', '.join(dtypes)}"]
    differing: dict[str, None] = {}
    for name, tensor in weights.items():
        found = {source.checkpoint.weights.infos[name].dtype_name for source in sources}
        if len(found) > 1:
            stored = " and ".join(sorted(found))
            differing[f"some weights are stored as {stored}: written as {tensor.dtype_name}"] = None
    said += differing
    padded = {info.numel: None for source in sources if (info := source.checkpoint.weights.infos.get("scalars"))}
    if len(padded) > 1:
        said.append(f"scalars are padded to {' and '.join(map(str, padded))} values: they are written without padding")
    with_state = [str(source.path) for source in sources if source.checkpoint.training.get("optimizers")]
    if with_state:
        said.append(f"the optimizers of {' and '.join(with_state)} are not averaged: training goes on with fresh ones")
    said.append("validation losses are those of the sources; that of the average is not known until it is measured")
    codes = {source.checkpoint.training.get("code_sha256") for source in sources}
    if len(codes) > 1:
        said.append("the sources carry different training scripts; that of the furthest is kept")
    return said
