"""What a merge will write: which layer comes from where, under which names, decided from headers alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.checkpoints.checkpoint import NptLayer
from runner.errors import CheckpointError, ConfigError
from runner.families.npt import checkpoint as npt_delta
from runner.merge import lazy_tensor as pieces
from runner.merge.lazy_tensor import Piece
from runner.merge.sources import Source, check_distinct, check_sizes
from runner.merge.spec import MergeSpec


@dataclass(frozen=True, kw_only=True)
class PlannedLayer:
    """One layer of the output. `how`: copy, average, linear or slerp; `weights[i]` is the share of `sources[i]`."""

    layer: NptLayer
    how: str
    sources: tuple[Source, ...]
    weights: tuple[float, ...]

    @property
    def origins(self) -> list[str]:
        """The checkpoints that its weights come from, each once, through earlier merges."""
        return list(dict.fromkeys(path for source in self.sources for path in source.origins(self.layer.layer)))


@dataclass(frozen=True, kw_only=True)
class PlannedTensor:
    """One tensor of the output and its `names` in the sources of its layer."""

    name: str
    names: tuple[str, ...]
    layer: PlannedLayer
    piece: Piece


@dataclass(frozen=True, kw_only=True)
class Conflict:
    """One layer that several sources have."""

    layer: int
    sources: tuple[Path, ...]
    resolution: str

    def summary(self) -> dict[str, Any]:
        """As JSON values."""
        return {"layer": self.layer, "sources": list(map(str, self.sources)), "resolution": self.resolution}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The weights of the output in their order: layers ascending, each as its parameters are declared."""

    sources: tuple[Source, ...]
    layers: tuple[PlannedLayer, ...]
    tensors: tuple[PlannedTensor, ...]
    conflicts: tuple[Conflict, ...]
    findings: tuple[str, ...]

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(tensor.piece.numel for tensor in self.tensors)


def plan_merge(spec: MergeSpec, sources: Sequence[Source]) -> Plan:
    """Decide what is merged. Raises ConfigError or CheckpointError where that is impossible or not allowed."""
    check_distinct(sources)
    check_sizes(sources)
    wanted = _wanted(spec, sources)
    if spec.rule == "layers":
        layers, conflicts = _united(spec, sources, wanted)
    else:
        layers, conflicts = _interpolated(spec, sources, wanted), []
    tensors = [tensor for layer in layers for tensor in _tensors(layer, spec.t)]
    return Plan(
        sources=tuple(sources),
        layers=tuple(layers),
        tensors=tuple(tensors),
        conflicts=tuple(conflicts),
        findings=(*_said(conflicts), *_dtypes(tensors)),
    )


def _wanted(spec: MergeSpec, sources: Sequence[Source]) -> list[int]:
    """The layers of the output, ascending."""
    union = sorted({layer for source in sources for layer in source.layers})
    for key, layers in (("merge.layers", spec.layers or ()), ("merge.drop", spec.drop)):
        for layer in layers:
            if layer not in union:
                raise ConfigError(f"{key}: no source has layer {layer}; there are {', '.join(map(str, union))}")
    wanted = [layer for layer in union if (spec.layers is None or layer in spec.layers) and layer not in spec.drop]
    if not wanted:
        raise ConfigError("merge: no layer is left; look at merge.layers, merge.drop and the layers of each source")
    return wanted


def _united(
    spec: MergeSpec, sources: Sequence[Source], wanted: Sequence[int]
) -> tuple[list[PlannedLayer], list[Conflict]]:
    planned, conflicts = [], []
    for layer in wanted:
        having = [source for source in sources if layer in source.layers]
        if len(having) == 1:
            planned.append(_copy(layer, having[0]))
            continue
        chosen = _resolved(spec.on_conflict, layer, having)
        planned.append(chosen)
        done = "averaged" if chosen.how == "average" else f"that of {chosen.sources[0].path} is taken"
        conflicts.append(
            Conflict(
                layer=layer,
                sources=tuple(source.path for source in having),
                resolution=f"{done} (merge.on_conflict={spec.on_conflict})",
            )
        )
    return planned, conflicts


def _resolved(on_conflict: str, layer: int, having: Sequence[Source]) -> PlannedLayer:
    if on_conflict == "error":
        raise CheckpointError(
            f"layer {layer} is in {_paths(having)}; choose layers for each source, or merge.on_conflict=first"
        )
    if on_conflict == "average":
        total = sum(source.weight for source in having)
        return _combined(layer, "average", having, [source.weight / total for source in having])
    if on_conflict == "newest":
        unknown = [source for source in having if source.layer_step(layer) is None]
        if unknown:
            raise CheckpointError(
                f"{unknown[0].path}: reports no step, so merge.on_conflict=newest cannot compare its layer {layer} "
                "with others; choose first or last"
            )
        return _copy(layer, max(having, key=lambda source: source.layer_step(layer) or 0))
    return _copy(layer, having[0 if on_conflict == "first" else -1])


def _interpolated(spec: MergeSpec, sources: Sequence[Source], wanted: Sequence[int]) -> list[PlannedLayer]:
    shares = interpolation_weights(spec)
    for layer in wanted:
        lacking = next((source for source in sources if layer not in source.layers), None)
        having = next(source for source in sources if layer in source.layers)
        if lacking is not None:
            raise CheckpointError(
                f"{lacking.path}: has no layer {layer}, which {having.path} has; merge={spec.rule} needs the same "
                "layers in all sources"
            )
    return [_combined(layer, spec.rule, sources, shares) for layer in wanted]


def interpolation_weights(spec: MergeSpec) -> tuple[float, ...]:
    """The share of each source under average, linear or slerp. Raises ConfigError for another number of sources."""
    if spec.rule == "average":
        if len(spec.sources) < 2:
            raise ConfigError("merge=average takes the mean of several checkpoints: give two sources or more")
        return spec.shares
    if len(spec.sources) != 2:
        raise ConfigError(
            f"merge={spec.rule} goes from one checkpoint to another: give two sources, not {len(spec.sources)}"
        )
    return 1 - spec.t, spec.t


def _copy(layer: int, source: Source) -> PlannedLayer:
    return PlannedLayer(layer=source.layers[layer], how="copy", sources=(source,), weights=(1.0,))


def _combined(layer: int, how: str, sources: Sequence[Source], weights: Sequence[float]) -> PlannedLayer:
    """A layer computed from several, which must be of one kind. Raises CheckpointError."""
    first, *others = sources
    for source in others:
        a, b = (_kind(each.layers[layer]) for each in (first, source))
        if a != b:
            raise CheckpointError(
                f"layer {layer} is {a} in {first.path} and {b} in {source.path}: {how} needs the same kind, rank and "
                "number of ranks"
            )
    return PlannedLayer(layer=first.layers[layer], how=how, sources=tuple(sources), weights=tuple(weights))


def _kind(layer: NptLayer) -> str:
    return f"{layer.modulation}, r {layer.np_rank}, k {layer.num_ranks}"


def _tensors(planned: PlannedLayer, t: float) -> list[PlannedTensor]:
    """The layer's tensors, in the order in which its parameters are declared, under the names that are written."""
    layer = planned.layer
    tensors = []
    for projection, matrices in layer.keys.items():
        for matrix in npt_delta.MATRICES:
            for rank in range(len(matrices[matrix])):
                names = tuple(source.layers[layer.layer].keys[projection][matrix][rank] for source in planned.sources)
                name = npt_delta.key(layer.layer, layer.modulation, projection, matrix, rank, layer.num_ranks)
                piece = _piece(planned, names, t)
                tensors.append(PlannedTensor(name=name, names=names, layer=planned, piece=piece))
    return tensors


def _piece(planned: PlannedLayer, names: Sequence[str], t: float) -> Piece:
    sources = [source.checkpoint.weights for source in planned.sources]
    found = [pieces.from_source(source, source.infos[name]) for source, name in zip(sources, names, strict=True)]
    if planned.how == "copy":
        return found[0]
    if planned.how == "average":
        return pieces.average(found, planned.weights)
    first, second = found
    return pieces.linear(first, second, t) if planned.how == "linear" else pieces.slerp(first, second, t)


def _said(conflicts: Sequence[Conflict]) -> list[str]:
    return [f"layer {c.layer} is in {' and '.join(map(str, c.sources))}: {c.resolution}" for c in conflicts]


def _dtypes(tensors: Sequence[PlannedTensor]) -> list[str]:
    """What is said of layers that are computed from other dtypes than they are stored in, and of several dtypes."""
    said: dict[str, None] = {}
    for tensor in tensors:
        found = {
            str(source.checkpoint.weights.infos[name].dtype).removeprefix("torch.")
            for source, name in zip(tensor.layer.sources, tensor.names, strict=True)
        }
        if len(found) > 1:
            written = str(tensor.piece.dtype).removeprefix("torch.")
            layer = tensor.layer.layer.layer
            said[f"layer {layer} is stored as {' and '.join(sorted(found))}: it is written as {written}"] = None
    dtypes = sorted({str(tensor.piece.dtype).removeprefix("torch.") for tensor in tensors})
    if len(dtypes) > 1:
        said[f"layers differ in dtype: {', '.join(dtypes)}"] = None
    return list(said)


def _paths(sources: Sequence[Source]) -> str:
    return " and ".join(str(source.path) for source in sources)


def layer_sources(plan: Plan) -> Mapping[int, Any]:
    """Layer → the checkpoint that it comes from, through earlier merges; a list where it comes from several."""
    return {
        planned.layer.layer: planned.origins[0] if len(planned.origins) == 1 else planned.origins
        for planned in plan.layers
    }


def layer_steps(plan: Plan) -> dict[int, int]:
    """Layer → the step to which it was trained, the largest where it comes from several; without those unknown."""
    found = {}
    for planned in plan.layers:
        layer = planned.layer.layer
        known = [step for source in planned.sources if (step := source.layer_step(layer)) is not None]
        if known:
            found[layer] = max(known)
    return found


def merged_from(plan: Plan) -> list[str]:
    """The checkpoints that were merged, each once, through earlier merges."""
    return list(dict.fromkeys(path for source in plan.sources for path in source.merged_from()))
