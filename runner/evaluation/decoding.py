"""Continuations, token by token: one loop for every model, with a cache or by computing everything again.

A model that has a cache of its own gives it through two methods (`CachedModel`), one of transformers through
`PassCache`; any other one, and each where no cache is wanted, is run on the whole sequence for every token.
"""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from runner.metrics.generation import Sampling, choose, penalised


@runtime_checkable
class CachedModel(Protocol):
    """A model that remembers what it was fed."""

    def new_cache(self, padding: torch.Tensor, length: int) -> Any:
        """Room for `length` positions of B rows; `padding` [B]: how many of them, on the left, are padding."""

    def advance(self, token_ids: torch.Tensor, cache: Any) -> torch.Tensor:
        """Feed `token_ids` [B, t] → float32 logits [B, V] of the last position."""


class PassCache:
    """What a forward pass remembers in `past_key_values`, for rows with `padding` [B] positions on their left.

    Positions of a row count from its first real token. `config`: the model's.
    """

    def __init__(self, past: Any, padding: torch.Tensor, config: Any) -> None:
        self._past = past
        self._padding = padding.unsqueeze(1)
        self._padded = bool(padding.any())
        self._length = 0
        # A row that has ended is fed on beside the others: its positions do not matter, but have to exist.
        self._last = (getattr(config, "max_position_embeddings", None) or (1 << 62)) - 1

    def arguments(self, count: int) -> dict[str, Any]:
        """What the pass takes beside the next `count` positions; they are counted as fed."""
        past, self._length = self._length, self._length + count
        own = torch.arange(self._length, device=self._padding.device) - self._padding
        return {
            "attention_mask": (own >= 0).long() if self._padded else None,
            "position_ids": own[:, past:].clamp(min=0, max=self._last),
            "past_key_values": self._past,
            "use_cache": True,
        }


class _Transformers:
    """A transformers model as a `CachedModel`."""

    def __init__(self, model: nn.Module, known: frozenset[str]) -> None:
        self._model = model
        self._last: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in known else {}

    def new_cache(self, padding: torch.Tensor, length: int) -> PassCache:
        from transformers import DynamicCache

        config: Any = self._model.config
        return PassCache(DynamicCache(config=config), padding, config)

    def advance(self, token_ids: torch.Tensor, cache: PassCache) -> torch.Tensor:
        logits: torch.Tensor = self._model(token_ids, **cache.arguments(token_ids.shape[1]), **self._last).logits
        return logits[:, -1].float()


@dataclass(kw_only=True)
class _Rows:
    """Rows of ids [T_i] without their padding."""

    padding: list[int]
    ids: list[torch.Tensor] = field(default_factory=list)


class _Recomputing:
    """Any model as a `CachedModel`: each row is run as a whole, by itself, for every token."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def new_cache(self, padding: torch.Tensor, length: int) -> _Rows:
        return _Rows(padding=padding.tolist())

    def advance(self, token_ids: torch.Tensor, cache: _Rows) -> torch.Tensor:
        if cache.ids:
            cache.ids = [torch.cat(pair) for pair in zip(cache.ids, token_ids, strict=True)]
        else:
            cache.ids = [row[count:] for row, count in zip(token_ids, cache.padding, strict=True)]
        return torch.stack([self._model(row.unsqueeze(0)).logits[0, -1].float() for row in cache.ids])


def cached(model: nn.Module, *, cache: bool = True) -> CachedModel:
    """`model` as one that remembers what it was fed; without `cache`, or where it has none, by running all again."""
    if cache and isinstance(model, CachedModel):
        return model
    known = frozenset(inspect.signature(model.forward).parameters)
    if cache and {"position_ids", "past_key_values", "attention_mask"} <= known:  # what left padding needs
        return _Transformers(model, known)
    return _Recomputing(model)


class Feed:
    """A batch of rows inside a model. A single row that begins with what was fed goes on from there."""

    def __init__(self, model: nn.Module, device: torch.device, *, cache: bool = True, spare: int = 0) -> None:
        self._model = cached(model, cache=cache)
        self._device = device
        self._spare = spare  # positions beyond those that were asked for
        self._cache: Any = None
        self._room = 0
        self.fed: list[int] = []  # of the only row

    def start(self, prompts: Sequence[Sequence[int]], count: int) -> torch.Tensor:
        """Feed `prompts`, with room for `count` ids after each → float32 logits [B, V] of their last positions."""
        longest = max(map(len, prompts))
        if not self._goes_on(prompts, longest + count):
            self.fed, self._room = [], longest + count + self._spare
            padding = torch.tensor([longest - len(prompt) for prompt in prompts], device=self._device)
            self._cache = self._model.new_cache(padding, self._room)
        rows = [[0] * (longest - len(prompt)) + list(prompt[len(self.fed) :]) for prompt in prompts]
        return self._advance(torch.tensor(rows, device=self._device))

    def _goes_on(self, prompts: Sequence[Sequence[int]], room: int) -> bool:
        count = len(self.fed)
        fits = len(prompts) == 1 and 0 < count < len(prompts[0]) and room <= self._room
        return fits and list(prompts[0][:count]) == self.fed

    def next(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Feed one id [B] of each row → float32 logits [B, V]."""
        return self._advance(token_ids.unsqueeze(1))

    def _advance(self, token_ids: torch.Tensor) -> torch.Tensor:
        known, self.fed = self.fed, []  # where the pass is broken off, nothing is known of the cache
        logits = self._model.advance(token_ids, self._cache)
        self.fed = known + token_ids[0].tolist() if len(token_ids) == 1 else []
        return logits


@dataclass(kw_only=True)
class Continuation:
    """One row while it grows: at most `count` ids after `prompt`, drawn from a generator of its own.

    `logprobs`: of each id, under the model's own distribution. `finish`: None while it goes on, then eos, or `full`
    where `count` was reached, or what its reader says.
    """

    prompt: Sequence[int]
    count: int
    seed: int = 0
    full: str = "length"
    new_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: str | None = None


@torch.inference_mode()
def extend(
    feed: Feed,
    rows: Sequence[Continuation],
    how: Sampling,
    *,
    eos: frozenset[int] = frozenset(),
    drawable: int | None = None,
) -> Iterator[None]:
    """Let `rows` grow by one id each time until all have a `finish`.

    `eos`: ids that end a row, itself kept. `drawable`: ids from there on are never drawn. A row gets the same draws
    beside others and alone. A `logprobs` that is NaN says that the model's logits are not finite.
    """
    count = max(row.count for row in rows)
    logits = feed.start([row.prompt for row in rows], count)[:, :drawable]
    draws = _draws(rows, count).to(logits.device) if how.temperature > 0 else None
    seen = _seen(rows, logits) if how.repetition_penalty != 1 else None
    for step in range(count):
        scores = logits if seen is None else penalised(logits, seen, how.repetition_penalty)
        chosen = choose(scores, how, None if draws is None else draws[:, step])
        column = chosen.unsqueeze(1)
        logprobs = logits.gather(1, column).squeeze(1) - logits.logsumexp(-1)
        # The one copy from the device: ids are exact in float64.
        for row, drawn, logprob in zip(rows, *torch.stack([chosen.double(), logprobs.double()]).tolist(), strict=True):
            if row.finish is None:
                _append(row, int(drawn), logprob, eos)
        yield
        if all(row.finish for row in rows):
            return
        if seen is not None:
            seen.scatter_(1, column, True)
        logits = feed.next(chosen)[:, :drawable]


def _append(row: Continuation, drawn: int, logprob: float, eos: frozenset[int]) -> None:
    row.new_ids.append(drawn)
    row.logprobs.append(logprob)
    if drawn in eos:
        row.finish = "eos"
    elif len(row.new_ids) == row.count:
        row.finish = row.full


def _draws(rows: Sequence[Continuation], count: int) -> torch.Tensor:
    """Uniform draws [B, count] in [0, 1), each row's from its own generator."""
    generators = (torch.Generator().manual_seed(row.seed) for row in rows)
    return torch.stack([torch.rand(count, generator=each, dtype=torch.float64) for each in generators])


def _seen(rows: Sequence[Continuation], logits: torch.Tensor) -> torch.Tensor:
    seen = torch.zeros_like(logits, dtype=torch.bool)
    for mask, row in zip(seen, rows, strict=True):
        mask[[each for each in set(row.prompt) if each < len(mask)]] = True
    return seen


def generate(
    model: nn.Module, prompt: torch.Tensor, count: int, *, temperature: float = 0.0, seed: int = 0, cache: bool = True
) -> list[int]:
    """`count` further tokens after `prompt` [T], the end-of-text token included like any other.

    Greedy at temperature 0, else sampled from a generator of its own, so that two models see the same draws. The tokens
    are the same with `cache` and without.
    """
    row = Continuation(prompt=prompt.tolist(), count=count, seed=seed)
    for _ in extend(Feed(model, prompt.device, cache=cache), [row], Sampling(temperature=temperature)):
        pass
    return row.new_ids


def eos_ids(model: nn.Module, tokenizer: object, *further: object) -> frozenset[int]:
    """The ids that end a text: the tokenizer's, the config's, and `further` ones; each an id, a list, or None."""
    found: set[int] = set()
    owners = (tokenizer, getattr(model, "config", None))
    for each in (*(getattr(owner, "eos_token_id", None) for owner in owners), *further):
        found |= {one for one in (each if isinstance(each, (list, tuple)) else [each]) if isinstance(one, int)}
    return frozenset(found)
