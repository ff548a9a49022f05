"""Merging npt_delta checkpoints: which layer comes from where, what stands beside the weights, and whether each layer
computes in the output what it computed in its source."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.checkpoints.checkpoint import Checkpoint, NptLayer
from runner.errors import CheckpointError, ConfigError, RunnerError
from runner.families.npt import checkpoint as npt_delta
from runner.files.file_type import Kind, kind_of
from runner.merge import lazy_tensor
from runner.merge.lazy_tensor import LazyTensor
from runner.merge.plan import (
    JsonObject, MergedTensor, MergeOutput, Source, TensorFile, base_written, check_bases,
    check_distinct, differing_dtypes, furthest, interpolation_weights, latest_step,
)  # fmt: skip
from runner.merge.spec import MergeSpec, SourceSpec

if TYPE_CHECKING:
    import torch

    from runner.evaluation.base_models import Base
    from runner.merge.training_state import SavedState

_STATES = (npt_delta.TRAINING_STATE, npt_delta.MULTI_LAYER_STATE)


@dataclass(frozen=True, kw_only=True)
class NptSource(Source):
    """One npt_delta checkpoint and the layers that are taken from it.

    `weight`: its share of an average, not yet made to sum to 1 with those of others.
    """

    layers: Mapping[int, NptLayer]
    weight: float

    @property
    def config(self) -> JsonObject:
        """Its config.json; {} where there is none."""
        return self.checkpoint.training["config"]

    @property
    def merge_info(self) -> JsonObject:
        """What an earlier merge left in it; {} where it is none."""
        info = self.config.get("merge_info") or self.checkpoint.training["state"].get("merge_info")
        return info if isinstance(info, Mapping) else {}

    def origins(self, layer: int) -> list[str]:
        """Where its layer comes from: itself, or what was merged into it before."""
        known = self.merge_info.get("layer_sources")
        known = known if isinstance(known, Mapping) else {}
        found = known.get(layer, known.get(str(layer), str(self.path)))
        return [str(path) for path in found] if isinstance(found, (list, tuple)) else [str(found)]

    def layer_step(self, layer: int) -> int | None:
        """The step to which its layer was trained: its own, or that of what was merged into it before."""
        known = self.merge_info.get("layer_steps")
        found = known.get(layer, known.get(str(layer))) if isinstance(known, Mapping) else None
        return found if type(found) is int else self.step

    def merged_from(self) -> list[str]:
        """The checkpoints that it stands for: itself, or those that were merged into it."""
        found = self.merge_info.get("merged_from")
        return [str(path) for path in found] if isinstance(found, (list, tuple)) and found else [str(self.path)]


@dataclass(frozen=True, kw_only=True)
class PlannedLayer:
    """One layer of the output. `how`: copy, average, linear or slerp; `weights[i]` is the share of `sources[i]`."""

    layer: NptLayer
    how: str
    sources: tuple[NptSource, ...]
    weights: tuple[float, ...]

    @property
    def number(self) -> int:
        """Its place in the model."""
        return self.layer.layer

    @property
    def origins(self) -> str | list[str]:
        """The checkpoint that its weights come from, through earlier merges; a list where there are several."""
        paths = list(dict.fromkeys(path for source in self.sources for path in source.origins(self.number)))
        return paths[0] if len(paths) == 1 else paths

    @property
    def step(self) -> int | None:
        """The step to which it was trained, the largest where it comes from several."""
        steps = (source.layer_step(self.number) for source in self.sources)
        return max((step for step in steps if step is not None), default=None)

    def summary(self) -> dict[str, Any]:
        """Its row of merge_summary.json."""
        row = {name: value for name, value in self.layer.summary().items() if name != "layer"}
        shares = {str(source.path): weight for source, weight in zip(self.sources, self.weights, strict=True)}
        return row | {"how": self.how, "sources": shares}


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """The weights of the output in their order: layers ascending, each as its parameters are declared.

    `conflicts`: {layer, sources, resolution} of each layer that several sources have.
    """

    sources: tuple[NptSource, ...]
    layers: tuple[PlannedLayer, ...]
    tensors: tuple[MergedTensor, ...]
    conflicts: tuple[JsonObject, ...]
    findings: tuple[str, ...]

    def merge_info(self) -> dict[str, Any]:
        """Where the merged layers come from, as config.json and the training state say it."""
        return {
            "merged_from": list(dict.fromkeys(path for source in self.sources for path in source.merged_from())),
            "merged_layers": [layer.number for layer in self.layers],
            "layer_sources": {layer.number: layer.origins for layer in self.layers},
            "layer_steps": {layer.number: layer.step for layer in self.layers if layer.step is not None},
        }


def plan_merge(
    spec: MergeSpec, paths: Sequence[Path], checkpoints: Sequence[Checkpoint], base: str | None, output: Path
) -> MergeOutput:
    """Plan a merge of `checkpoints` from `paths` into `output`, which stand on `base` or on the bases that they name.

    Raises CheckpointError or ConfigError where it is impossible or not allowed.
    """
    sources = [open_source(*each) for each in zip(spec.sources, paths, checkpoints, strict=True)]
    plan = plan_layers(spec, sources, base)
    info = plan.merge_info()
    states = _states(plan, info)
    training = states.get(npt_delta.TRAINING_STATE)
    config, config_findings = _config(plan, info, base, output)
    weights = {tensor.name: tensor.tensor for tensor in plan.tensors}
    taken = {str(layer.number): [str(source.path) for source in layer.sources] for layer in plan.layers}
    numbers = [layer.number for layer in plan.layers]
    return MergeOutput(
        format=npt_delta.NAME,
        family=npt_delta.FAMILY,
        sources=plan.sources,
        weights=weights,
        tensor_files=(
            TensorFile(name=f"npt_weights.{spec.format}", value=weights),
            *(TensorFile(name=name, value=state.content, finite=False) for name, state in states.items()),
        ),
        texts={npt_delta.CONFIG: config},
        summary={
            **_with_text_keys(info),
            "layers": {str(layer.number): layer.summary() for layer in plan.layers},
            "total_parameters": sum(tensor.numel for tensor in weights.values()),
            "checkpoint_keys": len(weights),
            "global_step": furthest(sources).step,
            "conflicts": plan.conflicts,
            "optimizer_differences": training.differences if training else (),
        },
        details={
            "expected_layers": numbers,
            "found_layers": None,
            "sources": {number: paths[0] if len(paths) == 1 else paths for number, paths in taken.items()},
        },
        step=latest_step(sources),
        layers=tuple(
            {**layer.layer.summary(), "how": layer.how, "sources": taken[str(layer.number)]} for layer in plan.layers
        ),
        findings=(*plan.findings, *(said for state in states.values() for said in state.findings), *config_findings),
        conflicts=plan.conflicts,
        read_back=partial(_read_back, plan),
        check_functions=partial(check_functions, plan),
    )


def open_source(spec: SourceSpec, path: Path, checkpoint: Checkpoint) -> NptSource:
    """`checkpoint`, found at `path`, with the layers that `spec` takes of it.

    Raises CheckpointError where it holds no NPT weights or not all of them, ConfigError for a layer that it lacks.
    """
    if checkpoint.format != npt_delta.NAME:
        raise CheckpointError(
            f"{path}: No NPT layers to merge: its format is {checkpoint.format} ({checkpoint.evidence}), not npt_delta"
        )
    if spec.experts is not None:
        raise ConfigError(f"{path}: has no experts, it is an npt_delta; choose layers: […] of it")
    checkpoint.require_complete()
    layers = {layer.layer: layer for layer in checkpoint.layers}
    for layer in spec.layers or ():
        if layer not in layers:
            raise ConfigError(f"{path}: has no NPT layer {layer}; it has {', '.join(map(str, layers))}")
    beside = [checkpoint.directory / name for name in (*_STATES, npt_delta.CONFIG)]
    return NptSource(
        spec=spec,
        path=path,
        checkpoint=checkpoint,
        files=(*checkpoint.weights.files, *(file for file in beside if file.is_file())),
        order=optimizer_order(checkpoint),
        layers={index: layer for index, layer in layers.items() if spec.layers is None or index in spec.layers},
        weight=1.0 if spec.weight is None else spec.weight,
    )


def optimizer_order(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The names by the index under which an optimizer state beside them counts them.

    That is their order in the file, but safetensors' own writer sorts names, dtype by dtype, and so loses it: where
    they are sorted, it is the order that the format's parameters have.
    """
    infos = checkpoint.weights.infos
    names = tuple(infos)
    dtypes = list(dict.fromkeys(infos[name].dtype_name for name in names))
    by_dtype = sorted(names, key=lambda name: (dtypes.index(infos[name].dtype_name), name))
    if kind_of(checkpoint.weights.files[0]) is not Kind.SAFETENSORS or list(names) not in (sorted(names), by_dtype):
        return names
    return tuple(
        name
        for layer in checkpoint.layers
        for matrices in layer.keys.values()
        for names_of_matrix in matrices.values()
        for name in names_of_matrix
    )


def plan_layers(spec: MergeSpec, sources: Sequence[NptSource], base: str | None = None) -> LayerPlan:
    """Decide what is merged. Raises ConfigError or CheckpointError where that is impossible or not allowed."""
    check_distinct(sources)
    _check_sizes(sources)
    wanted = _wanted(spec, sources)
    conflicts: list[JsonObject] = []
    if spec.rule == "layers":
        layers = [_united(spec.on_conflict, layer, sources, conflicts) for layer in wanted]
    else:
        layers = _interpolated(spec, sources, wanted)
    tensors = [tensor for layer in layers for tensor in _tensors(layer, spec.t)]
    said = [f"layer {c['layer']} is in {' and '.join(c['sources'])}: {c['resolution']}" for c in conflicts]
    said += [*differing_dtypes(tensors), *check_bases(sources, base, _check_fit)]
    return LayerPlan(
        sources=tuple(sources),
        layers=tuple(layers),
        tensors=tuple(tensors),
        conflicts=tuple(conflicts),
        findings=tuple(said),
    )


def _check_sizes(sources: Sequence[NptSource]) -> None:
    """Raise CheckpointError where layers are made for different hidden or MLP sizes: they have different bases."""
    found = [(source, layer) for source in sources for layer in source.layers.values()]
    for source, b in found:
        first, a = found[0]
        if (a.hidden_size, a.intermediate_size) != (b.hidden_size, b.intermediate_size):
            raise CheckpointError(
                f"{source.path}: layer {b.layer} is made for hidden size {b.hidden_size} and MLP size "
                f"{b.intermediate_size}, but layer {a.layer} of {first.path} for {a.hidden_size} and "
                f"{a.intermediate_size}; they stand on different base models and cannot be merged"
            )


def _check_fit(source: NptSource, base: Path, config: JsonObject) -> None:
    """Raise CheckpointError where the base's config.json says that a layer cannot stand on it."""
    depth = config.get("num_hidden_layers")
    for layer in source.layers.values():
        for key, size in (("hidden_size", layer.hidden_size), ("intermediate_size", layer.intermediate_size)):
            if config.get(key) not in (None, size):
                raise CheckpointError(
                    f"{source.path}: layer {layer.layer} is made for {key} {size}, but its base {base} has "
                    f"{config[key]}; give the right one as base="
                )
        if isinstance(depth, int) and layer.layer >= depth:
            raise CheckpointError(
                f"{source.path}: has NPT layer {layer.layer}, but its base {base} has only the layers 0 to "
                f"{depth - 1}; give the right one as base="
            )


def _wanted(spec: MergeSpec, sources: Sequence[NptSource]) -> list[int]:
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


def _united(on_conflict: str, layer: int, sources: Sequence[NptSource], conflicts: list[JsonObject]) -> PlannedLayer:
    """One layer of the union; `conflicts` receives what was decided where several sources have it."""
    having = [source for source in sources if layer in source.layers]
    chosen = _resolved(on_conflict, layer, having)
    if len(having) == 1:
        return chosen
    done = "averaged" if chosen.how == "average" else f"that of {chosen.sources[0].path} is taken"
    resolution = f"{done} (merge.on_conflict={on_conflict})"
    paths = [str(source.path) for source in having]
    conflicts.append({"layer": layer, "sources": paths, "resolution": resolution})
    return chosen


def _resolved(on_conflict: str, layer: int, having: Sequence[NptSource]) -> PlannedLayer:
    if len(having) == 1 or on_conflict == "first":
        return _copy(layer, having[0])
    if on_conflict == "last":
        return _copy(layer, having[-1])
    if on_conflict == "error":
        paths = " and ".join(str(source.path) for source in having)
        raise CheckpointError(f"layer {layer} is in {paths}; choose layers for each source, or merge.on_conflict=first")
    if on_conflict == "average":
        total = sum(source.weight for source in having)
        return _combined(layer, "average", having, [source.weight / total for source in having])
    unknown = next((source for source in having if source.layer_step(layer) is None), None)
    if unknown is not None:
        raise CheckpointError(
            f"{unknown.path}: reports no step, so merge.on_conflict=newest cannot compare its layer {layer} with "
            "others; choose first or last"
        )
    return _copy(layer, max(having, key=lambda source: source.layer_step(layer) or 0))


def _interpolated(spec: MergeSpec, sources: Sequence[NptSource], wanted: Sequence[int]) -> list[PlannedLayer]:
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


def _copy(layer: int, source: NptSource) -> PlannedLayer:
    return PlannedLayer(layer=source.layers[layer], how="copy", sources=(source,), weights=(1.0,))


def _combined(layer: int, how: str, sources: Sequence[NptSource], weights: Sequence[float]) -> PlannedLayer:
    """A layer computed from several, which must be of one kind. Raises CheckpointError."""

    def kind(source: NptSource) -> str:
        found = source.layers[layer]
        return f"{found.modulation}, r {found.np_rank}, k {found.num_ranks}"

    first, *others = sources
    for source in others:
        if kind(first) != kind(source):
            raise CheckpointError(
                f"layer {layer} is {kind(first)} in {first.path} and {kind(source)} in {source.path}: {how} needs the "
                "same kind, rank and number of ranks"
            )
    return PlannedLayer(layer=first.layers[layer], how=how, sources=tuple(sources), weights=tuple(weights))


def _tensors(planned: PlannedLayer, t: float) -> list[MergedTensor]:
    """The layer's tensors, in the order in which its parameters are declared, under the names that are written."""
    layer = planned.layer
    tensors = []
    for projection, matrices in layer.keys.items():
        for matrix in npt_delta.MATRICES:
            for rank in range(len(matrices[matrix])):
                names = tuple(source.layers[layer.layer].keys[projection][matrix][rank] for source in planned.sources)
                tensors.append(
                    MergedTensor(
                        name=npt_delta.key(layer.layer, layer.modulation, projection, matrix, rank, layer.num_ranks),
                        tensor=_tensor(planned, names, t),
                        layer=layer.layer,
                        how=planned.how,
                        sources=planned.sources,
                        names=names,
                        weights=planned.weights,
                    )
                )
    return tensors


def _tensor(planned: PlannedLayer, names: Sequence[str], t: float) -> LazyTensor:
    weights = [source.checkpoint.weights for source in planned.sources]
    found = [lazy_tensor.from_source(each, each.infos[name]) for each, name in zip(weights, names, strict=True)]
    if planned.how == "copy":
        return found[0]
    return lazy_tensor.combined(planned.how, found, planned.weights, t)


def _states(plan: LayerPlan, info: JsonObject) -> "dict[str, SavedState]":
    """The files beside the weights, by name; where no source has any, torch is not needed."""
    if not any((source.checkpoint.directory / name).is_file() for source in plan.sources for name in _STATES):
        return {}
    from runner.merge.training_state import merge_training_states

    training = merge_training_states(plan.sources, plan.tensors, npt_delta.TRAINING_STATE, info)
    return {name: state for name, state in zip(_STATES, (training, _multi_layer_state(plan)), strict=True) if state}


def _multi_layer_state(plan: LayerPlan) -> "SavedState | None":
    """Layers, weights and curriculum of all sources; the curriculum and counters are those of the furthest.

    None where no source has one. Raises CheckpointError for a damaged one.
    """
    from runner.merge.optimizer_state import same
    from runner.merge.training_state import SavedState, read_state, to_serializable

    states = {id(source): read_state(source, npt_delta.MULTI_LAYER_STATE) for source in plan.sources}
    having = [source for source in plan.sources if states[id(source)] is not None]
    if not having:
        return None
    leader = furthest(having)
    content, findings = to_serializable(states[id(leader)], leader)
    weights = {}
    for planned in plan.layers:
        number = planned.number
        known = [to_serializable(_layer_weight(states[id(s)] or {}, number), s)[0] for s in planned.sources]
        given = [weight for weight in known if weight is not None]
        if not given:
            findings.append(f"layer {number}: no source gives it a weight in the loss; 1.0 is written")
        # Several sources where the layer is computed from them; their weights as a rule agree.
        weights[number] = given[0] if given else 1.0
    content |= {"layers_to_train": list(weights), "layer_weights": weights}
    schedules = {id(source): (states[id(source)] or {}).get("curriculum_schedule") for source in having}
    for source in having:
        if not same(schedules[id(source)], schedules[id(leader)]):
            findings.append(f"{source.path}: has another curriculum; that of {leader.path}, the furthest, is kept")
    return SavedState(content=content, findings=tuple(findings))


def _layer_weight(state: JsonObject, layer: int) -> object:
    weights = state.get("layer_weights")
    return weights.get(layer, weights.get(str(layer))) if isinstance(weights, Mapping) else None


def _config(plan: LayerPlan, info: JsonObject, base: str | None, output: Path) -> tuple[dict[str, Any], Sequence[str]]:
    """The first source's config.json with `info`, its base named so that it is found from `output`; what to say."""
    first = next((source for source in plan.sources if source.config), plan.sources[0])
    content: dict[str, Any] = {name: value for name, value in first.config.items() if name != "merge_info"}
    name, findings = base_written(plan.sources, base, output)
    content |= {} if name is None else {"model_name": name}
    content["merge_info"] = {**info, "layer_sources": _with_text_keys(info)["layer_sources"]}
    return content, findings


def _with_text_keys(info: JsonObject) -> dict[str, Any]:
    """As JSON has it: layers as text where they are keys."""
    return {
        name: {str(layer): each for layer, each in value.items()} if isinstance(value, Mapping) else value
        for name, value in info.items()
    }


def _read_back(plan: LayerPlan, written: Checkpoint) -> tuple[JsonObject, str]:
    """The layers that a reader finds. Raises RunnerError unless they are those that were planned."""
    planned, found = (
        [layer.summary() for layer in layers] for layers in ([p.layer for p in plan.layers], written.layers)
    )
    if found != planned:
        raise RunnerError(f"{written.path}: verification failed: its layers read back as {found} instead of {planned}")
    numbers = [layer.layer for layer in written.layers]
    return {"found_layers": numbers}, f"reads back with {_layers(numbers)}, as planned"


def _layers(numbers: Sequence[int]) -> str:
    return f"layer{'' if len(numbers) == 1 else 's'} {', '.join(map(str, numbers))}"


def check_functions(plan: LayerPlan, written: Checkpoint, base: "Base", prompts: "Mapping[str, torch.Tensor]") -> str:
    """Whether each layer gives, alone in NPT mode, the logits of its source on all `prompts`, bit for bit; in words.

    Layers that were computed from several sources have no source to equal. Raises RunnerError where a bit differs.
    """
    import torch

    from runner.evaluation.forward import continue_from, logits
    from runner.evaluation.reference import Reference
    from runner.families.npt.model import build_npt

    merged, reference = build_npt(written, base), Reference(base.model, base.key)
    checked: list[int] = []
    for source in plan.sources:
        layers = [p.number for p in plan.layers if p.how == "copy" and p.sources[0] is source]
        model = build_npt(source.checkpoint, base) if layers else merged
        for layer, (text, token_ids) in product(layers, prompts.items()):
            known = reference.trace(token_ids, [layer])  # the layers below give the base's hidden states
            bits = []
            for each in (merged, model):
                with each.npt_mode({layer}):
                    bits.append(logits(each, continue_from(each, known, layer)).contiguous().view(torch.uint8))
            if not torch.equal(*bits):
                raise RunnerError(
                    f"{written.path}: verification failed: on {text!r}, layer {layer} alone gives other logits than "
                    f"in {source.path}"
                )
        checked += layers
    computed = [layer.number for layer in plan.layers if layer.how != "copy"]
    said = f"{_layers(sorted(checked))}, each alone: the logits of their sources, bit for bit" if checked else "it runs"
    more = [f"{_layers(computed)}: computed from several sources, so equal to none"] if computed else []
    return "; ".join([said, *more])
