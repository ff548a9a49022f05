"""What a training of NPT layers starts from: new weights, or a checkpoint with the same layers, fewer, or more."""

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from runner.checkpoints.checkpoint import Checkpoint
from runner.checkpoints.detect import open_checkpoint
from runner.errors import CheckpointError, ConfigError, ModelError
from runner.evaluation.base_models import Base
from runner.families.npt import PROJECTIONS, EquivalenceSettings
from runner.families.npt import checkpoint as npt_delta
from runner.families.npt.curriculum import from_state
from runner.families.npt.merge import optimizer_order
from runner.families.npt.model import NptLlamaForCausalLM, RankKUpdate, build_npt, npt_tensors, npt_updates
from runner.files.tensors import load_pickle
from runner.training.resume import as_before, is_step, require_state, require_steps_left

if TYPE_CHECKING:
    from runner.evaluation.base_models import Config

KIND = ("modulation", "np_rank", "num_ranks")
# Beyond so many terms the original starts a single modulation from normal values.
_MANY_TERMS = 16
_RANK = re.compile(r"\.\d+$")  # of a term, at the end of a key
Entry = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Start:
    """A model whose `settings.layers` are to be trained, and where their training stands.

    `state`: the training state that goes on at `settings`' step, with moments by the index of the trained keys; None
    for a new training. `kept`: entries of the optimizer, by key, of layers that are not trained. `said`: what the
    reader should know; `decided`: the same for result.json.
    """

    model: NptLlamaForCausalLM
    settings: EquivalenceSettings
    state: dict[str, Any] | None = None
    kept: Mapping[str, Entry] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)
    decided: dict[str, object] = field(default_factory=dict)


def initial_updates(
    config: "Config", settings: EquivalenceSettings, layers: Iterable[int] | None = None
) -> dict[int, dict[str, RankKUpdate]]:
    """Random rank-k updates for a Llama of `config`, by layer (None: those of the settings) and projection, in float32.

    `settings.seed` gives their values. Raises ModelError for a layer beyond the base.
    """
    layers = sorted(settings.layers if layers is None else layers)
    if beyond := [i for i in layers if i >= config.num_hidden_layers]:
        raise ModelError(f"train.layers: the base has the layers 0 to {config.num_hidden_layers - 1}, not {beyond[0]}")
    generator = torch.Generator().manual_seed(settings.seed)
    k, r, d, f = settings.num_ranks, settings.np_rank, config.hidden_size, config.intermediate_size
    start = _xavier if settings.init == "xavier" else _scaled

    def update(projection: str) -> RankKUpdate:
        d_in, d_out = (f, d) if projection == "down" else (d, f)
        shapes = ((k, d, r), (k, r, d_in), (k, r, d_out))
        return RankKUpdate(*start(shapes, settings, generator, down=projection == "down"))

    return {layer: {name: update(name) for name in PROJECTIONS[settings.modulation]} for layer in layers}


Shapes = tuple[tuple[int, int, int], tuple[int, int, int], tuple[int, int, int]]
Matrices = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _scaled(shapes: Shapes, settings: EquivalenceSettings, generator: torch.Generator, *, down: bool) -> Matrices:
    """A small bottleneck: modulation grows from almost nothing, and ends closer than from large random values."""
    (k, d, r), (_, _, d_in), _ = shapes
    w_down, w_a_up, w_b_up = (torch.randn(shape, generator=generator) for shape in shapes)
    return w_down * 0.3 * d**-0.5, w_a_up * (d_in * r) ** -0.5, w_b_up * (k * r) ** -0.5 * settings.initial_scale


def _xavier(shapes: Shapes, settings: EquivalenceSettings, generator: torch.Generator, *, down: bool) -> Matrices:
    """As the original: W_down Xavier uniform, the first term of the others uniform, further ones orthogonal."""
    down_shape, *up = shapes
    w_down = torch.empty(down_shape)
    for term in w_down:
        nn.init.xavier_uniform_(term, generator=generator)
    sigma = settings.init_scale * (0.5 if down else 1.0)
    made = []
    for shape, gain in zip(up, (sigma, sigma * (0.05 if down else 0.1)), strict=True):
        tensor = torch.empty(shape)
        if settings.modulation == "single" and settings.num_ranks > _MANY_TERMS:
            tensor.normal_(std=gain, generator=generator)
        else:
            tensor[0].uniform_(-sigma, sigma, generator=generator)
            for term in tensor[1:]:
                nn.init.orthogonal_(term, gain, generator=generator)
        made.append(tensor)
    return w_down, made[0], made[1]


def new_start(base: Base, settings: EquivalenceSettings) -> Start:
    """New layers over `base`. Raises ModelError for layers beyond it."""
    updates = initial_updates(base.model.config, settings)
    _place(updates, base)
    return Start(model=NptLlamaForCausalLM(base.model, updates), settings=settings)


def _place(updates: Mapping[int, Mapping[str, RankKUpdate]], base: Base) -> None:
    for projections in updates.values():
        for update in projections.values():
            update.to(device=base.model.device)


def going_on(path: Path, base: Base, settings: EquivalenceSettings, given: Collection[str] | None) -> Start:
    """The checkpoint at `path` over `base`, with the layers that `settings` ask for.

    `given`: the keys that the command line says; the others are as the checkpoint has them. None: all are given.
    Raises CheckpointError where it has no state to go on from, ConfigError where its layers do not fit `settings` or
    nothing is left to train.
    """
    checkpoint = open_checkpoint(path, npt_delta.NAME)
    there = {layer.layer: layer for layer in checkpoint.layers}
    state, curriculum = _states(checkpoint, settings)
    if given is not None and "layers" not in given:
        listed = curriculum.get("layers_to_train")
        listed = [i for i in listed if i in there] if isinstance(listed, (list, tuple)) else []
        settings = replace(settings, layers=tuple(listed or there), layer_weights="uniform")
    settings, said = as_before(settings, _saved(checkpoint, state, curriculum, settings.layers), given, path)
    settings = _checked_kinds(checkpoint, settings, given)
    taken = [i for i in settings.layers if i in there]
    new = [i for i in settings.layers if i not in there]
    beside = [i for i in there if i not in settings.layers]
    step, why = _step(checkpoint, state, settings, new)
    require_steps_left(path, step, settings)
    model = _model(checkpoint, base, settings, new, dropped=[] if settings.keep_layers else beside)
    moments, lacking = _moments(checkpoint, state.get("optimizer_state_dict"))
    entries, zero = _entries(model, settings.layers, moments)
    if new:
        said.append(f"layers {_list(new)} are not in {path}: they start anew")
    if beside:
        done = "stay in the model as they are and are saved along" if settings.keep_layers else "are dropped"
        said.append(f"layers {_list(beside)} of {path} are not trained: they {done}")
    if zero:
        said.append(f"{zero} of {len(entries)} tensors start without moments{f': {lacking}' if lacking else ''}")
    goes_on = why == _OF_CHECKPOINT and not _merge_info(checkpoint)
    resumed = {name: state.get(name) for name in _LIVING} if goes_on else {}
    said += [] if why == _OF_CHECKPOINT else [f"the schedule starts at step {step}: {why}"]
    kept = (
        {name: moments[name] for name in moments if int(name.split("_")[1]) in beside} if settings.keep_layers else {}
    )
    return Start(
        model=model,
        settings=settings,
        state={**resumed, "global_step": step, "optimizer_state_dict": {"state": entries, "param_groups": [{}]}},
        kept=kept,
        said=[f"train.resume_from: {text}" for text in said],
        decided={
            "from": str(path), "start_step": step, "because": why, "layers_taken": taken, "layers_new": new,
            "layers_kept": beside if settings.keep_layers else [],
            "layers_dropped": [] if settings.keep_layers else beside,
            "tensors_with_moments": len(entries) - zero, "tensors_without_moments": zero,
        },
    )  # fmt: skip


# What only goes on where the training does.
_LIVING = ("batch_count", "tokens", "skipped_steps", "best_val_loss", "rng_state", "data_state", "scaler_state_dict")
_OF_CHECKPOINT = "all trained layers come from the checkpoint at this step"


def _states(checkpoint: Checkpoint, settings: EquivalenceSettings) -> tuple[dict[str, Any], dict[str, Any]]:
    """The training state and the state of the layers, tensors mapped; {} where a start_step does without the first."""
    file = checkpoint.directory / npt_delta.TRAINING_STATE
    beside = checkpoint.directory / npt_delta.MULTI_LAYER_STATE
    curriculum = load_pickle(beside, tensors="mmap") if beside.is_file() else {}
    curriculum = curriculum if isinstance(curriculum, dict) else {}
    anew = "; train.start_step=0 starts from its weights alone"
    if not file.is_file():
        if settings.start_step is None:
            require_state(checkpoint.path, [file.name])
        return {}, curriculum
    state = load_pickle(file, tensors="mmap")
    needed = ("global_step", "optimizer_state_dict", "scheduler_state_dict")
    if settings.start_step is None and (
        not isinstance(state, Mapping) or any(state.get(name) is None for name in needed)
    ):
        raise CheckpointError(f"{file}: training goes on from {', '.join(needed)}, and not all of them are there{anew}")
    state = dict(state) if isinstance(state, Mapping) else {}
    if settings.start_step is None and not is_step(state["global_step"]):
        raise CheckpointError(f"{file}: its global_step is no number of steps")
    return state, curriculum


def _saved(
    checkpoint: Checkpoint, state: Mapping[str, Any], curriculum: Mapping[str, Any], layers: tuple[int, ...]
) -> dict[str, object]:
    """What the checkpoint was trained with, as far as it says: its config, the optimizer's group, its stages."""
    config = {name: value for name, value in checkpoint.training["config"].items() if name != "layers"}
    group = _first_group(state.get("optimizer_state_dict"))
    of_group = {"learning_rate": group.get("initial_lr", group.get("lr")), "betas": group.get("betas"),
                "epsilon": group.get("eps"), "weight_decay": group.get("weight_decay")}  # fmt: skip
    saved = {**config, **{name: value for name, value in of_group.items() if _is_plain(value)}}
    for name in KIND:
        saved.pop(name, None)  # what the weights themselves are
    if stages := from_state(curriculum.get("curriculum_schedule")):
        saved["curriculum"] = stages
    weights = curriculum.get("layer_weights")
    if isinstance(weights, Mapping) and not isinstance(saved.get("layer_weights"), str):
        numbers = tuple(weights.get(layer, 1.0) for layer in layers)
        saved["layer_weights"] = "uniform" if all(number == 1.0 for number in numbers if _is_plain(number)) else numbers
    listed = saved.get("layer_weights")
    if isinstance(listed, (list, tuple)) and (len(listed) != len(layers) or not all(map(_is_plain, listed))):
        del saved["layer_weights"]
    return saved


def _first_group(state: object) -> Mapping[str, object]:
    groups = state.get("param_groups") if isinstance(state, Mapping) else None
    return groups[0] if isinstance(groups, (list, tuple)) and groups and isinstance(groups[0], Mapping) else {}


def _is_plain(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _checked_kinds(
    checkpoint: Checkpoint, settings: EquivalenceSettings, given: Collection[str] | None
) -> EquivalenceSettings:
    """The settings with the kind of the checkpoint's layers where none is given. Raises ConfigError."""
    path = checkpoint.path
    first = checkpoint.layers[0]
    if given is not None:
        settings = replace(settings, **{name: getattr(first, name) for name in KIND if name not in given})
    asked = [name for name in KIND if given is None or name in given]
    held = {(x.layer, *(getattr(x, n) for n in asked)) for x in checkpoint.layers if x.layer in settings.layers}
    wanted = {(layer, *(getattr(settings, name) for name in asked)) for layer in settings.layers}
    if held - wanted:
        raise ConfigError(
            f"train.resume_from={path}: its (layer, {', '.join(asked)}) are {sorted(held)}, those asked for "
            f"{sorted(wanted)}; they must be the same"
        )
    absent = sorted({layer for layer, *_ in wanted} - {layer for layer, *_ in held})
    if absent and not settings.new_layers:
        raise ConfigError(
            f"train.resume_from={path}: has no NPT layers {_list(absent)}; its layers and those asked for must be the "
            "same, or train.new_layers=true starts these anew"
        )
    return settings


def _step(
    checkpoint: Checkpoint, state: Mapping[str, Any], settings: EquivalenceSettings, new: Collection[int]
) -> tuple[int, str]:
    """At which step the schedule goes on, and why there."""
    if settings.start_step is not None:
        return settings.start_step, "train.start_step says so"
    info = _merge_info(checkpoint)
    known = info.get("layer_steps")
    known = known if isinstance(known, Mapping) else {}
    if new:
        return 0, "some layers start anew; train.start_step= says otherwise"
    steps = [known.get(i, known.get(str(i))) if info else state["global_step"] for i in settings.layers]
    if all(is_step(step) and step == steps[0] for step in steps):
        return steps[0], _OF_CHECKPOINT
    return 0, "the layers were not all trained to one step; train.start_step= says otherwise"


def _merge_info(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """What a merge left in the checkpoint; something where one did."""
    info = checkpoint.training["config"].get("merge_info") or checkpoint.training["state"].get("merge_info")
    if isinstance(info, Mapping) and info:
        return info
    return {"merged": True} if (checkpoint.directory / npt_delta.MERGE_SUMMARY).is_file() else {}


def _model(
    checkpoint: Checkpoint, base: Base, settings: EquivalenceSettings, new: list[int], *, dropped: list[int]
) -> NptLlamaForCausalLM:
    """The checkpoint's layers over `base` but for those `dropped`, and `new` ones, all in float32."""
    build_npt(checkpoint, base)  # which says what does not fit
    updates = npt_updates(checkpoint, torch.float32, base.model.device)
    updates = {layer: update for layer, update in updates.items() if layer not in dropped}
    if new:
        made = initial_updates(base.model.config, settings, new)
        _place(made, base)
        updates |= made
    model = NptLlamaForCausalLM(base.model, dict(sorted(updates.items())))
    model.requires_grad_(False)
    return model


def _moments(checkpoint: Checkpoint, state: object) -> tuple[dict[str, Entry], str]:
    """The optimizer's entries by the canonical key of the weight that they belong to; and why there are none."""
    entries = state.get("state") if isinstance(state, Mapping) else None
    groups = state.get("param_groups") if isinstance(state, Mapping) else None
    if not isinstance(entries, Mapping) or not isinstance(groups, (list, tuple)):
        return {}, "the checkpoint has none"
    order = optimizer_order(checkpoint)
    counts = [len(g["params"]) for g in groups if isinstance(g, Mapping) and isinstance(g.get("params"), (list, tuple))]
    if sum(counts) != len(order):
        return {}, f"the optimizer's state is for {sum(counts)} tensors, the weights are {len(order)}"
    spelled = {
        name: npt_delta.key(layer.layer, layer.modulation, projection, matrix, rank, layer.num_ranks)
        for layer in checkpoint.layers
        for projection, matrices in layer.keys.items()
        for matrix, names in matrices.items()
        for rank, name in enumerate(names)
    }
    found = {}
    for index, name in enumerate(order):
        entry = entries.get(index)
        if entry is None:
            continue
        if not _is_entry(entry, checkpoint.weights.infos[name].shape):
            raise CheckpointError(f"{checkpoint.path}: its optimizer state does not fit: entry {index} is not {name}'s")
        found[spelled[name]] = entry
    return found, ""


def _is_entry(entry: object, shape: tuple[int, ...]) -> bool:
    if not isinstance(entry, Mapping) or not {"step", "exp_avg", "exp_avg_sq"} <= set(entry):
        return False
    step = entry["step"]
    step = step.item() if isinstance(step, torch.Tensor) and step.numel() == 1 else step
    counted = isinstance(step, (int, float)) and math.isfinite(step) and is_step(int(step))
    moments = (entry["exp_avg"], entry["exp_avg_sq"])
    return counted and all(
        isinstance(each, torch.Tensor) and tuple(each.shape) == shape and each.is_floating_point() for each in moments
    )


def _entries(
    model: NptLlamaForCausalLM, trained: Collection[int], moments: Mapping[str, Entry]
) -> tuple[dict[int, Entry], int]:
    """An entry for each key of the trained layers, by their order; and how many of them start at zero.

    The terms of one matrix go together: where one of them has no moments none of them has.
    """
    named = {name: tensor for name, tensor in npt_tensors(model).items() if int(name.split("_")[1]) in trained}
    matrices: dict[str, list[str]] = {}
    for name in named:
        matrices.setdefault(_RANK.sub("", name), []).append(name)
    whole = {name for names in matrices.values() if all(name in moments for name in names) for name in names}
    entries: dict[int, Entry] = {}
    for index, (name, tensor) in enumerate(named.items()):
        if name in whole:
            entry = moments[name]
            step = torch.as_tensor(float(entry["step"]), dtype=torch.float32)
            entries[index] = {"step": step, **{n: entry[n].float() for n in ("exp_avg", "exp_avg_sq")}}
        else:
            zeros = torch.zeros(tensor.shape)
            entries[index] = {"step": torch.tensor(0.0), "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
    return entries, len(named) - len(whole)


def _list(layers: Collection[int]) -> str:
    return ", ".join(map(str, sorted(layers)))
