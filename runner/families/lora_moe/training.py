"""Training of LoRA experts and their router over a frozen base; it leaves a run directory of lora_moe checkpoints."""

import hashlib
import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.utils import logging as transformers_logging

from runner.checkpoints.checkpoint import Checkpoint
from runner.checkpoints.detect import open_checkpoint
from runner.errors import CheckpointError, ConfigError, ModelError
from runner.evaluation.base_models import Base
from runner.families.lora_moe import checkpoint as lora_moe
from runner.families.lora_moe.checkpoint import MoeDetails
from runner.families.lora_moe.model import Adapter, LoraMoeForCausalLM, build_moe
from runner.families.lora_moe.skills import REDUCTIONS, Skill, add_skills, world_skills
from runner.families.lora_moe.state import TRAINER_STATE, read_skills
from runner.families.lora_moe.trainer import CheckpointWriter, MoeTrainer, StepReports
from runner.files import manifest
from runner.training.batches import NO_TEXT, cut
from runner.training.loop import OnStep, Trained, TrainingInputs, naming_the_last
from runner.training.optimization import TrainingSettings, check_whole
from runner.training.resume import require_state, require_steps_left

AUTO = "auto"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Sentences of the built-in world about one subject that make one document.
SENTENCES = 8
# The router starts with hardly a preference: by how much, in units of its logits.
ROUTER_SCALE = 0.02
# What the state of the optimizer and its schedule says again, whatever the settings say.
RESTORED = ("learning_rate", "weight_decay")
# How often a checkpoint is written, and how skills are told apart, changes no weight.
HARMLESS = ("save_every", "novelty", "novelty_threshold")


@dataclass(frozen=True, kw_only=True)
class MoeSettings(TrainingSettings):
    """The experts, and how they are trained.

    `experts`: their number, or `auto` for one for each new skill of the data (a training that goes on keeps those of
    its checkpoint). `target_modules`: what the experts change, by the last part of the modules' names. `temperature`
    divides the router's logits in training; `balance_weight`: how much the balance loss counts beside the
    cross-entropy. A skill is new where its `novelty` (max or median) cosine to the library is below
    `novelty_threshold`.
    """

    experts: int | str = 2
    lora_r: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] = TARGETS
    temperature: float = 2.0
    balance_weight: float = 0.1
    novelty: str = "max"
    novelty_threshold: float = 0.75
    max_steps: int = 200
    save_every: int = 100
    learning_rate: float = 5e-3
    warmup_steps: int = 20
    batch_size: int = 16

    family: ClassVar[str] = "lora_moe"
    at_least_one: ClassVar[tuple[str, ...]] = ("lora_r", *TrainingSettings.at_least_one)
    positive: ClassVar[tuple[str, ...]] = ("lora_alpha", "temperature", *TrainingSettings.positive)
    not_negative: ClassVar[tuple[str, ...]] = ("weight_decay", "balance_weight", "lora_dropout", "novelty_threshold")

    def __post_init__(self) -> None:
        names = self.target_modules
        if not isinstance(names, (list, tuple)) or not names or not all(isinstance(n, str) and n for n in names):
            raise ConfigError(f"train.target_modules={names}: give a list of modules, such as [q_proj,v_proj]")
        object.__setattr__(self, "target_modules", tuple(names))
        if self.experts != AUTO:
            check_whole("experts", self.experts, 1, or_else=AUTO)
        super().__post_init__()
        if self.lora_dropout >= 1:
            raise ConfigError(f"train.lora_dropout={self.lora_dropout}: must be below 1")
        if self.novelty_threshold > 1:
            raise ConfigError(f"train.novelty_threshold={self.novelty_threshold}: a cosine is at most 1")
        if self.novelty not in REDUCTIONS:
            raise ConfigError(f"train.novelty={self.novelty} is unknown; choose {' or '.join(REDUCTIONS)}")


@dataclass(frozen=True, kw_only=True)
class MoeTrainSettings(MoeSettings):
    """The `train` node of `task=train family=lora_moe`. `resume_from`: a checkpoint or a run to go on from."""

    resume_from: str | None = None


@dataclass(frozen=True, kw_only=True)
class TrainedExperts(Trained):
    """`model`: as last saved, in evaluation mode; `figures`: those of the last row of the log; `skills`: what was found
    of each."""

    model: LoraMoeForCausalLM
    skills: list[Skill]

    def details(self) -> dict[str, object]:
        """The skills."""
        return {"skills": [asdict(skill) for skill in self.skills]}


def check_routing(settings: MoeSettings, *, top_k: int | None, router_features: str | None, experts: bool) -> None:
    """Raise ConfigError for keys of `family` that `settings` do not allow, or that no checkpoint records."""
    if router_features is not None or not experts:
        raise ConfigError(
            "family.router_features and family.experts are no keys of task=train: a checkpoint does not record them; "
            "give them when it is measured"
        )
    # With train.experts=auto their number is known later, and the model checks it.
    if top_k is not None and isinstance(settings.experts, int) and not 1 <= top_k <= settings.experts:
        raise ConfigError(
            f"family.top_k={top_k}: with train.experts={settings.experts} it is a number from 1 to {settings.experts}"
        )


def documents_by_skill(documents: Sequence[str], name: str | None) -> dict[str, list[str]]:
    """The texts of each skill: all of the file `name`, or, without one, each subject of the built-in world."""
    if name is not None:
        return {name: list(documents)}
    return {
        subject: [" ".join(sentences[i : i + SENTENCES]) for i in range(0, len(sentences), SENTENCES)]
        for subject, sentences in world_skills(documents).items()
    }


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
    stopped. `on_step` is called after each step, `on_log` for each row of the Trainer's log; both with figures.
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
        findings = [f"train.resume_from: {text}" for text in differences(checkpoint.path, made_of)]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name or name.startswith("router."))
    checkpoints = CheckpointWriter(directory, base_name=base_name, skills=library, recipe=made_of)
    directory.mkdir(parents=True, exist_ok=True)
    devices = [base.model.device] if base.model.device.type == "cuda" else []
    with (
        tempfile.TemporaryDirectory(dir=directory, prefix=".trainer-") as scratch,
        torch.random.fork_rng(devices),
        _quiet(),
        naming_the_last(checkpoints.written, resume_from),
    ):
        trainer = MoeTrainer(model, rows, settings, Path(scratch), balance_weight=settings.balance_weight)
        reports = StepReports(trainer, on_step, on_log)
        trainer.add_callback(checkpoints)
        trainer.add_callback(reports)
        trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
    model.eval().requires_grad_(False)
    return TrainedExperts(
        format=lora_moe.NAME, model=model, figures=reports.last, checkpoints=checkpoints.written, skills=found,
        findings=findings,
    )  # fmt: skip


@contextmanager
def _quiet() -> Iterator[None]:
    """The Trainer sets how much transformers says for the whole process: put that back."""
    before = transformers_logging.get_verbosity()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def new_moe(base: Base, settings: MoeSettings, *, top_k: int | None = None) -> LoraMoeForCausalLM:
    """Experts that change nothing yet (B is zero, A as PEFT draws it) and a router; `settings.seed` gives the values.

    `settings.experts` must be a number. Raises ModelError where the base has no such modules, ConfigError for a top_k
    that the experts do not allow.
    """
    assert isinstance(settings.experts, int), "whoever knows the skills has counted them"
    model = base.model
    generator = torch.Generator().manual_seed(settings.seed)
    place: dict[str, Any] = {"device": model.device, "dtype": model.dtype}
    modules = _target_modules(base, settings)

    def adapter() -> Adapter:
        factors = {}
        for name, (inputs, outputs) in modules.items():
            bound = inputs**-0.5  # kaiming_uniform_(a=√5)
            a = (torch.rand(settings.lora_r, inputs, generator=generator) * 2 - 1) * bound
            b = torch.zeros(outputs, settings.lora_r)
            factors[name] = a.to(**place), b.to(**place), settings.lora_alpha / settings.lora_r
        return factors

    hidden = model.config.hidden_size
    weight = torch.randn(settings.experts, hidden, generator=generator) * ROUTER_SCALE / math.sqrt(hidden)
    router = weight.to(**place), torch.zeros(settings.experts, **place)
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
    missing = [name for name in (TRAINER_STATE, OPTIMIZER_NAME, SCHEDULER_NAME) if not (path / name).is_file()]
    require_state(path, missing or ([] if checkpoint.step is not None else ["step"]))
    assert checkpoint.step is not None
    try:
        TrainerState.load_from_json(str(path / TRAINER_STATE))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path / TRAINER_STATE}: is no state of the Trainer: {error}") from error
    require_steps_left(path, checkpoint.step, settings)
    own = [expert.adapter.settings for expert in details.experts]
    asked: dict[str, tuple[list[Any], Any]] = {
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
    options: dict[str, Any] = {"temperature": settings.temperature, "dropout": settings.lora_dropout}
    return build_moe(checkpoint, base, **(options if top_k is None else {**options, "top_k": top_k}))


def _spelled(values: list[Any]) -> str:
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


def recipe(settings: MoeSettings, rows: Sequence[Sequence[int]], base_name: str) -> dict[str, Any]:
    """Settings, base, and the SHA-256 of the rows of token ids in their order, as values of JSON."""
    text = json.dumps([list(row) for row in rows], separators=(",", ":"))
    data = hashlib.sha256(text.encode()).hexdigest()
    own = {each.name: getattr(settings, each.name) for each in fields(MoeSettings)}
    values = {"task": "train", "family": "lora_moe", "base": base_name, "data_sha256": data, **own}
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return plain


def differences(checkpoint: Path, now: Mapping[str, Any]) -> list[str]:
    """In what a training with the recipe `now` that goes on from `checkpoint` is not the one that wrote it.

    One line a difference; empty where it continues that training bit for bit. Raises CheckpointError for a damaged
    manifest.
    """
    if not (checkpoint / manifest.FILE_NAME).is_file():
        return [f"{checkpoint} has no {manifest.FILE_NAME}: what it was trained with is not known"]
    before = manifest.read(checkpoint).get("recipe")
    if not isinstance(before, Mapping):
        return [f"{checkpoint / manifest.FILE_NAME} has no recipe: what it was trained with is not known"]
    changed = [name for name in now if now[name] != before.get(name) and name not in HARMLESS]
    return [_difference(name, before.get(name), now[name]) for name in changed]


def _difference(name: str, before: Any, now: Any) -> str:
    if name == "data_sha256":
        return "goes on with other data than the checkpoint's: not what one uninterrupted training would have given"
    if name in RESTORED:
        return f"{name} stays {before}, as the checkpoint's optimizer has it, and is not {now}"
    return f"goes on with {name} {now} after {before}: not what one uninterrupted training would have given"
