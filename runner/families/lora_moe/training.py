"""Training of LoRA experts and their router over a frozen base; it leaves a run directory of lora_moe checkpoints."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerState

from runner.checkpoints.checkpoint import Checkpoint
from runner.checkpoints.detect import open_checkpoint
from runner.config import AUTO
from runner.errors import CheckpointError, ConfigError, DivergedError, ModelError
from runner.evaluation.base_models import Base
from runner.families.lora_moe import MoeSettings
from runner.families.lora_moe import checkpoint as lora_moe
from runner.families.lora_moe.checkpoint import MoeDetails
from runner.families.lora_moe.model import Adapter, LoraMoeForCausalLM, build_moe
from runner.families.lora_moe.save import save_moe
from runner.families.lora_moe.skills import Skill, add_skills
from runner.families.lora_moe.state import TRAINER_STATE, read_skills
from runner.files.tensors import load_pickle
from runner.training.batches import NO_TEXT, cut, endless_batches, epoch_batches, split_held_out
from runner.training.distributed import ALONE, World
from runner.training.inputs import Look, Trained, TrainingInputs
from runner.training.loop import Ended, Evaluation, Loop, LoopState, OnStep, Position, seeded
from runner.training.optimization import DIVERGED, optimizer_and_schedule, require_finite, stand_at
from runner.training.precision import precision_over
from runner.training.resume import (
    RESTORED,
    as_before,
    differences,
    load_optimizer,
    load_schedule,
    recipe,
    recipe_of,
    require_state,
    require_steps_left,
    taken_up,
)
from runner.training.sources import Ordered

# As the Trainer of transformers calls them.
OPTIMIZER, SCHEDULER, SCALER = "optimizer.pt", "scheduler.pt", "scaler.pt"
# The router starts with hardly a preference: by how much, in units of its logits.
ROUTER_SCALE = 0.02
# How often a checkpoint is written, and how skills are told apart, changes no weight.
HARMLESS = (
    "save_every", "log_every", "eval_every", "eval_batches", "sample_every", "shuffle_buffer", "novelty",
    "novelty_threshold",
)  # fmt: skip
# How much worse than the base alone, in nats a token, experts may be on the text that they are trained on.
WORSE = 1.0


@dataclass(frozen=True, kw_only=True)
class TrainedExperts(Trained):
    """`model`: as last saved, in evaluation mode; `figures`: those of the last row of the log; `skills`: what was found
    of each."""

    model: LoraMoeForCausalLM
    skills: list[Skill]

    def details(self) -> dict[str, object]:
        """The skills, and what every training leaves."""
        return {"skills": [asdict(skill) for skill in self.skills], **super().details()}


@dataclass(frozen=True, kw_only=True)
class Hearers:
    """Who hears of a training and looks at it, and the processes that take part."""

    on_step: OnStep | None = None
    on_log: OnStep | None = None
    measure: Look | None = None
    sample: Look | None = None
    world: World = ALONE


def train(inputs: TrainingInputs, *, top_k: int | None) -> TrainedExperts:
    """`task=train family=lora_moe`. Raises as `train_moe`."""
    settings = inputs.settings
    assert isinstance(settings, MoeSettings), "the task has compared family and settings"
    hearers = Hearers(
        on_step=inputs.on_step, on_log=inputs.on_log, measure=inputs.measure, sample=inputs.sample, world=inputs.world
    )
    return train_moe(
        inputs.directory, inputs.base, inputs.texts, settings,
        base_name=inputs.base_name, top_k=top_k, resume_from=inputs.resume_from, given=inputs.given, hearers=hearers,
    )  # fmt: skip


def train_moe(
    directory: Path,
    base: Base,
    skills: Mapping[str, Sequence[Sequence[int]]],
    settings: MoeSettings,
    *,
    base_name: str,
    top_k: int | None = None,
    resume_from: Path | None = None,
    given: Collection[str] | None = None,
    on_step: OnStep | None = None,
    on_log: OnStep | None = None,
    hearers: Hearers | None = None,
) -> TrainedExperts:
    """Train experts over `base` on documents (token ids) by skill, writing `directory`/checkpoint-<step>.

    `base_name`: what the checkpoints say their base is. `top_k`: experts a token in evaluation, by default one, or as
    the checkpoint says. `resume_from`: a checkpoint of the same training to go on from, bit for bit as if it had never
    stopped; `given`: the settings that are not to be as it has them, if they are others (None: all, but what the
    optimizer's state says again). `on_step` is called after each step, `on_log` for each row of the log.
    Raises CheckpointError, ConfigError or ModelError; DivergedError names the last good checkpoint.
    """
    hearers = hearers or Hearers(on_step=on_step, on_log=on_log)
    checkpoint = None if resume_from is None else open_checkpoint(resume_from, lora_moe.NAME)
    if checkpoint is not None and given is not None:
        settings, _ = as_before(settings, recipe_of(checkpoint.path) or {}, given, checkpoint.path)
    texts = {name: cut(documents, settings.sequence_length) for name, documents in skills.items()}
    texts = {name: own for name, own in texts.items() if own}
    rows = [row for own in texts.values() for row in own]
    if not rows:
        raise ConfigError(NO_TEXT)
    held: list[Sequence[int]] = []
    if settings.eval_every is not None:
        rows, held = split_held_out(rows, settings.eval_fraction)
    known = read_skills(checkpoint.details.skills) if checkpoint and checkpoint.details.skills else {}
    library, found = add_skills(
        base.model, texts, known, threshold=settings.novelty_threshold, reduction=settings.novelty
    )
    if settings.experts == AUTO:
        new = sum(skill.is_new for skill in found)
        settings = replace(settings, experts=checkpoint.details.num_experts if checkpoint else new)
    made_of = recipe(settings, rows, base_name)
    findings: list[str] = []
    restored = [name for name in RESTORED if given is None or name not in given]
    if checkpoint is None:
        model = new_moe(base, settings, top_k=top_k)
    else:
        model = reopened_moe(checkpoint, base, settings, top_k=top_k)
        said = differences(checkpoint.path, made_of, HARMLESS, restored)
        findings = [f"train.resume_from: {text}" for text in said]

    def on_checkpoint(step: int, add_state: Callable[[Path], None]) -> Path:
        target = directory / f"checkpoint-{step}"
        save_moe(model, target, base_name=base_name, step=step, skills=library, recipe=made_of, add_files=add_state)
        return target

    ended, row = train_experts(
        model, rows, settings, held=held, resume=checkpoint, restored=restored, hearers=hearers,
        on_checkpoint=on_checkpoint,
    )  # fmt: skip
    return TrainedExperts(
        format=lora_moe.NAME, model=model, figures=row, checkpoints=ended.checkpoints, skills=found, findings=findings,
        step=ended.step, best=ended.best, interrupted=ended.interrupted, skipped=ended.skipped,
    )  # fmt: skip


def train_experts(
    model: LoraMoeForCausalLM,
    rows: Sequence[Sequence[int]],
    settings: MoeSettings,
    *,
    on_checkpoint: Callable[[int, Callable[[Path], None]], Path],
    held: Sequence[Sequence[int]] = (),
    resume: Checkpoint | None = None,
    restored: Collection[str] = RESTORED,
    hearers: Hearers,
) -> tuple[Ended, dict[str, float]]:
    """Train the experts and the router of `model` in place on rows of ids; → the end, and the last row of the log.

    `on_checkpoint(step, add_state)` is called every `save_every` steps and after the last, for what is worth keeping;
    `add_state(directory)` writes what training goes on from. `held`: rows to measure on. `resume`: the checkpoint that
    `model` comes from; `restored`: what of its optimizer's settings stays. The global generator is left as it was.
    Raises as `train_moe`.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name or name.startswith("router."))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, schedule = optimizer_and_schedule(parameters, settings, model.device)
    size = settings.batch_size * hearers.world.size
    epoch = len(epoch_batches(rows, size, settings.seed, 0)) / settings.gradient_accumulation_steps
    state = TrainerState(
        max_steps=settings.max_steps,
        logging_steps=settings.log_every,
        save_steps=settings.save_every,
        train_batch_size=settings.batch_size,
        num_train_epochs=math.ceil(settings.max_steps / epoch),
        total_flos=0.0,
    )
    at = Position()
    if resume is not None:
        at, state.log_history = _load_state(resume, optimizer, schedule, settings, restored)
    precision = precision_over(model.dtype, settings.precision, model.device)
    source, _ = taken_up(
        lambda: Ordered(lambda start: _own_rows(endless_batches(rows, size, settings.seed, start), hearers.world)),
        {"position": at.batches},
    )
    last: list[torch.Tensor] = []
    drawn = at.batches

    def losses(ids: torch.Tensor, step: int) -> dict[str, torch.Tensor]:
        nonlocal drawn
        last[:] = [ids := ids.to(model.device)]
        # Dropout must not depend on what was drawn before: a resumed training draws the same.
        torch.manual_seed((settings.seed * 1_000_003 + drawn * hearers.world.size + hearers.world.rank) % 2**63)
        drawn += 1
        output = model(ids)
        cross_entropy = _cross_entropy(output.logits, ids)
        use = output.expert_weights.detach().flatten(0, -2).mean(0)
        return {
            "loss": cross_entropy + settings.balance_weight * output.balance_loss,
            "cross_entropy": cross_entropy,
            "balance": output.balance_loss,
            **{f"use_expert_{i}": share for i, share in enumerate(use)},
        }

    row: dict[str, float] = {}

    def on_log(step: int, figures: Mapping[str, float]) -> None:
        nonlocal row
        row = {("grad_norm" if n == "gradient_norm" else n): x for n, x in figures.items()}
        row["epoch"] = step / epoch
        state.log_history.append({**row, "step": step})
        if hearers.on_log is not None:
            hearers.on_log(step, row)

    def save(step: int, found: LoopState) -> Path:
        require_finite(parameters, step)
        if last:
            require_learning(model, last[0], step)
        state.global_step, state.epoch = step, step / epoch
        state.num_input_tokens_seen, state.best_metric = found["tokens"], found["best_val_loss"]

        def add_state(directory: Path) -> None:
            torch.save(found["optimizer_state_dict"], directory / OPTIMIZER)
            torch.save(found["scheduler_state_dict"], directory / SCHEDULER)
            state.save_to_json(str(directory / TRAINER_STATE))
            if found["scaler_state_dict"] is not None:
                torch.save(found["scaler_state_dict"], directory / SCALER)

        return on_checkpoint(step, add_state)

    def evaluate(step: int) -> Evaluation:
        model.eval()
        with torch.no_grad(), precision.passes():
            figures = {
                "eval_loss/total": _mean_cross_entropy(model, held[: settings.eval_batches * settings.batch_size])
            }
            figures |= hearers.measure(step, model) if hearers.measure is not None else {}
        model.train()
        if hearers.on_log is not None:
            hearers.on_log(step, figures)
        return Evaluation(figures=figures, score=figures["eval_loss/total"])

    def sample(step: int) -> None:
        assert hearers.sample is not None
        model.eval()
        with torch.no_grad(), precision.passes():
            hearers.sample(step, model)
        model.train()

    loop = Loop(
        settings=settings, parameters=parameters, optimizer=optimizer, schedule=schedule, source=source, losses=losses,
        save=save, evaluate=evaluate if held else None, sample=sample if hearers.sample else None,
        on_step=hearers.on_step, on_log=on_log, tokens=lambda ids: ids.numel(), precision=precision,
        world=hearers.world, resume_from=None if resume is None else resume.path,
    )  # fmt: skip
    model.train()
    with seeded(settings.seed, model.device):
        if resume is not None and precision.scaler is not None and (file := resume.path / SCALER).is_file():
            loop.restore({"scaler_state_dict": load_pickle(file, tensors="mmap")})
        ended = loop.run(at)
    model.eval().requires_grad_(False)
    return ended, row


def _own_rows(batches: Iterator[torch.Tensor], world: World) -> Iterator[torch.Tensor]:
    """Of each batch the rows of this process; all have as many, so that their mean is that of all."""
    for ids in batches:
        if len(ids) % world.size == 0:
            yield ids[world.rank :: world.size]


def _mean_cross_entropy(model: LoraMoeForCausalLM, rows: Sequence[Sequence[int]]) -> float:
    """In nats a token, over the rows."""
    summed, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([list(row)], device=model.device)
        summed += _cross_entropy(model(ids).logits, ids).item() * (len(row) - 1)
        count += len(row) - 1
    return summed / count


def _load_state(
    checkpoint: Checkpoint, optimizer: AdamW, schedule: LambdaLR, settings: MoeSettings, restored: Collection[str]
) -> tuple[Position, list[dict[str, float]]]:
    """Give optimizer and schedule the checkpoint's state, but for settings that are not `restored`; → where it stands,
    and the rows of the log up to there."""
    for name, load in (
        (OPTIMIZER, partial(load_optimizer, optimizer)),
        (SCHEDULER, partial(load_schedule, schedule)),
    ):
        try:
            load(load_pickle(checkpoint.path / name, tensors="mmap"))
        except ModelError as error:
            raise CheckpointError(f"{checkpoint.path / name}: is no state of this training: {error}") from error
    for group in optimizer.param_groups:
        if "weight_decay" not in restored:
            group["weight_decay"] = settings.weight_decay
        if "learning_rate" not in restored:
            group["initial_lr"] = settings.learning_rate
    if "learning_rate" not in restored:
        schedule.base_lrs = [settings.learning_rate] * len(schedule.base_lrs)
        stand_at(schedule, schedule.last_epoch)
    state = TrainerState.load_from_json(str(checkpoint.path / TRAINER_STATE))
    assert checkpoint.step is not None, "reopened_moe has looked"
    at = Position(
        step=checkpoint.step,
        batches=checkpoint.step * settings.gradient_accumulation_steps,
        tokens=state.num_input_tokens_seen or 0,
        best=state.best_metric,
    )
    return at, state.log_history


@torch.no_grad()
def require_learning(model: LoraMoeForCausalLM, ids: torch.Tensor, step: int) -> None:
    """Raise DivergedError where on `ids` [B, T] the logits are not finite or all equal, or much worse than the base's.

    The model is run as whoever opens the checkpoint runs it, in evaluation mode, and is left in its own mode.
    """
    before = model.training
    model.eval()
    try:
        logits = model(ids).logits
        own = _cross_entropy(logits, ids).item()
        with model.experts(False):
            base = _cross_entropy(model(ids).logits, ids).item()
    finally:
        model.train(before)
    if not math.isfinite(own):
        raise DivergedError(f"the logits are not finite after step {step}, not saved: {DIVERGED}")
    if bool(logits.amax() == logits.amin()):
        raise DivergedError(f"all logits are equal after step {step}, not saved: {DIVERGED}")
    if own > base + WORSE:
        raise DivergedError(
            f"the training diverged: after step {step} the cross-entropy is {own:.2f} nats a token, without the "
            f"experts {base:.2f}; not saved: {DIVERGED}"
        )


def _cross_entropy(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Of the next token, in nats, from logits [B, T, V]."""
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def new_moe(base: Base, settings: MoeSettings, *, top_k: int | None = None) -> LoraMoeForCausalLM:
    """Experts that change nothing yet (B is zero, A as PEFT draws it) and a router; `settings.seed` gives the values.

    `settings.experts` must be a number. Raises ModelError where the base has no such modules, ConfigError for a top_k
    that the experts do not allow.
    """
    assert isinstance(settings.experts, int), "whoever knows the skills has counted them"
    model = base.model
    generator = torch.Generator().manual_seed(settings.seed)
    modules = _target_modules(base, settings)

    def placed(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device=model.device, dtype=model.dtype)

    def adapter() -> Adapter:
        factors = {}
        for name, (inputs, outputs) in modules.items():
            bound = inputs**-0.5  # kaiming_uniform_(a=√5)
            a = (torch.rand(settings.lora_r, inputs, generator=generator) * 2 - 1) * bound
            b = torch.zeros(outputs, settings.lora_r)
            factors[name] = placed(a), placed(b), settings.lora_alpha / settings.lora_r
        return factors

    hidden = model.config.hidden_size
    weight = torch.randn(settings.experts, hidden, generator=generator) * ROUTER_SCALE / math.sqrt(hidden)
    router = placed(weight), placed(torch.zeros(settings.experts))
    adapters = [adapter() for _ in range(settings.experts)]
    return LoraMoeForCausalLM(
        model,
        adapters,
        router,
        top_k=lora_moe.TOP_K if top_k is None else top_k,
        temperature=settings.temperature,
        dropout=settings.lora_dropout,
    )


def reopened_moe(
    checkpoint: Checkpoint, base: Base, settings: MoeSettings, *, top_k: int | None = None
) -> LoraMoeForCausalLM:
    """A checkpoint's model, to go on training with `settings`, whose `experts` must be a number.

    Raises CheckpointError where it has no state to go on from, ConfigError where its experts are not those of
    `settings` or nothing is left to train, and what `build_moe` raises.
    """
    assert isinstance(settings.experts, int), "whoever knows the skills has counted them"
    details: MoeDetails = checkpoint.details
    path = checkpoint.path
    missing = [name for name in (TRAINER_STATE, OPTIMIZER, SCHEDULER) if not (path / name).is_file()]
    require_state(path, missing or ([] if checkpoint.step is not None else ["step"]))
    assert checkpoint.step is not None
    try:
        TrainerState.load_from_json(str(path / TRAINER_STATE))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path / TRAINER_STATE}: is no state of the Trainer: {error}") from error
    require_steps_left(path, checkpoint.step, settings)
    own = [expert.adapter.settings for expert in details.experts]
    asked: dict[str, tuple[list[object], object]] = {
        "experts": ([len(own)], settings.experts),
        "lora_r": ([each.r for each in own], settings.lora_r),
        "lora_alpha": ([each.alpha for each in own], settings.lora_alpha),
        "target_modules": ([each.targets for each in own], tuple(sorted(settings.target_modules))),
    }
    if differing := [name for name, (held, wanted) in asked.items() if set(held) != {wanted}]:
        shown = " and ".join(
            f"{name}={_spelled(asked[name][0])}, not {_spelled([asked[name][1]])}" for name in differing
        )
        raise ConfigError(f"train.resume_from={path}: it has {shown}; they must be the same")
    routing = {} if top_k is None else {"top_k": top_k}
    return build_moe(checkpoint, base, temperature=settings.temperature, dropout=settings.lora_dropout, **routing)


def _spelled(values: list[object]) -> str:
    """Each value once, as on the command line."""
    each = (
        f"[{','.join(v)}]" if isinstance(v, tuple) else f"{v:g}" if isinstance(v, float) else f"{v}" for v in values
    )
    return " and ".join(dict.fromkeys(each))


def _target_modules(base: Base, settings: MoeSettings) -> dict[str, tuple[int, int]]:
    """The linear modules that `settings` name, with inputs and outputs."""
    from runner.families.lora.model import linear_shapes

    linears = {name: shape for name, shape in linear_shapes(base.model).items() if not name.endswith("lm_head")}
    ends = {name.rpartition(".")[2] for name in linears}
    if unknown := sorted(set(settings.target_modules) - ends):
        raise ModelError(
            f"train.target_modules: {base.path} has no linear module {', '.join(unknown)}; it has "
            f"{', '.join(sorted(ends)) or 'none'}"
        )
    return {name: shape for name, shape in linears.items() if name.rpartition(".")[2] in settings.target_modules}
