"""What lies beside the weights of a merged checkpoint: training state, layers and curriculum, config, summary."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.errors import CheckpointError
from runner.families.npt import checkpoint as npt_delta
from runner.files.tensors import load_pickle
from runner.merge.moments import Moments, read_moments
from runner.merge.optimizer_state import unite
from runner.merge.plain_values import same, writable
from runner.merge.plan import Plan, layer_sources, layer_steps, merged_from
from runner.merge.sources import Source, furthest, rebased


@dataclass(frozen=True, kw_only=True)
class State:
    """One file's content, plain values and `Piece`s, and what the user should know of it."""

    content: dict[str, Any]
    findings: tuple[str, ...] = ()
    differences: tuple[dict[str, Any], ...] = ()


def merge_info(plan: Plan) -> dict[str, Any]:
    """Where the merged layers come from, as config.json and the training state say it."""
    return {
        "merged_from": merged_from(plan),
        "merged_layers": [planned.layer.layer for planned in plan.layers],
        "layer_sources": dict(layer_sources(plan)),
        "layer_steps": layer_steps(plan),
    }


def training_state(plan: Plan) -> State | None:
    """The state to resume from: that of the furthest source, with the optimizer moments of all.

    None where no source has one. Raises CheckpointError for a damaged one.
    """
    found = {id(source): _load(source, npt_delta.TRAINING_STATE) for source in plan.sources}
    having = [source for source in plan.sources if found[id(source)] is not None]
    if not having:
        return None
    leader = furthest(having)
    moments: list[Moments] = []
    findings, without = [], []
    for source in plan.sources:
        state = found[id(source)]
        if state is None or state.get("optimizer_state_dict") is None:
            without.append((source, npt_delta.TRAINING_STATE if state is None else "optimizer moments"))
            continue
        read, problem = read_moments(source, state["optimizer_state_dict"])
        moments += [read] if read else []
        findings += [problem] if problem else []
    # Where no source has moments, that one has none is nothing to say.
    start = ": its parameters start without moments" if moments else ""
    findings += [f"{s.path}: has no {what}{start}" for s, what in without if moments or found[id(s)] is None]
    content, writer_findings = writable(found[id(leader)], leader)
    findings += writer_findings
    steps = [source.step for source in plan.sources if source.step is not None]
    if steps:
        content["global_step"] = max(steps)
    differences: tuple[dict[str, Any], ...] = ()
    if moments:
        leading = furthest([each.source for each in moments])
        united = unite(plan, moments, next(each for each in moments if each.source is leading))
        content["optimizer_state_dict"], writer_findings = writable(united.state, leading)
        findings += [*united.findings, *writer_findings]
        differences = united.differences
    elif "optimizer_state_dict" in content:
        content["optimizer_state_dict"] = None
    content["merge_info"] = merge_info(plan)
    return State(content=content, findings=tuple(dict.fromkeys(findings)), differences=differences)


def multi_layer_state(plan: Plan) -> State | None:
    """Layers, weights and curriculum of all sources; the curriculum and counters are those of the furthest.

    None where no source has one. Raises CheckpointError for a damaged one.
    """
    found = {id(source): _load(source, npt_delta.MULTI_LAYER_STATE) for source in plan.sources}
    having = [source for source in plan.sources if found[id(source)] is not None]
    if not having:
        return None
    leader = furthest(having)
    content, findings = writable(found[id(leader)], leader)
    layers = [planned.layer.layer for planned in plan.layers]
    weights = {}
    for planned in plan.layers:
        layer = planned.layer.layer
        known = [writable(_layer_weight(found[id(source)], layer), source)[0] for source in planned.sources]
        given = [weight for weight in known if weight is not None]
        if not given:
            findings.append(f"layer {layer}: no source gives it a weight in the loss; 1.0 is written")
        # Several sources where the layer is computed from them; their weights as a rule agree.
        weights[layer] = given[0] if given else 1.0
    content |= {"layers_to_train": layers, "layer_weights": weights}
    schedule = (found[id(leader)] or {}).get("curriculum_schedule")
    for source in having:
        if not same((found[id(source)] or {}).get("curriculum_schedule"), schedule):
            findings.append(f"{source.path}: has another curriculum; that of {leader.path}, the furthest, is kept")
    return State(content=content, findings=tuple(findings))


def config(plan: Plan, base: str | None, output: Path) -> State:
    """The first source's config.json with `merge_info`, its base named so that it is found from `output`.

    `base` is written where no source names one.
    """
    first = next((source for source in plan.sources if source.config), plan.sources[0])
    content: dict[str, Any] = {name: value for name, value in first.config.items() if name != "merge_info"}
    findings = []
    named = next((source for source in plan.sources if source.checkpoint.base_name), None)
    if named is not None:
        content["model_name"] = rebased(named, output)
        if content["model_name"] != named.checkpoint.base_name:
            findings.append(f"config.json names the base as {content['model_name']}, which leads there from {output}")
    elif base is not None:
        there = os.path.realpath(base)
        content["model_name"] = os.path.relpath(there, os.path.realpath(output)) if Path(there).is_dir() else base
    info = merge_info(plan)
    sources = {str(layer): path for layer, path in info["layer_sources"].items()}
    content["merge_info"] = info | {"layer_sources": sources}
    return State(content=content, findings=tuple(findings))


def summary(plan: Plan, inputs: Mapping[str, str], differences: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """merge_summary.json: what was merged from what, what conflicted, and the hashes of the files that were read."""
    info = merge_info(plan)
    return {
        "merged_from": info["merged_from"],
        "merged_layers": info["merged_layers"],
        "layer_sources": {str(layer): path for layer, path in info["layer_sources"].items()},
        "layer_steps": {str(layer): step for layer, step in info["layer_steps"].items()},
        "layers": {str(planned.layer.layer): _layer_summary(planned) for planned in plan.layers},
        "total_parameters": plan.parameters,
        "checkpoint_keys": len(plan.tensors),
        "global_step": furthest(plan.sources).step,
        "conflicts": [conflict.summary() for conflict in plan.conflicts],
        "optimizer_differences": list(differences),
        "sha256": dict(inputs),
    }


def _layer_summary(planned: Any) -> dict[str, Any]:
    row = {name: value for name, value in planned.layer.summary().items() if name != "layer"}
    sources = {str(s.path): weight for s, weight in zip(planned.sources, planned.weights, strict=True)}
    return row | {"how": planned.how, "sources": sources}


def _layer_weight(state: Any, layer: int) -> Any:
    weights = (state or {}).get("layer_weights")
    return weights.get(layer, weights.get(str(layer))) if isinstance(weights, Mapping) else None


def _load(source: Source, name: str) -> dict[str, Any] | None:
    """The dictionary in a file beside the weights, tensors mapped; None where there is none."""
    file = source.checkpoint.directory / name
    if not file.is_file():
        return None
    state = load_pickle(file, tensors="mmap")
    if not isinstance(state, dict):
        raise CheckpointError(f"{file}: holds a {type(state).__name__}, not a dictionary")
    return state
