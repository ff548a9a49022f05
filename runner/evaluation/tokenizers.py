"""Tokenizers: the checkpoint's own, else the base's; text to token ids."""

import zlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from runner.checkpoints.model_directory import has_tokenizer
from runner.errors import CheckpointError, ConfigError, ModelError
from runner.evaluation.base_models import TOKENIZER_PATTERNS, is_hub_name, snapshot

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(option: str | None, directories: Sequence[Path]) -> "PreTrainedTokenizerBase":
    """The tokenizer `option` (a directory, a tokenizers JSON or a hub name), else the first one in `directories`.

    Raises ConfigError where `option` names none, CheckpointError where there is none or its files are damaged.
    """
    if option is not None and Path(option).expanduser().is_file():
        from transformers import PreTrainedTokenizerFast

        try:
            return PreTrainedTokenizerFast(tokenizer_file=str(Path(option).expanduser()))
        except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
            raise ConfigError(f"tokenizer={option}: is no tokenizers JSON: {error}") from error
    if option is None:
        found = [directory for directory in directories if has_tokenizer(directory)]
        if not found:
            raise CheckpointError(f"{directories[-1]}: holds no tokenizer; give one as tokenizer=DIRECTORY")
        directory = found[0]
    else:
        directory = Path(option).expanduser()
        if not directory.is_dir():
            if not is_hub_name(option):
                raise ConfigError(f"tokenizer={option}: no such file or directory")
            directory = snapshot("tokenizer", option, download=True, patterns=TOKENIZER_PATTERNS)
        if not has_tokenizer(directory):
            raise ConfigError(f"tokenizer={option}: the directory holds no tokenizer files")
    stats = tuple((f.name, f.stat().st_mtime_ns, f.stat().st_size) for f in sorted(directory.glob("*token*")))
    return _load_once(directory.absolute(), stats)


@lru_cache(maxsize=4)
def _load_once(directory: Path, stats: tuple[tuple[str, int, int], ...]) -> "PreTrainedTokenizerBase":
    """The tokenizer of a directory whose files are as `stats` say: loading a large one takes half a second."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # as many kinds as there are tokenizer classes; the user needs the file
        raise CheckpointError(f"{directory}: its tokenizer cannot be loaded: {first_line(error)}") from error


def encode(tokenizer: "PreTrainedTokenizerBase", text: str, vocab_size: int, limit: int | None = None) -> torch.Tensor:
    """Token ids [T] of `text`, special tokens as the tokenizer adds them, at most `limit` of them.

    Raises ModelError for a text without tokens, or a token id that the model's embedding does not have.
    """
    ids = tokenizer(text, verbose=False)["input_ids"][:limit]
    if not ids:
        raise ModelError(f"the text {text!r} has no tokens in this tokenizer; give another prompt or tokenizer=")
    if max(ids) >= vocab_size:
        raise ModelError(
            f"the tokenizer gives token id {max(ids)}, but the model's vocabulary has {vocab_size}; "
            "it is another model's tokenizer: give the right one as tokenizer="
        )
    return torch.tensor(ids, dtype=torch.long)


def seeded_ids(text: str, vocab_size: int, length: int, seed: int = 0) -> torch.Tensor:
    """`length` uniform token ids [T] that stand for `text` where there is no tokenizer: the same for the same seed."""
    generator = torch.Generator().manual_seed(zlib.crc32(text.encode()) + (seed << 32))
    return torch.randint(vocab_size, (length,), generator=generator)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
