"""Training of NPT layers toward equivalence with the frozen layers of a Llama that they stand in for.

The losses are in training_losses.py, the stages in curriculum.py, what a training starts from in training_start.py.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from runner.errors import ConfigError
from runner.evaluation.base_models import Base
from runner.families.npt import EquivalenceSettings
from runner.families.npt import checkpoint as npt_delta
from runner.families.npt.curriculum import EQUIVALENCE, stage_at, to_state
from runner.families.npt.model import NptLlamaForCausalLM, npt_tensors
from runner.families.npt.save import flat_optimizer_state, stacked_optimizer_state
from runner.families.npt.training_losses import Found, LogitLoss, cached_base_outputs, losses
from runner.families.npt.training_start import Start, going_on, new_start
from runner.files.staging import staged
from runner.training.batches import NO_TEXT, document_batches, endless_order, split_held_out
from runner.training.inputs import Trained, TrainingInputs
from runner.training.loop import Ended, Evaluation, Loop, LoopState, OnStep, Source, seeded
from runner.training.optimization import optimizer_and_schedule, require_finite, require_finite_loss, stand_at
from runner.training.precision import Precision, precision_over
from runner.training.resume import load_optimizer, taken_up
from runner.training.sources import Ordered, TokenBatch

# The figures of a step under the names that the guide of the original promises, which W&B has beside `train/…`.
GUIDE = {
    "loss": "loss/total", "logits": "loss/fidelity", "gradient_norm": "training/grad_norm",
    "learning_rate": "training/learning_rate", "tokens": "training/tokens",
}  # fmt: skip
# A student all of whose layers run on its own stream.
STUDENT = (1.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Layers:
    """The NPT layers of `model` that are trained, and what their losses are made of."""

    model: NptLlamaForCausalLM
    settings: EquivalenceSettings
    precision: Precision
    of_logits: LogitLoss = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "of_logits", LogitLoss(self.model.lm_head))

    @property
    def trained(self) -> tuple[int, ...]:
        """Their numbers, ascending."""
        return tuple(sorted(self.settings.layers))

    def parameters(self) -> list[torch.nn.Parameter]:
        """What is trained."""
        layers = self.model.npt_layers
        return [parameter for layer in self.trained for parameter in layers[layer].updates.parameters()]

    def losses(self) -> Callable[[TokenBatch, int], dict[str, torch.Tensor]]:
        """The losses of a batch in the stage of a step, "loss" being that of all together."""
        settings, stages = self.settings, self.settings.stages()
        outputs = cached_base_outputs(self.model, inputs=any(stage.mixes for stage in stages))

        def of(batch: TokenBatch, step: int) -> dict[str, torch.Tensor]:
            ratios = stages[stage_at(stages, step)].ratios(step) if stages else None
            figures = bool(stages) and settings.is_logged(step)
            found = losses(
                self.model, outputs(batch), self.of_logits, ratios=ratios, trained=self.trained,
                relative=settings.relative, regularized=settings.regularization_weight > 0, figures=figures,
            )  # fmt: skip
            return self.weighed(found)

        return of

    def weighed(self, found: Found) -> dict[str, torch.Tensor]:
        """The losses by name, and "loss", their weighted sum."""
        settings, weights = self.settings, self.settings.weight_of()
        layers = [
            settings.direct_weight * loss if i not in found.regularization
            else settings.direct_weight * loss + settings.regularization_weight * found.regularization[i]
            for i, loss in found.direct.items()
        ]  # fmt: skip
        summed = sum(
            weights[i] * loss if weights[i] != 1 else loss for i, loss in zip(found.direct, layers, strict=True)
        )
        return {
            "loss": summed + settings.of_logits * found.logits,
            "logits": found.logits,
            **{f"layer_{i}": loss for i, loss in found.direct.items()},
            **{f"regularization/layer_{i}": loss for i, loss in found.regularization.items()},
            **found.figures,
        }

    @torch.no_grad()
    def measured(self, batches: Sequence[torch.Tensor]) -> dict[str, float]:
        """The mean losses over held-out batches, the student's stream its own."""
        outputs = cached_base_outputs(self.model)
        ratios = STUDENT if self.settings.curriculum is not None else None
        sums: dict[str, float] = {}
        for ids in batches:
            with self.precision.passes():
                found = losses(
                    self.model, outputs(TokenBatch(ids=ids)), self.of_logits, ratios=ratios, trained=self.trained,
                    relative=self.settings.relative, regularized=self.settings.regularization_weight > 0,
                )  # fmt: skip
            for name, value in self.weighed(found).items():
                sums[name] = sums.get(name, 0.0) + value.item() / len(batches)
        return {f"eval_{GUIDE.get(name, _by_layer(name))}": value for name, value in sums.items()}

    def row(self, step: int, figures: Mapping[str, float]) -> dict[str, float]:
        """A row of the log: the figures, those of the stage, and both again under the guide's names."""
        stages = self.settings.stages()
        stage: dict[str, float] = {}
        if stages:
            index = stage_at(stages, step)
            attention, mlp = stages[index].ratios(step)
            stage = {
                "curriculum/stage_index": index, "curriculum/attention_mixing_ratio": attention,
                "curriculum/mlp_mixing_ratio": mlp,
            }  # fmt: skip
        guide = {GUIDE.get(name, _by_layer(name)): value for name, value in figures.items() if "/" not in name}
        return {**figures, **guide, **stage}


def _by_layer(name: str) -> str:
    return f"mlp_direct_loss/{name}" if name.startswith("layer_") else name


def layer_loop(
    layers: Layers,
    source: Source[TokenBatch],
    *,
    state: Mapping[str, Any] | None = None,
    kept: Mapping[str, Mapping[str, Any]] | None = None,
    save: Callable[[int, dict[str, Any]], Path] | None = None,
    evaluate: Callable[[int], Evaluation] | None = None,
    **options: Any,
) -> Callable[[], Ended]:
    """What trains `layers` in place on `source` when it is called.

    `state`: a training state with moments in the order of the trained keys; `kept`: those of other keys, which are
    saved along. `save(step, state)` gets the whole of training_state.pt. `options` are those of `Loop`.
    """
    model, settings = layers.model, layers.settings
    parameters = layers.parameters()
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer, schedule = optimizer_and_schedule(parameters, settings, model.device)
    if state is not None:
        stacked = stacked_optimizer_state(state["optimizer_state_dict"], model, trained=layers.trained)
        groups = optimizer.state_dict()["param_groups"]
        load_optimizer(optimizer, {"state": stacked["state"], "param_groups": groups})
        stand_at(schedule, state["global_step"])
    of = layers.losses()
    last: list[TokenBatch] = []

    def counted(batch: TokenBatch, step: int) -> dict[str, torch.Tensor]:
        last[:] = [batch]
        return of(batch, step)

    def saved(step: int, found: LoopState) -> Path:
        """Weights that are not finite, or no longer give a finite loss, are not worth keeping."""
        assert save is not None
        require_finite(parameters, step)
        if last:
            with torch.no_grad(), layers.precision.passes():
                require_finite_loss(of(last[0], step)["loss"].item(), step)
        moments = flat_optimizer_state(found["optimizer_state_dict"], model, trained=layers.trained, kept=kept)
        return save(step, {**found, "optimizer_state_dict": moments})

    loop = Loop(
        settings=settings, parameters=parameters, optimizer=optimizer, schedule=schedule, source=source, losses=counted,
        save=None if save is None else saved, evaluate=evaluate, precision=layers.precision,
        tokens=lambda batch: batch.ids.numel(), **options,
    )  # fmt: skip

    def run() -> Ended:
        with seeded(settings.seed, model.device):
            at = loop.restore(state) if state is not None else None
            ended = loop.run(at)
        for parameter in parameters:
            parameter.requires_grad_(False)
        return ended

    return run


def train_equivalence(
    model: NptLlamaForCausalLM,
    batches: Sequence[torch.Tensor],
    settings: EquivalenceSettings,
    *,
    on_step: OnStep | None = None,
    on_checkpoint: Callable[[int, dict[str, Any]], None] | None = None,
    resume: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Train the layers of `model` in place on `batches` of token ids [B, T] without padding; → the last losses.

    `on_step(step, losses)` is called after each step, `on_checkpoint(step, training_state)` every `save_every` steps
    and after the last. `resume`: such a state; `model` holds the weights saved with it. Training then goes on as if it
    had never stopped, bit for bit.
    Raises ModelError where the state does not fit the model, DivergedError where the loss is no longer finite, or for
    weights to be saved that are not, or that no longer give a finite loss.
    """

    def save(step: int, state: dict[str, Any]) -> Path:
        assert on_checkpoint is not None
        on_checkpoint(step, state)
        return Path(f"checkpoint-{step}")

    layers = Layers(
        model=model, settings=settings, precision=precision_over(model.dtype, settings.precision, model.device)
    )
    source, _ = taken_up(lambda: in_memory(batches, settings.seed), _data_state(resume))
    run = layer_loop(layers, source, state=resume, save=save if on_checkpoint else None, on_step=on_step)
    return run().figures


def in_memory(batches: Sequence[torch.Tensor], seed: int) -> Ordered[TokenBatch]:
    """All of `batches` once an epoch, in an order that `seed` gives."""

    def make(start: int) -> Iterator[TokenBatch]:
        return (TokenBatch(ids=batches[i], number=i) for i in endless_order(len(batches), seed, start))

    return Ordered(make)


def _data_state(state: Mapping[str, Any] | None) -> object:
    """Where the data stand; of a checkpoint that does not say so, after as many batches as were counted."""
    if state is None or state.get("data_state") is not None:
        return None if state is None else state["data_state"]
    return {"position": count} if (count := state.get("batch_count")) is not None else None


def train(inputs: TrainingInputs) -> Trained:
    """`task=train family=npt`. Raises as `train_run`."""
    settings = inputs.settings
    assert isinstance(settings, EquivalenceSettings), "the task has compared family and settings"
    if inputs.resume_from is None:
        start = new_start(inputs.base, settings)
    else:
        start = going_on(inputs.resume_from, inputs.base, settings, inputs.given)
    settings = start.settings
    if getattr(inputs.settings, "dry_run", False):
        return Trained(
            format=npt_delta.NAME, step=0, checkpoints=[], figures={}, findings=start.said, decided=start.decided,
            plan=_plan(start, inputs),
        )  # fmt: skip
    make, held = _data(inputs, settings)
    layers = _layers(start)
    source, reason = taken_up(make, _data_state(start.state))
    findings = start.said + ([f"train.resume_from: the data are read from their start: {reason}"] if reason else [])

    def on_log(step: int, figures: Mapping[str, float]) -> None:
        inputs.on_log(step, layers.row(step, figures))

    def evaluate(step: int) -> Evaluation:
        figures = layers.measured(held)
        if inputs.measure is not None:
            with torch.no_grad(), layers.precision.passes():
                figures |= inputs.measure(step, layers.model)
        inputs.on_log(step, figures)
        return Evaluation(figures=figures, score=figures["eval_loss/total"])

    def sample(step: int) -> None:
        assert inputs.sample is not None
        with torch.no_grad(), layers.precision.passes():
            inputs.sample(step, layers.model)

    ended = _run(
        start, layers, source, inputs.directory, inputs.base_name, inputs.resume_from, world=inputs.world,
        on_step=inputs.on_step, on_log=on_log, evaluate=evaluate if held else None,
        sample=None if inputs.sample is None else sample,
    )  # fmt: skip
    return Trained(
        format=npt_delta.NAME, step=ended.step, checkpoints=ended.checkpoints, figures=ended.figures, findings=findings,
        best=ended.best, interrupted=ended.interrupted, skipped=ended.skipped, decided=start.decided,
    )  # fmt: skip


def _data(
    inputs: TrainingInputs, settings: EquivalenceSettings
) -> tuple[Callable[[], Source[TokenBatch]], list[torch.Tensor]]:
    """What makes the batches, from their start, and those held out. Raises ConfigError where there are none."""
    world, stream = inputs.world, inputs.stream
    if stream is not None:
        return lambda: stream.batches(settings, world), stream.held_out(settings) if settings.eval_every else []
    documents = [document for own in inputs.texts.values() for document in own]
    held: list[torch.Tensor] = []
    if settings.eval_every is not None:
        documents, of_them = split_held_out(documents, settings.eval_fraction)
        chooser = random.Random(inputs.seed)
        held = document_batches(of_them, settings.sequence_length, settings.batch_size, chooser)[
            : settings.eval_batches
        ]
    size = settings.batch_size * world.size
    batches = document_batches(documents, settings.sequence_length, size, random.Random(inputs.seed))
    if world.size > 1:  # every process as many rows, or their means would not be that of all
        batches = [ids[world.rank :: world.size] for ids in batches if len(ids) % world.size == 0]
    if not batches:
        raise ConfigError(NO_TEXT)
    return lambda: in_memory(batches, settings.seed), held


def _layers(start: Start) -> Layers:
    model, settings = start.model, start.settings
    return Layers(
        model=model, settings=settings, precision=precision_over(model.dtype, settings.precision, model.device)
    )


def _plan(start: Start, inputs: TrainingInputs) -> dict[str, object]:
    """What would be trained, in numbers; the memory is an estimate."""
    settings, model = start.settings, start.model
    layers = _layers(start)
    trainable = sum(parameter.numel() for parameter in layers.parameters())
    tokens = settings.batch_size * settings.sequence_length
    stages = settings.stages()
    step = start.state["global_step"] if start.state else 0
    config = model.config
    depth = config.num_hidden_layers - min(model.npt_layers)
    # Weights, gradients and two moments in float32; of each layer that gradients go through, about ten vectors of its
    # hidden size and four of its MLP's a token.
    fixed = sum(p.nbytes for p in {id(p): p for p in model.parameters()}.values()) + 12 * trainable
    passes = 4 * tokens * depth * (10 * config.hidden_size + 4 * config.intermediate_size)
    return {
        "layers": list(layers.trained),
        "modulation": settings.modulation, "np_rank": settings.np_rank, "num_ranks": settings.num_ranks,
        "trainable_parameters": trainable,
        "precision": layers.precision.name,
        "tokens_a_step": tokens * settings.gradient_accumulation_steps * inputs.world.size,
        "first_step": step + 1, "last_step": settings.max_steps,
        "stages": [
            {"name": s.name, "first_step": s.begin + 1, "last_step": s.until_step, "attention": list(s.attention),
             "mlp": list(s.mlp)} for s in stages
        ] or [{"name": EQUIVALENCE, "first_step": 1, "last_step": settings.max_steps}],
        "memory_mb": round((fixed + passes) / 1e6, 1),
        "data_bytes": inputs.stream.size if inputs.stream is not None else None,
    }  # fmt: skip


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
    """Train NPT layers over `base` on batches in memory, writing `directory`/checkpoint-<step>; → the last losses, the
    checkpoints.

    `base_name` is what the checkpoints say their base is: a hub name, or a path that starts at the checkpoint.
    `resume_from`: a checkpoint of the same training to go on from. `moments`: which checkpoints hold the optimizer's
    state, twice the size of the weights, and can be gone on from: "every" one or the "last".
    Raises CheckpointError, ConfigError or ModelError; DivergedError names the last good checkpoint.
    """
    start = new_start(base, settings) if resume_from is None else going_on(resume_from, base, settings, None)
    source, _ = taken_up(lambda: in_memory(batches, settings.seed), _data_state(start.state))
    ended = _run(start, _layers(start), source, directory, base_name, resume_from, moments=moments, on_step=on_step)
    return ended.figures, ended.checkpoints


def _run(
    start: Start,
    layers: Layers,
    source: Source[TokenBatch],
    directory: Path,
    base_name: str,
    resume_from: Path | None,
    *,
    moments: Literal["every", "last"] = "every",
    **options: Any,
) -> Ended:
    """Train into `directory`."""

    def save(step: int, state: dict[str, Any]) -> Path:
        target = directory / f"checkpoint-{step}"
        left_out = "optimizer_state_dict" if moments == "last" and step < start.settings.max_steps else None
        kept = {name: value for name, value in state.items() if name != left_out}
        _save(target, layers, kept, base_name=base_name)
        return target

    return layer_loop(
        layers, source, state=start.state, kept=start.kept, save=save, resume_from=resume_from, **options
    )()


def _save(target: Path, layers: Layers, training_state: Mapping[str, object], *, base_name: str) -> None:
    """Write one checkpoint directory, absent or complete whatever happens. Raises CheckpointError where it exists."""
    settings, stages = layers.settings, layers.settings.stages()
    step = training_state["global_step"]
    assert isinstance(step, int)
    whole = [{"name": EQUIVALENCE, "until_step": settings.max_steps, "mixing_ratio": 1.0}]
    multi_layer_state = {
        "layers_to_train": list(layers.trained),
        "curriculum_schedule": to_state(stages) if stages else whole,
        "current_stage_index": stage_at(stages, step) if stages else 0,
        "layer_weights": dict(sorted(settings.weight_of().items())),
        # The original counts them, and reads them back.
        "teacher_cache_hits": 0,
        "teacher_cache_misses": 0,
    }
    config = {
        "model_name": base_name,
        **settings.values(),
        "mixed_precision": layers.precision.name != "float32",
    }
    with staged(target) as partial:
        npt_delta.save(
            partial,
            npt_tensors(layers.model),
            training_state=training_state,
            multi_layer_state=multi_layer_state,
            config=config,
        )
