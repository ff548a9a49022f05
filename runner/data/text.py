"""What models are measured on: prompts, and documents of text."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING

from runner.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from runner.data.streams import Part

MAX_DOCUMENTS = 200


@dataclass(frozen=True, kw_only=True)
class Data:
    """`prompts` give the figures everyone compares; `name` says where documents of text come from, if any.

    `column`: of JSON lines and parquet, what holds the text; `mix`: paths with their weights in the place of `path`.
    `max_tokens`: how many are read of token shards, from the first one on. Raises ConfigError for what cannot be read.
    """

    name: str
    prompts: tuple[str, ...]
    layer_prompt: str
    path: str | None = None
    column: str = "text"
    mix: Mapping[str, float] | None = None
    max_tokens: int = 65536

    def __post_init__(self) -> None:
        given = [*self.prompts, self.layer_prompt] if isinstance(self.prompts, (list, tuple)) else [None]
        if not self.prompts or not all(isinstance(p, str) and p for p in given):
            raise ConfigError("data.prompts must be a list of texts that are not empty, data.layer_prompt such a text")
        if self.name == "text" and not self.path and not self.mix:
            raise ConfigError(
                "data=text needs data.path=FILE, a text file whose documents are separated by empty lines, a file of "
                "JSON lines or parquet, or a directory or glob of such files"
            )
        if self.name in ("prompts", "world") and (self.path or self.mix):
            key = "path" if self.path else "mix"
            raise ConfigError(f"data.{key} says nothing with data={self.name}: add data=text or data=shards")
        if self.name == "shards" and not self.path:
            raise ConfigError("data=shards needs data.path: a .bin file of tokens, a directory of them, or a glob")
        if not isinstance(self.max_tokens, int) or isinstance(self.max_tokens, bool) or self.max_tokens < 2:
            raise ConfigError(f"data.max_tokens={self.max_tokens}: give a whole number, at least 2")
        if not isinstance(self.column, str) or not self.column:
            raise ConfigError(f"data.column={self.column}: give the name of a column")
        if self.mix is not None and not (
            isinstance(self.mix, Mapping) and self.mix and all(map(_is_weight, self.mix.values()))
        ):
            raise ConfigError(f"data.mix={self.mix}: give paths with their weights above 0, as {{a.jsonl:0.7,b/:0.3}}")
        if self.name == "text":
            self.corpora()

    def corpora(self) -> "list[tuple[list[Part], float]]":
        """The parts of each corpus of text, and its weight. Raises ConfigError for one that is not there."""
        from runner.data.streams import find_parts

        return [(find_parts(str(path)), float(weight)) for path, weight in (self.mix or {str(self.path): 1.0}).items()]

    def documents(self, seed: int = 0) -> list[str]:
        """The documents of text, at most `MAX_DOCUMENTS`; none for the plain prompts."""
        if self.name == "world":
            return world_documents(seed)
        if self.name != "text":
            return []
        from runner.data.streams import Documents

        found = chain.from_iterable(Documents(parts, self.column, seed=0).epoch() for parts, _ in self.corpora())
        documents = [text.strip() for text in islice(found, MAX_DOCUMENTS)]
        if not documents:
            raise ConfigError(f"data.path={self.path}: holds no text")
        return documents

    def token_sequences(self, length: int, vocab_size: int) -> "list[torch.Tensor]":
        """The first `max_tokens` of the shards in sequences [T] of `length`. Raises ConfigError or CheckpointError."""
        from runner.data.shards import read_shards, sequences

        return sequences(read_shards(str(self.path), self.max_tokens, vocab_size), length)


def _is_weight(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def world_documents(seed: int = 0, sentences: int = 8) -> list[str]:
    """Held-out sentences of the built-in world, `sentences` to a document."""
    from runner.data.world import generate

    held_out = generate(seed).held_out
    groups = [held_out[i : i + sentences] for i in range(0, len(held_out), sentences)]
    return [" ".join(group) for group in groups[:MAX_DOCUMENTS]]
