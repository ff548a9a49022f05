"""A model with what turns text into its ids and ids into text: samples of prompts, streamed or in batches."""

import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from runner.errors import ConfigError, ModelError
from runner.evaluation.decoding import Continuation, Feed, extend
from runner.evaluation.evaluator import SwitchableLayers
from runner.evaluation.forward import device_of, limits, logit_count
from runner.evaluation.tokenizers import TextTokenizer, first_line
from runner.generation.prompts import Message, Prompt
from runner.generation.settings import AUTO, Settings
from runner.generation.text import CONTEXT, TextStream
from runner.metrics.generation import repetition
from runner.results import JsonObject


@dataclass(kw_only=True)
class _Row:
    """One sample while it grows."""

    prompt: Prompt
    growing: Continuation
    stream: TextStream
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Speaker:
    """`model` with its `tokenizer` (None: ids stand for text). `eos`: the ids that end a text."""

    model: nn.Module
    tokenizer: TextTokenizer | None
    eos: frozenset[int] = field(default_factory=frozenset)

    @property
    def vocab_size(self) -> int:
        """How many tokens the model's embedding knows."""
        return limits(self.model)[0]

    @property
    def max_length(self) -> int | None:
        """How many positions the model has; None for any number."""
        return limits(self.model)[1]

    @property
    def drawable(self) -> int:
        """Ids from there on are never drawn: the embedding does not know them, or a GPT's vocabulary is padded."""
        known = min(self.vocab_size, logit_count(self.model))
        padded = hasattr(self.model.config, "head_rows")
        return min(known, self.tokenizer.size) if padded and self.tokenizer is not None else known

    def feed(self, settings: Settings, *, spare: int = 0) -> Feed:
        """An empty one; `spare`: positions for what may follow the first continuation."""
        return Feed(self.model, device_of(self.model), cache=settings.cache, spare=spare)

    def has_template(self, settings: Settings) -> bool:
        """Whether prompts are put into the tokenizer's chat template. Raises ConfigError where one is required."""
        there = self.tokenizer is not None and bool(self.tokenizer.chat_template)
        if settings.chat is True and not there:
            raise ConfigError(
                "generate.chat=true: the tokenizer has no chat template; leave it out, or give tokenizer="
            )
        return there and settings.chat in (AUTO, True)

    def encode(self, prompt: Prompt, settings: Settings) -> list[int]:
        """The token ids of a prompt. Raises ConfigError or ModelError for one that the model cannot be given."""
        if prompt.ids is not None:
            ids = list(prompt.ids)
        elif prompt.messages or (self.tokenizer is not None and self.has_template(settings)):
            user = ({"role": "user", "content": prompt.text},)
            ids = self._templated(prompt.messages or user, settings)
        else:
            ids = self._plain(prompt.text, settings)
        if not ids:
            raise ModelError(f"the prompt {prompt.text!r} has no tokens; give another one")
        return self.checked(ids)

    def checked(self, ids: list[int]) -> list[int]:
        """`ids`, which the model can be given. Raises ModelError for unknown ids, ConfigError for too many."""
        if not 0 <= min(ids) <= max(ids) < self.vocab_size:
            wrong = min(ids) if min(ids) < 0 else max(ids)
            raise ModelError(
                f"token id {wrong} is not in the model's vocabulary of {self.vocab_size}; give its tokenizer="
            )
        if self.max_length is not None and len(ids) >= self.max_length:
            raise ConfigError(
                f"a prompt of {len(ids)} tokens leaves no room in the model's {self.max_length} positions; shorten it"
            )
        return ids

    def _plain(self, text: str, settings: Settings) -> list[int]:
        if settings.system is not None:
            raise ConfigError("generate.system= needs a chat template, and none is used here; leave it out")
        if self.tokenizer is None:
            try:
                return [int(word) for word in text.split()]
            except ValueError as error:
                raise ConfigError(
                    f"prompt={text}: without a tokenizer a prompt is token ids, such as '12 7 300'; or give tokenizer="
                ) from error
        special = settings.special_tokens is not False
        ids = self.tokenizer.encode(text, special=special)
        first = self._document_token() if special else None
        return ids if first is None or ids[:1] == [first] else [first, *ids]

    def _document_token(self) -> int | None:
        """The token that all of the model's training documents began with, where the tokenizer has it."""
        token = getattr(self.model, "document_token", None)
        return token if token is not None and token in self.eos and token < self.vocab_size else None

    def _templated(self, messages: Sequence[Message], settings: Settings) -> list[int]:
        if self.tokenizer is None or not self.has_template(settings):
            raise ConfigError("messages need a chat template, and the tokenizer has none; give tokenizer=, or prompts")
        if settings.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": settings.system}, *messages]
        try:
            text = self.tokenizer.templated(messages)
        except Exception as error:  # a template raises what it likes
            raise ConfigError(f"the chat template refuses this conversation: {first_line(error)}") from error
        return self.tokenizer.encode(text, special=settings.special_tokens is True)

    def decode(self, ids: list[int]) -> str:
        """The text of ids, special tokens left out; without a tokenizer the ids themselves."""
        return " ".join(map(str, ids)) if self.tokenizer is None else self.tokenizer.decode(ids, skip_special=True)

    def samples(self, prompts: Sequence[tuple[Prompt, list[int]]], settings: Settings) -> Iterator[JsonObject]:
        """The samples of `prompts` (each with its ids), in their order, `batch_size` at once."""
        wanted = [(each, settings.seed + j) for each in prompts for j in range(settings.num_samples)]
        for start in range(0, len(wanted), settings.batch_size):
            rows = [self._row(*each, seed, settings) for each, seed in wanted[start : start + settings.batch_size]]
            for _ in self._grow(rows, settings, self.feed(settings), live=bool(settings.stop)):
                pass
            yield from map(self._sample, rows)

    def stream(
        self,
        prompt: Prompt,
        ids: list[int],
        settings: Settings,
        *,
        feed: Feed | None = None,
        broken_off: Callable[[], bool] = lambda: False,
    ) -> Generator[str, None, JsonObject]:
        """The pieces of one sample's text as they become certain; returned is the sample.

        `feed`: one that may hold the beginning of `ids`. `broken_off`: asked after each token whether to end here.
        """
        row = self._row(prompt, ids, settings.seed, settings)
        for _, piece in self._grow([row], settings, feed or self.feed(settings), live=True):
            if piece:
                yield piece
            if broken_off() and row.growing.finish is None:
                row.growing.finish = "interrupted"
        return self._sample(row)

    def _row(self, prompt: Prompt, ids: list[int], seed: int, settings: Settings) -> _Row:
        room = settings.max_new_tokens if self.max_length is None else self.max_length - len(ids)
        growing = Continuation(
            prompt=ids,
            seed=seed,
            count=min(settings.max_new_tokens, room),
            full="length" if settings.max_new_tokens <= room else "context",
        )
        return _Row(prompt=prompt, growing=growing, stream=TextStream(self.decode, ids[-CONTEXT:], settings.stop))

    def _grow(self, rows: list[_Row], settings: Settings, feed: Feed, *, live: bool) -> Iterator[tuple[_Row, str]]:
        """Let all rows grow to their ends. `live`: text is made, and stops looked for, with each token."""
        eos = frozenset() if settings.ignore_eos else self.eos
        start = time.perf_counter()
        with switched(self.model, settings.layers):
            steps = extend(feed, [row.growing for row in rows], settings.sampling, eos=eos, drawable=self.drawable)
            active = rows
            for _ in steps:
                if any(math.isnan(row.growing.logprobs[-1]) for row in active):
                    raise ModelError("the model's logits are not finite: nothing can be drawn from them")
                for row in active if live else ():
                    piece = "" if row.growing.finish == "eos" else row.stream.add(row.growing.new_ids[-1])
                    if row.stream.stopped:
                        row.growing.finish = "stop"
                    yield row, piece
                for row in active:
                    row.seconds = time.perf_counter() - start
                active = [row for row in active if row.growing.finish is None]
        for row in rows:
            shown = row.growing.new_ids[:-1] if row.growing.finish == "eos" else row.growing.new_ids
            for token_id in () if live else shown:
                row.stream.add(token_id)
            yield row, row.stream.end()

    def _sample(self, row: _Row) -> JsonObject:
        """One sample as it stands in `generation` of the result."""
        grown = row.growing
        count = len(grown.new_ids)
        shown: JsonObject = {"prompt": self.decode(list(grown.prompt)) if row.prompt.ids else row.prompt.text}
        if row.prompt.messages:
            shown = {"prompt": row.prompt.messages[-1]["content"], "messages": list(row.prompt.messages)}
        return {
            **row.prompt.extra,
            **shown,
            "ids": list(grown.prompt),
            "new_ids": grown.new_ids,
            "text": row.stream.text,
            "seed": grown.seed,
            "finish": grown.finish,
            "tokens": count,
            "seconds": row.seconds,
            "tokens_per_second": count / row.seconds if row.seconds else None,
            "logprobs": grown.logprobs,
            "logprob_mean": sum(grown.logprobs) / count if count else None,
            "repetition": repetition(grown.new_ids),
        }


def switched(model: nn.Module, layers: tuple[int, ...] | None) -> AbstractContextManager[Any]:
    """Within it only `layers` modulate (None: all). Raises ConfigError for layers that the model does not have."""
    if layers is None:
        return nullcontext()
    if not isinstance(model, SwitchableLayers):
        raise ConfigError("generate.layers belongs to NPT checkpoints: this model has no layers to switch")
    if unknown := sorted(set(layers) - set(model.npt_layers)):
        raise ConfigError(f"generate.layers: layer {unknown[0]} is no NPT layer; they are {list(model.npt_layers)}")
    return model.npt_mode(set(layers))
