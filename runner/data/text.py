"""What models are measured on: prompts, and documents of text."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from runner.errors import ConfigError

if TYPE_CHECKING:
    import torch

MAX_DOCUMENTS = 200


@dataclass(frozen=True, kw_only=True)
class Data:
    """`prompts` give the figures everyone compares; `name` says where documents of text come from, if any.

    `max_tokens`: how many are read of token shards, from the first one on. Raises ConfigError for what cannot be read.
    """

    name: str
    prompts: tuple[str, ...]
    layer_prompt: str
    path: str | None = None
    max_tokens: int = 65536

    def __post_init__(self) -> None:
        given = [*self.prompts, self.layer_prompt] if isinstance(self.prompts, (list, tuple)) else [None]
        if not self.prompts or not all(isinstance(p, str) and p for p in given):
            raise ConfigError("data.prompts must be a list of texts that are not empty, data.layer_prompt such a text")
        if self.name == "text" and not self.path:
            raise ConfigError(
                "data=text needs data.path=FILE, a text file whose documents are separated by empty lines"
            )
        if self.name == "shards" and not self.path:
            raise ConfigError("data=shards needs data.path: a .bin file of tokens, a directory of them, or a glob")
        if not isinstance(self.max_tokens, int) or isinstance(self.max_tokens, bool) or self.max_tokens < 2:
            raise ConfigError(f"data.max_tokens={self.max_tokens}: give a whole number, at least 2")
        if self.name == "text" and not Path(str(self.path)).expanduser().is_file():
            raise ConfigError(f"data.path={self.path}: no such file")

    def documents(self, seed: int = 0) -> list[str]:
        """The documents of text, at most `MAX_DOCUMENTS`; none for the plain prompts."""
        if self.name == "world":
            return world_documents(seed)
        if self.path is None or self.name == "shards":
            return []
        try:
            text = Path(self.path).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"data.path={self.path}: cannot be read as UTF-8 text: {error}") from error
        documents = [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]
        if not documents:
            raise ConfigError(f"data.path={self.path}: holds no text")
        return documents[:MAX_DOCUMENTS]

    def token_sequences(self, length: int, vocab_size: int) -> "list[torch.Tensor]":
        """The first `max_tokens` of the shards in sequences [T] of `length`. Raises ConfigError or CheckpointError."""
        from runner.data.shards import read_shards, sequences

        return sequences(read_shards(str(self.path), self.max_tokens, vocab_size), length)


def world_documents(seed: int = 0, sentences: int = 8) -> list[str]:
    """Held-out sentences of the built-in world, `sentences` to a document."""
    from runner.data.world import generate

    held_out = generate(seed).held_out
    groups = [held_out[i : i + sentences] for i in range(0, len(held_out), sentences)]
    return [" ".join(group) for group in groups[:MAX_DOCUMENTS]]
