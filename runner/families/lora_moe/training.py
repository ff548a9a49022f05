"""Training of LoRA experts and their router that leaves a run directory of lora_moe checkpoints."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from runner.checkpoints.detect import open_checkpoint
from runner.errors import ConfigError
from runner.evaluation.base_models import Base
from runner.families.lora_moe import checkpoint as lora_moe
from runner.families.lora_moe.callback import MoeCheckpoints, News
from runner.families.lora_moe.data import Row, cut
from runner.families.lora_moe.initial import new_moe, reopened_moe
from runner.families.lora_moe.model import LoraMoeForCausalLM
from runner.families.lora_moe.recipe import differences, recipe
from runner.families.lora_moe.settings import AUTO, MoeSettings
from runner.families.lora_moe.skills import Skill, add_skills
from runner.families.lora_moe.state import read_skills
from runner.families.lora_moe.trainer import MoeTrainer
from runner.training.optimization import naming_the_last

OnFigures = Callable[[int, Mapping[str, float]], None]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a training left: the model as last saved, in evaluation mode; the figures of its last log row; the
    checkpoints; what it found of each skill; what the reader should know of it."""

    model: LoraMoeForCausalLM
    figures: dict[str, float]
    checkpoints: list[Path]
    skills: list[Skill]
    findings: list[str]


def train_moe(
    directory: Path,
    base: Base,
    skills: Mapping[str, Sequence[Row]],
    settings: MoeSettings,
    *,
    base_name: str,
    top_k: int | None = None,
    resume_from: Path | None = None,
    on_step: OnFigures | None = None,
    on_log: OnFigures | None = None,
) -> Trained:
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
        raise ConfigError("the data holds no text to train on; give data=world, or data=text with data.path=FILE")
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
    checkpoints = MoeCheckpoints(directory, base_name=base_name, skills=library, recipe=made_of)
    directory.mkdir(parents=True, exist_ok=True)
    devices = [base.model.device] if base.model.device.type == "cuda" else []
    with (
        tempfile.TemporaryDirectory(dir=directory, prefix=".trainer-") as scratch,
        torch.random.fork_rng(devices),
        _quiet(),
        naming_the_last(checkpoints.written, resume_from),
    ):
        trainer = MoeTrainer(model, rows, settings, Path(scratch))
        news = News(lambda: trainer.figures, on_step, on_log)
        trainer.add_callback(checkpoints)
        trainer.add_callback(news)
        trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
    model.eval().requires_grad_(False)
    return Trained(model=model, figures=news.last, checkpoints=checkpoints.written, skills=found, findings=findings)


@contextmanager
def _quiet() -> Iterator[None]:
    """The Trainer sets how much transformers says for the whole process: put that back."""
    before = transformers_logging.get_verbosity()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
