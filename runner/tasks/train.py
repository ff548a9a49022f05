"""`task=train`: NPT layers over a base, trained toward equivalence with the layers they stand in for."""

import random
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

from runner.bases import Base, load_base
from runner.checkpoints.detect import open_checkpoint
from runner.checkpoints.runs import find_run
from runner.config import TrainConfig
from runner.data.text import MAX_DOCUMENTS
from runner.data.world import generate
from runner.errors import ConfigError
from runner.results import Result
from runner.tasks.context import Context
from runner.tasks.naming import demo_run
from runner.tokens import encode, load_tokenizer
from runner.training.batches import document_batches
from runner.training.progress import step_bar
from runner.training.runs import train_run
from runner.training.settings import EquivalenceSettings, TrainSettings
from runner.versions import versions

# A row for the tracker every so many steps, and at the last.
LOG_EVERY = 10


def run(config: TrainConfig, context: Context) -> Result:
    """Train, leaving `checkpoint-<step>` directories in the run's own. Without `base` that of the demonstration.

    Raises ConfigError, CheckpointError or ModelError, each with one line that says what to do.
    """
    wanted: TrainSettings = config.train
    settings = EquivalenceSettings(**{f.name: getattr(wanted, f.name) for f in fields(EquivalenceSettings)})
    resume_from = _checkpoint(wanted.resume_from)
    with context.timed("load_base"):
        base_option = config.base or str(demo_run(config.cache, context.progress) / "base")
        base = load_base(None, base_option, device=config.device, dtype=config.dtype, llama=True)
    with context.timed("data"):
        documents = _documents(config, base)
        chooser = random.Random(config.seed)
        batches = document_batches(documents, settings.sequence_length, settings.batch_size, chooser)
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
            base_name=_name(config.base, base),
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
        findings=[
            f"data=text reads at most {MAX_DOCUMENTS} documents: what follows them in {config.data.path} was not used"
        ]
        if config.data.name == "text" and len(documents) == MAX_DOCUMENTS
        else [],
        timing=context.timing,
        versions=versions(),
        details={"checkpoints": [str(path) for path in checkpoints]},
    )


def _documents(config: TrainConfig, base: Base) -> list[list[int]]:
    """Token ids of each document, the end of the text marked where the tokenizer has a mark for it."""
    if config.data.name not in ("world", "text"):
        raise ConfigError(f"data={config.data.name} has no text to train on; give data=world, or data=text data.path=…")
    texts = generate().train if config.data.name == "world" else config.data.documents()
    tokenizer = load_tokenizer(config.tokenizer, [base.path])
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return [[*encode(tokenizer, text, base.model.config.vocab_size).tolist(), *end] for text in texts]


def _checkpoint(resume_from: str | None) -> Path | None:
    """The checkpoint to go on from: the last one where a run is named."""
    if resume_from is None:
        return None
    path = Path(resume_from).expanduser()
    run_directory = find_run(path)
    return path if run_directory is None else run_directory.checkpoints[-1][1]


def _name(option: str | None, base: Base) -> str:
    """What the checkpoints say their base is: a path that holds from anywhere, or the hub name that was given."""
    return str(base.path.resolve()) if option is None or Path(option).expanduser().is_dir() else option
