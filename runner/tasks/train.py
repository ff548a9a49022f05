"""`task=train`: NPT layers over a base, trained toward equivalence with the layers they stand in for; or experts.

`task=train family=lora_moe`: LoRA experts and a router over a base.

What every training starts from: a base, texts, and perhaps a checkpoint to go on from.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path

from runner.checkpoints.detect import open_checkpoint
from runner.checkpoints.runs import find_run
from runner.config import TrainConfig
from runner.data.text import MAX_DOCUMENTS
from runner.data.world import generate
from runner.errors import ConfigError
from runner.evaluation.base_models import Base, load_base
from runner.evaluation.placement import Placement
from runner.evaluation.tokenizers import encode, load_tokenizer
from runner.families.family import Family
from runner.families.lora_moe import LoraMoe
from runner.families.lora_moe.settings import MoeSettings, MoeTrainSettings
from runner.families.lora_moe.skills import world_skills
from runner.families.lora_moe.training import train_moe
from runner.families.npt.save import train_run
from runner.families.npt.settings import EquivalenceSettings, TrainSettings
from runner.installation import demo_run
from runner.results import Result, versions
from runner.tasks.context import Context
from runner.training.batches import document_batches
from runner.training.progress import step_bar


def open_base(config: TrainConfig, resume_from: Path | None, *, llama: bool) -> tuple[Base, str]:
    """`base=`, else that of the checkpoint to go on from, else that of the demonstration; and what checkpoints say
    their base is: a path that holds from anywhere, or a hub name.

    Raises CheckpointError or ModelError.
    """
    place = Placement(device=config.device, dtype=config.dtype)
    if config.base is None and resume_from is not None:
        checkpoint = open_checkpoint(resume_from)
        base = load_base(checkpoint, None, place, llama=llama)
        return base, str(base.path.resolve() if checkpoint.local_base() else checkpoint.base_name)
    option = config.base or str(demo_run() / "base")
    base = load_base(None, option, place, llama=llama)
    return base, str(base.path.resolve()) if Path(option).expanduser().is_dir() else option


def texts(config: TrainConfig) -> list[str]:
    """The sentences of the built-in world, or the documents of `data.path`. Raises ConfigError for other data."""
    if config.data.name not in ("world", "text"):
        raise ConfigError(f"data={config.data.name} has no text to train on; give data=world, or data=text data.path=…")
    return list(generate().train) if config.data.name == "world" else config.data.documents()


def token_ids(config: TrainConfig, base: Base, documents: Sequence[str]) -> list[list[int]]:
    """Token ids of each document, the end of the text marked where the tokenizer has a mark for it."""
    tokenizer = load_tokenizer(config.tokenizer, [base.path])
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return [[*encode(tokenizer, text, base.model.config.vocab_size).tolist(), *end] for text in documents]


def findings(config: TrainConfig, documents: Sequence[str]) -> list[str]:
    """What the reader should know of the data: a long file was not read to its end."""
    if config.data.name != "text" or len(documents) < MAX_DOCUMENTS:
        return []
    return [f"data=text reads at most {MAX_DOCUMENTS} documents: what follows them in {config.data.path} was not used"]


def checkpoint_of(resume_from: str | None) -> Path | None:
    """The checkpoint to go on from: the last one where a run is named."""
    if resume_from is None:
        return None
    path = Path(resume_from).expanduser()
    run_directory = find_run(path)
    return path if run_directory is None else run_directory.checkpoints[-1][1]


# A row for the tracker every so many steps, and at the last.
LOG_EVERY = 10


def run(config: TrainConfig, context: Context) -> Result:
    """Train, leaving `checkpoint-<step>` directories in the run's own. Without `base` that of the demonstration.

    Raises ConfigError, CheckpointError or ModelError, each with one line that says what to do.
    """
    _check_family(config)
    if isinstance(config.train, MoeTrainSettings):
        return run_moe(config, context)
    wanted: TrainSettings = config.train
    settings = EquivalenceSettings(**{f.name: getattr(wanted, f.name) for f in fields(EquivalenceSettings)})
    resume_from = checkpoint_of(wanted.resume_from)
    documents = texts(config)
    with context.timed("load_base"):
        base, base_name = open_base(config, resume_from, llama=True)
    with context.timed("data"):
        ids = token_ids(config, base, documents)
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
        findings=findings(config, documents),
        timing=context.timing,
        versions=versions(),
        details={"checkpoints": [str(path) for path in checkpoints]},
    )


def _check_family(config: TrainConfig) -> None:
    """Raise ConfigError where `train=` was given beside another `family=`, which chooses it."""
    own = "lora_moe" if isinstance(config.train, MoeTrainSettings) else "npt"
    if isinstance(config.family, Family) and config.family.name != own:
        raise ConfigError(f"family={config.family.name} and train={own} contradict each other; give family={own} alone")


# Sentences of the built-in world about one subject that make one document.
SENTENCES = 8


def run_moe(config: TrainConfig, context: Context) -> Result:
    """Train, leaving `checkpoint-<step>` directories in the run's own. Without `base` that of the demonstration.

    Raises ConfigError, CheckpointError or ModelError, each with one line that says what to do.
    """
    settings = MoeSettings(**{f.name: getattr(config.train, f.name) for f in fields(MoeSettings)})
    top_k = _top_k(config.family, settings)
    resume_from = checkpoint_of(config.train.resume_from)
    done = 0 if resume_from is None else open_checkpoint(resume_from).step or 0
    documents = texts(config)
    with context.timed("load_base"):
        base, base_name = open_base(config, resume_from, llama=False)
    with context.timed("data"):
        skills = {name: token_ids(config, base, own) for name, own in _skills(config, documents).items()}

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
        findings=[*findings(config, documents), *trained.findings],
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


def _top_k(family: LoraMoe, settings: MoeSettings) -> int | None:
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
