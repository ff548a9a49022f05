"""Training of LoRA experts and their router over a frozen base; it leaves a run directory of lora_moe checkpoints."""

import math
from collections.abc import Callable, Mapping, Sequence
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
from runner.training.batches import NO_TEXT, cut, endless_batches, epoch_batches
from runner.training.loop import LOG_EVERY, OnStep, Trained, TrainingInputs, is_logged, naming_the_last, take_steps
from runner.training.optimization import DIVERGED, optimizer_and_schedule, require_finite
from runner.training.resume import (
    differences,
    load_optimizer,
    load_schedule,
    recipe,
    require_state,
    require_steps_left,
)

OPTIMIZER, SCHEDULER = "optimizer.pt", "scheduler.pt"  # as the Trainer of transformers calls them
# The router starts with hardly a preference: by how much, in units of its logits.
ROUTER_SCALE = 0.02
# How often a checkpoint is written, and how skills are told apart, changes no weight.
HARMLESS = ("save_every", "novelty", "novelty_threshold")
# How much worse than the base alone, in nats a token, experts may be on the text that they are trained on.
WORSE = 1.0


@dataclass(frozen=True, kw_only=True)
class TrainedExperts(Trained):
    """`model`: as last saved, in evaluation mode; `figures`: those of the last row of the log; `skills`: what was found
    of each."""

    model: LoraMoeForCausalLM
    skills: list[Skill]

    def details(self) -> dict[str, object]:
        """The skills."""
        return {"skills": [asdict(skill) for skill in self.skills]}


def train(inputs: TrainingInputs, *, top_k: int | None) -> TrainedExperts:
    """`task=train family=lora_moe`. Raises as `train_moe`."""
    settings = inputs.settings
    assert isinstance(settings, MoeSettings), "the task has compared family and settings"
    return train_moe(
        inputs.directory, inputs.base, inputs.texts, settings,
        base_name=inputs.base_name, top_k=top_k, resume_from=inputs.resume_from,
        on_step=inputs.on_step, on_log=inputs.on_log,
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
    on_step: OnStep | None = None,
    on_log: OnStep | None = None,
) -> TrainedExperts:
    """Train experts over `base` on documents (token ids) by skill, writing `directory`/checkpoint-<step>.

    `base_name`: what the checkpoints say their base is. `top_k`: experts a token in evaluation, by default one, or as
    the checkpoint says. `resume_from`: a checkpoint of the same training to go on from, bit for bit as if it had never
    stopped. `on_step` is called after each step, `on_log` for each row of the log; both with figures.
    Raises CheckpointError, ConfigError or ModelError; DivergedError names the last good checkpoint.
    """
    texts = {name: cut(documents, settings.sequence_length) for name, documents in skills.items()}
    texts = {name: own for name, own in texts.items() if own}
    rows = [row for own in texts.values() for row in own]
    if not rows:
        raise ConfigError(NO_TEXT)
    checkpoint = None if resume_from is None else open_checkpoint(resume_from, lora_moe.NAME)
    known = read_skills(checkpoint.details.skills) if checkpoint and checkpoint.details.skills else {}
    library, found = add_skills(
        base.model, texts, known, threshold=settings.novelty_threshold, reduction=settings.novelty
    )
    if settings.experts == AUTO:
        new = sum(skill.is_new for skill in found)
        settings = replace(settings, experts=checkpoint.details.num_experts if checkpoint else new)
    made_of = recipe(settings, rows, base_name)
    findings: list[str] = []
    if checkpoint is None:
        model = new_moe(base, settings, top_k=top_k)
    else:
        model = reopened_moe(checkpoint, base, settings, top_k=top_k)
        findings = [f"train.resume_from: {text}" for text in differences(checkpoint.path, made_of, HARMLESS)]
    written: list[Path] = []

    def on_checkpoint(step: int, add_state: Callable[[Path], None]) -> None:
        target = directory / f"checkpoint-{step}"
        save_moe(model, target, base_name=base_name, step=step, skills=library, recipe=made_of, add_files=add_state)
        written.append(target)

    with naming_the_last(written, resume_from):
        figures = train_experts(
            model, rows, settings, resume=checkpoint, on_step=on_step, on_log=on_log, on_checkpoint=on_checkpoint
        )
    return TrainedExperts(
        format=lora_moe.NAME, model=model, figures=figures, checkpoints=written, skills=found, findings=findings
    )


def train_experts(
    model: LoraMoeForCausalLM,
    rows: Sequence[Sequence[int]],
    settings: MoeSettings,
    *,
    on_checkpoint: Callable[[int, Callable[[Path], None]], None],
    resume: Checkpoint | None = None,
    on_step: OnStep | None = None,
    on_log: OnStep | None = None,
) -> dict[str, float]:
    """Train the experts and the router of `model` in place on rows of token ids; → the last row of the log.

    `on_checkpoint(step, add_state)` is called every `save_every` steps and after the last, for what is worth keeping;
    `add_state(directory)` writes what training goes on from. `resume`: the checkpoint that `model` comes from. The
    global generator is left as it was. Raises as `train_moe`.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name or name.startswith("router."))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, schedule = optimizer_and_schedule(parameters, settings, model.device)
    epoch = len(epoch_batches(rows, settings.batch_size, settings.seed, 0))
    state = TrainerState(
        max_steps=settings.max_steps,
        logging_steps=LOG_EVERY,
        save_steps=settings.save_every,
        train_batch_size=settings.batch_size,
        num_train_epochs=math.ceil(settings.max_steps / epoch),
        total_flos=0.0,
    )
    if resume is not None:
        state.global_step, state.log_history = _load_state(resume, optimizer, schedule)
    batches = endless_batches(rows, settings.batch_size, settings.seed, state.global_step)
    ids = torch.empty(0)

    def losses(step: int) -> dict[str, torch.Tensor]:
        nonlocal ids
        ids = next(batches).to(model.device)
        # Dropout must not depend on what was drawn before: a resumed training draws the same.
        torch.manual_seed((settings.seed * 1_000_003 + step - 1) % 2**63)
        output = model(ids)
        cross_entropy = _cross_entropy(output.logits, ids)
        use = output.expert_weights.detach().flatten(0, -2).mean(0)
        return {
            "loss": cross_entropy + settings.balance_weight * output.balance_loss,
            "cross_entropy": cross_entropy,
            "balance": output.balance_loss,
            **{f"use_expert_{i}": share for i, share in enumerate(use)},
            "learning_rate": torch.tensor(schedule.get_last_lr()[0], dtype=torch.float64),
        }

    def add_state(directory: Path) -> None:
        torch.save(optimizer.state_dict(), directory / OPTIMIZER)
        torch.save(schedule.state_dict(), directory / SCHEDULER)
        state.save_to_json(str(directory / TRAINER_STATE))

    row: dict[str, float] = {}
    steps = range(state.global_step + 1, settings.max_steps + 1)
    taken = take_steps(steps, parameters, [(optimizer, schedule)], losses, clip=settings.gradient_clip_value)
    model.train()
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        for step, figures in taken:
            state.global_step, state.epoch = step, step / epoch
            if on_step is not None:
                on_step(step, figures)
            if is_logged(step, settings):
                row = {("grad_norm" if n == "gradient_norm" else n): x for n, x in figures.items()}
                row["epoch"] = state.epoch
                state.log_history.append({**row, "step": step})
                if on_log is not None:
                    on_log(step, row)
            if settings.is_saved(step):
                require_finite(parameters, step)
                require_learning(model, ids, step)
                on_checkpoint(step, add_state)
    model.eval().requires_grad_(False)
    return row


def _load_state(checkpoint: Checkpoint, optimizer: AdamW, schedule: LambdaLR) -> tuple[int, list[dict[str, float]]]:
    """Give optimizer and schedule the checkpoint's state; → its step, and the rows of the log up to there."""
    for name, load in (
        (OPTIMIZER, partial(load_optimizer, optimizer)),
        (SCHEDULER, partial(load_schedule, schedule)),
    ):
        try:
            load(load_pickle(checkpoint.path / name, tensors="mmap"))
        except ModelError as error:
            raise CheckpointError(f"{checkpoint.path / name}: is no state of this training: {error}") from error
    state = TrainerState.load_from_json(str(checkpoint.path / TRAINER_STATE))
    assert checkpoint.step is not None, "reopened_moe has looked"
    return checkpoint.step, state.log_history


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
