"""What every training starts from: a base, texts, and perhaps a checkpoint to go on from."""

from collections.abc import Sequence
from pathlib import Path

from runner.checkpoints.detect import open_checkpoint
from runner.checkpoints.runs import find_run
from runner.config import TrainConfig
from runner.data.text import MAX_DOCUMENTS
from runner.data.world import generate
from runner.errors import ConfigError
from runner.evaluation.base_models import Base, load_base
from runner.evaluation.tokenizers import encode, load_tokenizer
from runner.tasks.context import Context
from runner.tasks.naming import demo_run


def open_base(config: TrainConfig, context: Context, resume_from: Path | None, *, llama: bool) -> tuple[Base, str]:
    """`base=`, else that of the checkpoint to go on from, else that of the demonstration; and what checkpoints say
    their base is: a path that holds from anywhere, or a hub name.

    Raises CheckpointError or ModelError.
    """
    place = {"device": config.device, "dtype": config.dtype}
    if config.base is None and resume_from is not None:
        checkpoint = open_checkpoint(resume_from)
        base = load_base(checkpoint, None, **place, llama=llama)
        return base, str(base.path.resolve() if checkpoint.local_base() else checkpoint.base_name)
    option = config.base or str(demo_run(config.cache, context.progress) / "base")
    base = load_base(None, option, **place, llama=llama)
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
