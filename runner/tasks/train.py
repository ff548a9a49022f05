"""`task=train`: NPT layers over a base, trained toward equivalence with the layers they stand in for; or experts."""

import random
from collections.abc import Mapping
from dataclasses import fields

from runner.checkpoints.detect import open_checkpoint
from runner.config import Family, TrainConfig
from runner.errors import ConfigError
from runner.families.lora_moe.settings import MoeTrainSettings
from runner.families.npt.save import train_run
from runner.families.npt.settings import EquivalenceSettings, TrainSettings
from runner.results import Result
from runner.tasks import training_inputs
from runner.tasks.context import Context
from runner.training.batches import document_batches
from runner.training.progress import step_bar
from runner.versions import versions

# A row for the tracker every so many steps, and at the last.
LOG_EVERY = 10


def run(config: TrainConfig, context: Context) -> Result:
    """Train, leaving `checkpoint-<step>` directories in the run's own. Without `base` that of the demonstration.

    Raises ConfigError, CheckpointError or ModelError, each with one line that says what to do.
    """
    _check_family(config)
    if isinstance(config.train, MoeTrainSettings):
        from runner.tasks.train_moe import run_moe  # imports transformers' Trainer

        return run_moe(config, context)
    wanted: TrainSettings = config.train
    settings = EquivalenceSettings(**{f.name: getattr(wanted, f.name) for f in fields(EquivalenceSettings)})
    resume_from = training_inputs.checkpoint_of(wanted.resume_from)
    documents = training_inputs.texts(config)
    with context.timed("load_base"):
        base, base_name = training_inputs.open_base(config, context, resume_from, llama=True)
    with context.timed("data"):
        ids = training_inputs.token_ids(config, base, documents)
        chooser = random.Random(config.seed)
        batches = document_batches(ids, settings.sequence_length, settings.batch_size, chooser)
    if not batches:
        raise ConfigError("the data holds no text to train on; give data=world, or data=text with data.path=FILE")
    done = 0 if resume_from is None else open_checkpoint(resume_from).step or 0
    with context.timed("train"), step_bar(context.progress, "training NPT layers", settings.max_steps, done) as show:

        def on_step(step: int, losses: Mapping[str, float]) -> None:
            show(step, losses)
            if step % LOG_EVERY == 0 or step == settings.max_steps:
                context.tracker.log({"train/step": step, **{f"train/{name}": x for name, x in losses.items()}})

        figures, checkpoints = train_run(
            context.directory,
            base,
            batches,
            settings,
            base_name=base_name,
            resume_from=resume_from,
            on_step=on_step,
        )
    return Result(
        task="train",
        ckpt=str(checkpoints[-1]),
        base=str(base.path),
        step=settings.max_steps,
        family="npt",
        format="npt_delta",
        metrics=figures,
        findings=training_inputs.findings(config, documents),
        timing=context.timing,
        versions=versions(),
        details={"checkpoints": [str(path) for path in checkpoints]},
    )


def _check_family(config: TrainConfig) -> None:
    """Raise ConfigError where `train=` was given beside another `family=`, which chooses it."""
    own = "lora_moe" if isinstance(config.train, MoeTrainSettings) else "npt"
    if isinstance(config.family, Family) and config.family.name != own:
        raise ConfigError(f"family={config.family.name} and train={own} contradict each other; give family={own} alone")
