"""`task=train family=lora_moe`: LoRA experts and a router over a base."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path

from runner.checkpoints.detect import open_checkpoint
from runner.config import Family, TrainConfig
from runner.errors import ConfigError
from runner.families.lora_moe.settings import MoeSettings
from runner.families.lora_moe.skills import world_skills
from runner.families.lora_moe.training import train_moe
from runner.results import Result
from runner.tasks import training_inputs
from runner.tasks.context import Context
from runner.training.progress import step_bar
from runner.versions import versions

# Sentences of the built-in world about one subject that make one document.
SENTENCES = 8


def run_moe(config: TrainConfig, context: Context) -> Result:
    """Train, leaving `checkpoint-<step>` directories in the run's own. Without `base` that of the demonstration.

    Raises ConfigError, CheckpointError or ModelError, each with one line that says what to do.
    """
    settings = MoeSettings(**{f.name: getattr(config.train, f.name) for f in fields(MoeSettings)})
    top_k = _top_k(config.family, settings)
    resume_from = training_inputs.checkpoint_of(config.train.resume_from)
    done = 0 if resume_from is None else open_checkpoint(resume_from).step or 0
    documents = training_inputs.texts(config)
    with context.timed("load_base"):
        base, base_name = training_inputs.open_base(config, context, resume_from, llama=False)
    with context.timed("data"):
        skills = {
            name: training_inputs.token_ids(config, base, own) for name, own in _skills(config, documents).items()
        }

    def on_log(step: int, figures: Mapping[str, float]) -> None:
        context.tracker.log({"train/step": step, **{f"train/{name}": value for name, value in figures.items()}})

    with context.timed("train"), step_bar(context.progress, "training experts", settings.max_steps, done) as on_step:
        trained = train_moe(
            context.directory,
            base,
            skills,
            settings,
            base_name=base_name,
            top_k=top_k,
            resume_from=resume_from,
            on_step=on_step,
            on_log=on_log,
        )
    return Result(
        task="train",
        ckpt=str(trained.checkpoints[-1]),
        base=str(base.path),
        step=settings.max_steps,
        family="lora_moe",
        format="lora_moe",
        metrics=trained.figures,
        findings=[*training_inputs.findings(config, documents), *trained.findings],
        timing=context.timing,
        versions=versions(),
        details={
            "checkpoints": [str(path) for path in trained.checkpoints],
            "skills": [asdict(skill) for skill in trained.skills],
        },
    )


def _skills(config: TrainConfig, documents: list[str]) -> dict[str, list[str]]:
    """The texts of each skill: a subject of the built-in world, or all of a file."""
    if config.data.name == "text":
        return {Path(str(config.data.path)).stem: documents}
    return {
        name: [" ".join(sentences[i : i + SENTENCES]) for i in range(0, len(sentences), SENTENCES)]
        for name, sentences in world_skills(documents).items()
    }


def _top_k(family: Family, settings: MoeSettings) -> int | None:
    """`family.top_k`. Raises ConfigError for one that the experts do not allow, and for what no checkpoint records."""
    if family.router_features is not None or not family.experts:
        raise ConfigError(
            "family.router_features and family.experts are no keys of task=train: a checkpoint does not record them; "
            "give them when it is measured"
        )
    # With train.experts=auto their number is known later, and the model checks it.
    if family.top_k is not None and isinstance(settings.experts, int) and not 1 <= family.top_k <= settings.experts:
        raise ConfigError(
            f"family.top_k={family.top_k}: with train.experts={settings.experts} it is a number from 1 to "
            f"{settings.experts}"
        )
    return family.top_k
