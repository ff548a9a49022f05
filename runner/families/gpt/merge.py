"""Averaging GPT checkpoints of one architecture, and going along a line or an arc between two of them."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from runner.checkpoints.checkpoint import Checkpoint
from runner.errors import CheckpointError, ConfigError
from runner.families.gpt.checkpoint import FAMILY, STATE, Provenance, metadata, provenance
from runner.families.gpt.layouts import SCALARS, GptDetails
from runner.families.gpt.save import WEIGHT_FILES
from runner.merge import lazy_tensor as pieces
from runner.merge.execute import TensorFile
from runner.merge.files import Files, OpenedSource
from runner.merge.lazy_tensor import Piece
from runner.merge.plan import interpolation_weights
from runner.merge.sources import check_distinct
from runner.merge.spec import MergeSpec, SourceSpec

_SIZES = ("num_layers", "model_dim", "vocab_size", "head_rows")


def open_gpt_source(spec: SourceSpec, path: Path, checkpoint: Checkpoint) -> OpenedSource:
    """A GPT as a source: all of it. Raises ConfigError where layers or experts of it are asked for."""
    for key in ("layers", "experts"):
        if getattr(spec, key) is not None:
            raise ConfigError(f"{path}: a GPT checkpoint is averaged as a whole; leave {key}: […] out")
    checkpoint.require_complete()
    return OpenedSource(spec=spec, path=path, checkpoint=checkpoint, files=checkpoint.weights.files)


def gather_gpt(spec: MergeSpec, sources: Sequence[OpenedSource]) -> Files:
    """Plan the average. Raises ConfigError or CheckpointError where it is impossible or not allowed."""
    if spec.layers is not None or spec.drop:
        raise ConfigError("merge.layers and merge.drop are for NPT layers; GPT checkpoints are averaged as a whole")
    how, shares, findings = _rule(spec)
    check_distinct(sources)
    for source in sources[1:]:
        _check_same(sources[0], source)
    leader = max(sources, key=lambda source: -1 if source.step is None else source.step)
    details: GptDetails = leader.checkpoint.details
    weights = {name: _combined(how, sources, name, shares, spec.t) for name in details.keys}
    origins = [provenance(source.checkpoint.weights) for source in sources]
    origin = Provenance(step=leader.step, code=origins[sources.index(leader)].code)
    paths = [str(source.path) for source in sources]
    parameters = sum(piece.numel for piece in weights.values())
    rows = [
        {"source": path, "weight": share, "step": source.step, "val_loss": each.val_loss}
        for path, share, source, each in zip(paths, shares, sources, origins, strict=True)
    ]
    return Files(
        format=leader.checkpoint.format,
        family=FAMILY,
        sources=tuple(sources),
        weights=weights,
        tensor_files=(_file(spec.format, weights, origin),),
        texts={},
        summary={
            "merged_from": paths,
            "how": how,
            "averaged": rows,
            "total_parameters": parameters,
            "checkpoint_keys": len(weights),
            "global_step": leader.step,
        },
        details={
            "expected_layers": list(range(details.num_layers)),
            "how": how,
            "averaged": rows,
            "sources": {str(layer): paths for layer in range(details.num_layers)},
        },
        step=leader.step,
        findings=(*findings, *_said(sources, weights)),
        computed=True,
    )


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


def _check_same(first: OpenedSource, other: OpenedSource) -> None:
    """Raise CheckpointError where two sources are not of one dialect and size."""
    a: GptDetails = first.checkpoint.details
    b: GptDetails = other.checkpoint.details
    if a.dialect != b.dialect:
        raise CheckpointError(
            f"{first.path} is gpt_{a.dialect}, {other.path} gpt_{b.dialect}: they compute different functions and "
            "cannot be averaged"
        )
    sizes = [asdict(details) for details in (a, b)]
    if differing := [name for name in _SIZES if sizes[0][name] != sizes[1][name]]:
        shown = [", ".join(f"{name} {size[name]}" for name in differing) for size in sizes]
        raise CheckpointError(
            f"{first.path} has {shown[0]}, {other.path} {shown[1]}: only GPTs of one architecture are averaged"
        )


def _combined(how: str, sources: Sequence[OpenedSource], name: str, shares: Sequence[float], t: float) -> Piece:
    weights = [source.checkpoint.weights for source in sources]
    found = [pieces.from_source(each, each.infos[name]) for each in weights]
    if name == SCALARS and len({piece.shape for piece in found}) > 1:
        # Padded for different numbers of training processes: padding has no meaning.
        used = range(sources[0].checkpoint.details.used_scalars)
        found = [pieces.rows([(piece, used)]) for piece in found]
    if how == "average":
        return pieces.average(found, shares)
    first, second = found
    return pieces.slerp(first, second, t) if how == "slerp" else pieces.linear(first, second, t)


def _file(layout: str, weights: dict[str, Piece], origin: Provenance) -> TensorFile:
    name = WEIGHT_FILES[layout == "safetensors"]
    if layout == "safetensors":
        return TensorFile(name=name, value=weights, metadata=metadata(origin))
    beside: dict[str, Any] = {name: value for name, value in asdict(origin).items() if value is not None}
    return TensorFile(name=name, value={**beside, STATE: weights})


def _said(sources: Sequence[OpenedSource], weights: dict[str, Piece]) -> list[str]:
    """What happens to precision, optimizers and validation losses."""
    dtypes = sorted({str(piece.dtype).removeprefix("torch.") for piece in weights.values()})
    said = [f"computed in float64 and rounded to the dtypes in which the weights are stored: {', '.join(dtypes)}"]
    differing: dict[str, None] = {}
    for name, piece in weights.items():
        found = {str(s.checkpoint.weights.infos[name].dtype).removeprefix("torch.") for s in sources}
        if len(found) > 1:
            written = str(piece.dtype).removeprefix("torch.")
            differing[f"some weights are stored as {' and '.join(sorted(found))}: written as {written}"] = None
    said += differing
    padded = {source.checkpoint.weights.infos[SCALARS].numel: None for source in sources}
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
