"""Training of NPT layers toward equivalence with the frozen layers of a Llama that they stand in for.

Two losses, with the model's own attention, rotation and mask. *Direct*: for the hidden states h that the base gives
to a layer, a = attention of that layer, the NPT layer's modulated MLP is to give
a + MLP(post_attention_layernorm(h + a)), the base layer's output minus h; the mean squared error is relative to the
target's mean square, so that layers count alike. *Logits*: the mean squared difference of the whole model's logits,
all NPT layers active, from the base's.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict, cast

import torch

from runner.checkpoints.detect import open_checkpoint
from runner.errors import CheckpointError, ConfigError, ModelError
from runner.evaluation.base_models import Base
from runner.evaluation.forward import layer_arguments
from runner.families.npt import PROJECTIONS, EquivalenceSettings
from runner.families.npt import checkpoint as npt_delta
from runner.families.npt.model import NptDecoderLayer, NptLlamaForCausalLM, RankKUpdate, build_npt, npt_tensors
from runner.families.npt.save import flat_optimizer_state, stacked_optimizer_state
from runner.files.staging import staged
from runner.files.tensors import load_pickle
from runner.training.batches import NO_TEXT, document_batches, endless_order
from runner.training.loop import OnStep, Trained, TrainingInputs, is_logged, naming_the_last, take_steps
from runner.training.optimization import optimizer_and_schedule, require_finite, require_finite_loss
from runner.training.resume import is_step, load_optimizer, load_schedule, require_state, require_steps_left

if TYPE_CHECKING:
    from runner.evaluation.base_models import Config

# How much of what the base computes is kept in memory instead of being computed again in every epoch.
CACHE_BYTES = 256 << 20


class TrainingState(TypedDict):
    """What training goes on from, as training_state.pt holds it; moments are laid out like the keys of the weights."""

    global_step: int
    batch_count: int
    optimizer_state_dict: dict[str, object]
    scheduler_state_dict: dict[str, object]
    scaler_state_dict: None


@dataclass(frozen=True, kw_only=True)
class LayerOutputs:
    """What one NPT layer is given by the base, and what it is to give, each [B, T, d]."""

    attention: torch.Tensor
    normed: torch.Tensor  # post_attention_layernorm(h)
    target: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class BaseOutputs:
    """The base on one batch. `hidden` [B, T, d]: the input of the lowest NPT layer; `final`: the input of the head;
    `arguments`: what every layer is called with."""

    hidden: torch.Tensor
    layers: Mapping[int, LayerOutputs]
    final: torch.Tensor
    arguments: Mapping[str, object]

    @property
    def nbytes(self) -> int:
        """What keeping it costs, in bytes."""
        own = (tensor for layer in self.layers.values() for tensor in (layer.attention, layer.normed, layer.target))
        return sum(tensor.nbytes for tensor in (self.hidden, self.final, *own))


@torch.no_grad()
def base_outputs(model: NptLlamaForCausalLM, ids: torch.Tensor) -> BaseOutputs:
    """What the base of `model` computes on token ids [B, T] without padding."""
    llama = model.model
    first = min(model.npt_layers)
    hidden = lowest = llama.embed_tokens(ids)
    arguments = layer_arguments(model, hidden)
    layers = {}
    for i, layer in enumerate(llama.layers):
        if i == first:
            lowest = hidden
        if isinstance(layer, NptDecoderLayer):
            attention = layer.self_attn(layer.input_layernorm(hidden), **arguments)
            target = attention + layer.mlp(layer.post_attention_layernorm(hidden + attention))
            normed = layer.post_attention_layernorm(hidden)
            layers[i] = LayerOutputs(attention=attention, normed=normed, target=target)
            hidden = hidden + target
        else:
            hidden = layer(hidden, **arguments)
    return BaseOutputs(hidden=lowest, layers=layers, final=llama.norm(hidden), arguments=arguments)


def losses(model: NptLlamaForCausalLM, base: BaseOutputs) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
    """The direct loss by NPT layer, and the loss of the logits: scalars with gradients."""
    direct = {}
    hidden = base.hidden
    first = min(base.layers)
    for i, layer in enumerate(model.model.layers):
        if i in base.layers:
            own = base.layers[i]
            assert isinstance(layer, NptDecoderLayer)
            output = layer.modulated_mlp(own.attention, own.normed)
            direct[i] = (output - own.target).square().mean() / own.target.square().mean()
            # The lowest NPT layer has the base's input in the whole model too.
            hidden = hidden + output if i == first else layer(hidden, **base.arguments)
        elif i > first:
            hidden = layer(hidden, **base.arguments)
    # The head is linear: the difference of the logits is the head of the difference.
    difference = model.lm_head(model.model.norm(hidden) - base.final)
    return direct, difference.square().mean()


def cached_base_outputs(model: NptLlamaForCausalLM, batches: Sequence[torch.Tensor]) -> Callable[[int], BaseOutputs]:
    """The base on the batch of an index. It never changes, so as many as fit stay in memory for the epochs to come."""
    cached: dict[int, BaseOutputs] = {}
    room = CACHE_BYTES

    def get(index: int) -> BaseOutputs:
        nonlocal room
        if index in cached:
            return cached[index]
        computed = base_outputs(model, batches[index].to(model.device))
        if computed.nbytes <= room:
            cached[index] = computed
            room -= computed.nbytes
        return computed

    return get


def initial_updates(config: "Config", settings: EquivalenceSettings) -> dict[int, dict[str, RankKUpdate]]:
    """Random rank-k updates for a Llama of `config`, by layer and projection; `settings.seed` gives their values."""
    beyond = [i for i in settings.layers if i >= config.num_hidden_layers]
    if beyond:
        raise ModelError(f"train.layers: the base has the layers 0 to {config.num_hidden_layers - 1}, not {beyond[0]}")
    generator = torch.Generator().manual_seed(settings.seed)
    k, r, d = settings.num_ranks, settings.np_rank, config.hidden_size

    def update(d_in: int, d_out: int) -> RankKUpdate:
        # A small bottleneck: modulation grows from almost nothing, and ends closer than from large random values.
        w_down = torch.randn(k, d, r, generator=generator) * 0.3 * d**-0.5
        w_a_up = torch.randn(k, r, d_in, generator=generator) * (d_in * r) ** -0.5
        w_b_up = torch.randn(k, r, d_out, generator=generator) * (k * r) ** -0.5 * settings.initial_scale
        return RankKUpdate(w_down, w_a_up, w_b_up)

    return {
        layer: {
            projection: update(config.intermediate_size, d)
            if projection == "down"
            else update(d, config.intermediate_size)
            for projection in PROJECTIONS[settings.modulation]
        }
        for layer in sorted(settings.layers)
    }


def train_equivalence(
    model: NptLlamaForCausalLM,
    batches: Sequence[torch.Tensor],
    settings: EquivalenceSettings,
    *,
    on_step: OnStep | None = None,
    on_checkpoint: Callable[[int, TrainingState], None] | None = None,
    resume: TrainingState | None = None,
) -> dict[str, float]:
    """Train the updates of `model` in place on `batches` of token ids [B, T] without padding; → the last losses.

    `on_step(step, losses)` is called after each step, `on_checkpoint(step, training_state)` every `save_every` steps
    and after the last. `resume`: such a state; `model` holds the weights saved with it. Training then goes on as if it
    had never stopped, bit for bit.
    Raises ModelError where the state does not fit the model, DivergedError where the loss is no longer finite, or for
    weights to be saved that are not, or that no longer give a finite loss.
    """
    updates = [update for layer in model.npt_layers.values() for update in layer.updates.values()]
    parameters = [parameter.requires_grad_(True) for update in updates for parameter in update.parameters()]
    optimizer, schedule = optimizer_and_schedule(parameters, settings, model.device)
    start = 0
    if resume is not None:
        load_optimizer(optimizer, stacked_optimizer_state(resume["optimizer_state_dict"], model))
        load_schedule(schedule, resume["scheduler_state_dict"])
        start = resume["global_step"]
    steps = range(start + 1, settings.max_steps + 1)
    order = dict(zip(steps, islice(endless_order(len(batches), settings.seed, start), len(steps)), strict=True))
    outputs = cached_base_outputs(model, batches)

    def weighed(step: int) -> dict[str, torch.Tensor]:
        direct, logits = losses(model, outputs(order[step]))
        total = settings.direct_weight * torch.stack(list(direct.values())).sum() + settings.logit_weight * logits
        return {"loss": total, "logits": logits, **{f"layer_{i}": loss for i, loss in direct.items()}}

    figures: dict[str, float] = {}
    clip = settings.gradient_clip_value
    for step, figures in take_steps(steps, parameters, [(optimizer, schedule)], weighed, clip=clip):
        if on_step is not None:
            on_step(step, figures)
        if on_checkpoint is not None and settings.is_saved(step):
            require_finite(parameters, step)
            with torch.no_grad():
                require_finite_loss(weighed(step)["loss"], step)
            on_checkpoint(
                step,
                {
                    "global_step": step,
                    "batch_count": step,
                    "optimizer_state_dict": flat_optimizer_state(optimizer.state_dict(), model),
                    "scheduler_state_dict": schedule.state_dict(),
                    "scaler_state_dict": None,
                },
            )
    for parameter in parameters:
        parameter.requires_grad_(False)
    return figures


def train(inputs: TrainingInputs) -> Trained:
    """`task=train family=npt`. Raises as `train_run`."""
    settings = inputs.settings
    assert isinstance(settings, EquivalenceSettings), "the task has compared family and settings"
    documents = [document for own in inputs.texts.values() for document in own]
    chooser = random.Random(inputs.seed)
    batches = document_batches(documents, settings.sequence_length, settings.batch_size, chooser)
    if not batches:
        raise ConfigError(NO_TEXT)

    def on_step(step: int, figures: Mapping[str, float]) -> None:
        inputs.on_step(step, figures)
        if is_logged(step, settings):
            inputs.on_log(step, figures)

    figures, checkpoints = train_run(
        inputs.directory, inputs.base, batches, settings,
        base_name=inputs.base_name, resume_from=inputs.resume_from, on_step=on_step,
    )  # fmt: skip
    return Trained(format=npt_delta.NAME, checkpoints=checkpoints, figures=figures)


def train_run(
    directory: Path,
    base: Base,
    batches: Sequence[torch.Tensor],
    settings: EquivalenceSettings,
    *,
    base_name: str,
    resume_from: Path | None = None,
    on_step: OnStep | None = None,
    moments: Literal["every", "last"] = "every",
) -> tuple[dict[str, float], list[Path]]:
    """Train NPT layers over `base`, writing `directory`/checkpoint-<step>; → the last losses, the checkpoints.

    `base_name` is what the checkpoints say their base is: a hub name, or a path that starts at the checkpoint.
    `resume_from`: a checkpoint of the same training to go on from. `moments`: which checkpoints hold the optimizer's
    state, twice the size of the weights, and can be gone on from: "every" one or the "last".
    Raises CheckpointError, ConfigError or ModelError; DivergedError names the last good checkpoint.
    """
    state: TrainingState | None = None
    if resume_from is None:
        updates = initial_updates(base.model.config, settings)
        for layer_updates in updates.values():
            for update in layer_updates.values():
                update.to(device=base.model.device, dtype=base.model.dtype)
        model = NptLlamaForCausalLM(base.model, updates)
    else:
        model, state = _reopen(resume_from, base, settings)
    checkpoints: list[Path] = []

    def on_checkpoint(step: int, training_state: TrainingState) -> None:
        target = directory / f"checkpoint-{step}"
        left_out = "optimizer_state_dict" if moments == "last" and step < settings.max_steps else None
        saved = {name: value for name, value in training_state.items() if name != left_out}
        _save(target, model, saved, settings, base_name=base_name)
        checkpoints.append(target)

    with naming_the_last(checkpoints, resume_from):
        figures = train_equivalence(
            model, batches, settings, on_step=on_step, on_checkpoint=on_checkpoint, resume=state
        )
    return figures, checkpoints


def _save(
    target: Path,
    model: NptLlamaForCausalLM,
    training_state: Mapping[str, object],
    settings: EquivalenceSettings,
    *,
    base_name: str,
) -> None:
    """Write one checkpoint directory, absent or complete whatever happens. Raises CheckpointError where it exists."""
    multi_layer_state = {
        "layers_to_train": sorted(settings.layers),
        "curriculum_schedule": [{"name": "equivalence", "until_step": settings.max_steps, "mixing_ratio": 1.0}],
        "current_stage_index": 0,
        "layer_weights": dict.fromkeys(sorted(settings.layers), 1.0),
    }
    config = {
        "model_name": base_name,
        **settings.values(),
        "gradient_accumulation_steps": 1,
        "mixed_precision": False,
    }
    with staged(target) as partial:
        npt_delta.save(
            partial,
            npt_tensors(model),
            training_state=training_state,
            multi_layer_state=multi_layer_state,
            config=config,
        )


def _reopen(path: Path, base: Base, settings: EquivalenceSettings) -> tuple[NptLlamaForCausalLM, TrainingState]:
    """A checkpoint's model over `base` and its training state.

    Raises CheckpointError where it has no such state, ConfigError where its layers are not those of `settings` or
    nothing is left to train.
    """
    checkpoint = open_checkpoint(path, npt_delta.NAME)
    file = checkpoint.directory / npt_delta.TRAINING_STATE
    require_state(path, [] if file.is_file() else [file.name])
    state = load_pickle(file, tensors="mmap")
    needed = ("global_step", "optimizer_state_dict", "scheduler_state_dict")
    if not isinstance(state, Mapping) or any(state.get(name) is None for name in needed):
        raise CheckpointError(f"{file}: training goes on from {', '.join(needed)}, and not all of them are there")
    if not is_step(state["global_step"]):
        raise CheckpointError(f"{file}: its global_step is no number of steps")
    kinds = {(layer.layer, layer.modulation, layer.np_rank, layer.num_ranks) for layer in checkpoint.layers}
    wanted = {(layer, settings.modulation, settings.np_rank, settings.num_ranks) for layer in settings.layers}
    if kinds != wanted:
        raise ConfigError(
            f"train.resume_from={path}: its (layer, modulation, np_rank, num_ranks) are {sorted(kinds)}, "
            f"those asked for {sorted(wanted)}; they must be the same"
        )
    require_steps_left(path, state["global_step"], settings)
    return build_npt(checkpoint, base), cast(TrainingState, state)
