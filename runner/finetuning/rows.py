"""Labelled texts as token ids, in batches that are padded to their longest row."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from runner.data.classification import LabelledRow
from runner.errors import ConfigError, ModelError
from runner.evaluation.tokenizers import TextTokenizer
from runner.training.sources import position_in

# The original's separator, and what ends a text in tokenizers that name no token for it.
SEPARATOR = "<ENDOFTEXT>"
_ENDS = (SEPARATOR, "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
# So many batches are drawn together, to be sorted by length.
_POOL = 16


@dataclass(frozen=True, kw_only=True)
class TokenRows:
    """Token ids and class of each row. `cut`: how many were longer than allowed."""

    ids: Sequence[Sequence[int]]
    labels: Sequence[int]
    cut: int = 0


@dataclass(frozen=True, kw_only=True)
class LabelledBatch:
    """`ids`, `mask` [B, T] and `labels` [B]; `share`: what a row's loss is multiplied with, so that the sum over a
    step's micro-batches, divided by their number, is the weighted mean over its rows."""

    ids: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor
    share: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Texts of a row to token ids, at most `max_length` of them.

    Texts are joined by `separator`, a blank on either side, and encoded as they stand, special tokens as the tokenizer
    adds them. What is too long loses tokens at the end of its longest text, of equally long ones of the first. `pair`:
    the tokenizer's own template of two texts instead.
    """

    tokenizer: TextTokenizer
    separator: str
    max_length: int
    vocab_size: int
    pair: str = "separator"
    _around: dict[str, Any] = field(default_factory=dict, repr=False)

    def encode(self, rows: Sequence[LabelledRow]) -> TokenRows:
        """Raises ModelError for token ids that the model does not have, ConfigError for more texts than a pair."""
        found, cut = [], 0
        for row in rows:
            ids, was_cut = self.ids(row.texts)
            if ids and max(ids) >= self.vocab_size:
                raise ModelError(
                    f"the tokenizer gives token id {max(ids)}, but the model's vocabulary has {self.vocab_size}; "
                    "it is another model's tokenizer: give the right one as tokenizer="
                )
            found.append(ids)
            cut += was_cut
        return TokenRows(ids=found, labels=[row.label for row in rows], cut=cut)

    def ids(self, texts: Sequence[str]) -> tuple[list[int], bool]:
        """Token ids, and whether any were left out."""
        if self.pair == "tokenizer":
            return self._pair(texts)
        joined = f" {self.separator} ".join(texts)
        whole = self.tokenizer.encode(joined)
        if len(whole) <= self.max_length:
            return whole, False
        before, after = self._specials()
        between = self.tokenizer.encode(f" {self.separator} ", special=False)
        parts = [self.tokenizer.encode(text, special=False) for text in texts]
        room = self.max_length - len(before) - len(after) - len(between) * (len(parts) - 1)
        if room < len(parts):
            raise ConfigError(f"data.max_length={self.max_length}: leaves no room for {len(parts)} texts")
        kept = [part[:count] for part, count in zip(parts, shortened([len(p) for p in parts], room), strict=True)]
        ids = list(before)
        for number, part in enumerate(kept):
            ids += [*(between if number else []), *part]
        return [*ids, *after], True

    def _specials(self) -> tuple[list[int], list[int]]:
        """What the tokenizer adds before and after a text."""
        if not self._around:
            plain, whole = (self.tokenizer.encode("a", special=special) for special in (False, True))
            places = range(len(whole) - len(plain) + 1)
            start = next((i for i in places if whole[i : i + len(plain)] == plain), 0)
            self._around.update(before=whole[:start], after=whole[start + len(plain) :])
        return self._around["before"], self._around["after"]

    def _pair(self, texts: Sequence[str]) -> tuple[list[int], bool]:
        if len(texts) != 2:
            raise ConfigError(f"data.pair=tokenizer takes two texts, not {len(texts)}; give data.text=[first,second]")
        backend: Any = self.tokenizer.backend
        if self.tokenizer.by != "tokenizers":
            whole: list[int] = backend(*texts, verbose=False)["input_ids"]
            if len(whole) <= self.max_length:
                return whole, False
            return backend(*texts, truncation="longest_first", max_length=self.max_length)["input_ids"], True
        first, second = (backend.encode(text, add_special_tokens=False) for text in texts)
        room = self.max_length - backend.num_special_tokens_to_add(True)
        if room < 2:
            raise ConfigError(f"data.max_length={self.max_length}: leaves no room for two texts")
        counts = shortened([len(first.ids), len(second.ids)], room)
        was_cut = counts != [len(first.ids), len(second.ids)]
        for encoding, count in zip((first, second), counts, strict=True):
            encoding.truncate(count)
        return backend.post_process(first, second, add_special_tokens=True).ids, was_cut


def shortened(lengths: Sequence[int], room: int) -> list[int]:
    """How much of each part stays where only `room` is left: the longest lose first, of equally long ones the first."""
    counts = list(lengths)
    if (excess := sum(counts) - room) <= 0:
        return counts
    low, high = 0, max(counts)
    while low < high:  # the largest cap under which all of it fits
        middle = (low + high + 1) // 2
        low, high = (middle, high) if sum(min(count, middle) for count in counts) <= room else (low, middle - 1)
    counts = [min(count, low) for count in lengths]
    left = sum(lengths) - excess - sum(counts)
    for i in reversed(range(len(counts))):
        if left and lengths[i] > low:
            counts[i] += 1
            left -= 1
    return counts


def separator_of(tokenizer: TextTokenizer, given: str | None) -> tuple[str, str | None]:
    """What stands between texts, and what the reader should know where it is no token."""
    if given is not None:
        return given, None
    ends = [tokenizer.special_tokens.get("eos_token"), *_ENDS]
    found = next((end for end in ends if end and tokenizer.token_id(end) is not None), None)
    if found is not None:
        return found, None
    return SEPARATOR, f"the tokenizer has no end-of-text token: texts are joined by {SEPARATOR}, spelled out in pieces"


def padded(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask [B, T] of rows of token ids, padded with 0 on the right to the longest."""
    length = max(1, max(map(len, rows)))
    ids, mask = torch.zeros(2, len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[i, : len(row)] = 1
    return ids, mask


def steps_in_epoch(count: int, size: int, accumulation: int) -> int:
    """How many steps see `count` rows once."""
    return -(-count // (size * accumulation))


def epoch_order(lengths: Sequence[int], size: int, accumulation: int, seed: int, epoch: int) -> list[list[int]]:
    """The numbers of all rows, each once, in micro-batches of at most `size`, `accumulation` of them a step.

    Drawn by `seed` and `epoch`; rows of like length come together, out of pools of a few batches.
    """
    chooser = random.Random(f"{seed}/{epoch}")
    order = chooser.sample(range(len(lengths)), len(lengths))
    count = steps_in_epoch(len(order), size, accumulation) * accumulation
    sizes = [len(order) // count + (i < len(order) % count) for i in range(count)]
    batches, start = [], 0
    for first in range(0, count, _POOL):
        own = sizes[first : first + _POOL]
        pool = sorted(order[start : start + sum(own)], key=lambda number: lengths[number])
        start += sum(own)
        for each in own:
            batches.append(pool[:each])
            pool = pool[each:]
    return chooser.sample(batches, len(batches))


class EpochBatches:
    """Batches for the loop, every row once an epoch. `weights` [C]: how much a row of a class counts."""

    def __init__(
        self, rows: TokenRows, *, size: int, accumulation: int, seed: int, weights: Sequence[float] | None = None
    ) -> None:
        self._rows, self._size, self._accumulation, self._seed = rows, size, accumulation, seed
        self._weights = weights
        self._position = 0
        self._epoch, self._order = -1, [[0]]

    @property
    def per_epoch(self) -> int:
        """Micro-batches of an epoch."""
        return steps_in_epoch(len(self._rows.ids), self._size, self._accumulation) * self._accumulation

    def next(self) -> LabelledBatch:
        """The next micro-batch; one without rows where a step has fewer rows than micro-batches."""
        epoch, place = divmod(self._position, self.per_epoch)
        if epoch != self._epoch:
            lengths = [len(ids) for ids in self._rows.ids]
            self._order = epoch_order(lengths, self._size, self._accumulation, self._seed, epoch)
            self._epoch = epoch
        self._position += 1
        first = place // self._accumulation * self._accumulation
        step = self._order[first : first + self._accumulation]
        whole = sum(self._weight(number) for own in step for number in own)
        numbers = self._order[place]
        shown = numbers or next(own for own in step if own)[:1]
        ids, mask = padded([self._rows.ids[number] for number in shown])
        labels = torch.tensor([self._rows.labels[number] for number in shown])
        return LabelledBatch(ids=ids, mask=mask, labels=labels, share=self._accumulation / whole if numbers else 0.0)

    def _weight(self, number: int) -> float:
        return 1.0 if self._weights is None else self._weights[self._rows.labels[number]]

    def state(self) -> dict[str, object]:
        """How many were given."""
        return {"position": self._position}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Give those after as many. Raises ValueError."""
        self._position = position_in(state)


def by_length(rows: TokenRows, size: int) -> list[list[int]]:
    """The numbers of all rows in batches of `size`, the longest first, so that a lack of memory shows at once."""
    order = sorted(range(len(rows.ids)), key=lambda number: -len(rows.ids[number]))
    return [order[i : i + size] for i in range(0, len(order), size)]
