"""`task=train`: what the family trains over a frozen base, from texts, and perhaps from a checkpoint to go on from."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from runner.checkpoints.detect import open_checkpoint
from runner.checkpoints.runs import find_run
from runner.config import TrainConfig, TrainingSettings
from runner.data.text import MAX_DOCUMENTS, Data
from runner.data.world import generate
from runner.errors import ConfigError
from runner.evaluation.base_models import Base, load_base
from runner.evaluation.placement import Placement
from runner.evaluation.tokenizers import TextTokenizer, encode, load_tokenizer
from runner.families.family import Family
from runner.installation import demo_run
from runner.progress import step_bar
from runner.results import Result, versions
from runner.tasks.context import Context
from runner.training.loop import TrainingInputs


def run(config: TrainConfig, context: Context) -> Result:
    """Train, leaving `checkpoint-<step>` directories in the run's own. Without `base` that of the demonstration.

    Raises ConfigError, CheckpointError or ModelError, each with one line that says what to do.
    """
    family: Family = config.family
    settings: TrainingSettings = config.train
    data: Data = config.data
    if family.name != settings.family:
        raise ConfigError(
            f"family={family.name} and train={settings.family} contradict each other; give family={settings.family} "
            "alone"
        )
    family.check_training(settings)
    resume_from = _checkpoint(config.train.resume_from)
    done = 0 if resume_from is None else open_checkpoint(resume_from).step or 0
    documents = _documents(data)
    with context.timed("load_base"):
        base, base_name = _base(config, resume_from, llama=family.llama_base)
    with context.timed("data"):
        named = family.training_texts(documents, Path(str(data.path)).stem if data.name == "text" else None)
        tokenizer = load_tokenizer(config.tokenizer, [base.path])
        texts = {name: _token_ids(tokenizer, base, own) for name, own in named.items()}

    def on_log(step: int, figures: Mapping[str, float]) -> None:
        context.tracker.log({"train/step": step, **{f"train/{name}": value for name, value in figures.items()}})

    bar = step_bar(context.progress, f"training {family.name}", settings.max_steps, done)
    with context.timed("train"), bar as on_step:
        trained = family.train(
            TrainingInputs(
                directory=context.directory,
                base=base,
                base_name=base_name,
                texts=texts,
                settings=settings,
                seed=config.seed,
                resume_from=resume_from,
                on_step=on_step,
                on_log=on_log,
            )
        )
    return Result(
        task="train",
        ckpt=str(trained.checkpoints[-1]),
        base=str(base.path),
        step=settings.max_steps,
        family=family.name,
        format=trained.format,
        metrics=trained.figures,
        findings=[*_left_out(data, documents), *trained.findings],
        timing=context.timing,
        versions=versions(),
        details={"checkpoints": [str(path) for path in trained.checkpoints], **trained.details()},
    )


def _checkpoint(resume_from: str | None) -> Path | None:
    """The checkpoint to go on from: the last one where a run is named."""
    if resume_from is None:
        return None
    path = Path(resume_from).expanduser()
    run_directory = find_run(path)
    return path if run_directory is None else run_directory.checkpoints[-1][1]


def _base(config: TrainConfig, resume_from: Path | None, *, llama: bool) -> tuple[Base, str]:
    """`base=`, else that of the checkpoint to go on from, else that of the demonstration; and what checkpoints say
    their base is: a path that holds from anywhere, or a hub name.

    Raises CheckpointError or ModelError.
    """
    placement = Placement(device=config.device, dtype=config.dtype)
    if config.base is None and resume_from is not None:
        checkpoint = open_checkpoint(resume_from)
        base = load_base(checkpoint, None, placement, llama=llama)
        return base, str(base.path.resolve() if checkpoint.local_base() else checkpoint.base_name)
    option = config.base or str(demo_run() / "base")
    base = load_base(None, option, placement, llama=llama)
    return base, str(base.path.resolve()) if Path(option).expanduser().is_dir() else option


def _documents(data: Data) -> list[str]:
    """The sentences of the built-in world, or the documents of `data.path`. Raises ConfigError for other data."""
    if data.name not in ("world", "text"):
        raise ConfigError(f"data={data.name} has no text to train on; give data=world, or data=text data.path=…")
    return list(generate().train) if data.name == "world" else data.documents()


def _token_ids(tokenizer: TextTokenizer, base: Base, documents: Sequence[str]) -> list[list[int]]:
    """Token ids of each document, the end of the text marked where the tokenizer has a mark for it."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return [[*encode(tokenizer, text, base.model.config.vocab_size).tolist(), *end] for text in documents]


def _left_out(data: Data, documents: Sequence[str]) -> list[str]:
    """What the reader should know of the data: a long file was not read to its end."""
    if data.name != "text" or len(documents) < MAX_DOCUMENTS:
        return []
    return [f"data=text reads at most {MAX_DOCUMENTS} documents: what follows them in {data.path} was not used"]
