"""From sentences to batches of token ids, without padding: rows of a batch have one length."""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from runner.data.streams import is_held_out
from runner.data.world import EOS, question_and_answer
from runner.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NO_TEXT = "the data holds no text to train on; give data=world, or data=text with data.path=FILE"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Token ids of one row and, for each, how much predicting it counts."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """`ids` [B, T] and `weights` [B, T] of rows of one length."""

    ids: torch.Tensor
    weights: torch.Tensor


def sentence_samples(sentences: Sequence[str], tokenizer: "Tokenizer", question_weight: float = 1.0) -> list[Sample]:
    """Each sentence as a row `<bos> … <eos>`. What no word before determines counts `question_weight`."""
    eos = tokenizer.token_to_id(EOS)
    assert eos is not None, "the world's tokenizer has this token"
    samples = []
    for sentence in sentences:
        ids, asked = _encode(sentence, tokenizer)
        weights = [question_weight] * asked + [1.0] * (len(ids) - asked)
        samples.append(Sample(ids=(*ids, eos), weights=(*weights, 1.0)))
    return samples


def packed_samples(
    sentences: Sequence[str], tokenizer: "Tokenizer", length: int, question_weight: float = 1.0
) -> list[Sample]:
    """The sentences in a row, as running text, cut into rows of `length` tokens that each start with a sentence."""
    samples = []
    ids: list[int] = []
    weights: list[float] = []
    for sentence in sentences:
        encoded, asked = _encode(sentence if not ids else f" {sentence}", tokenizer)
        skip = 1 if ids else 0  # the <bos> of a later sentence
        ids += encoded[skip:]
        weights += ([question_weight] * asked + [1.0] * (len(encoded) - asked))[skip:]
        if len(ids) >= length:
            samples.append(Sample(ids=tuple(ids[:length]), weights=tuple(weights[:length])))
            ids, weights = [], []
    return samples


def rows_by_length(lengths: Sequence[int], batch_size: int, chooser: random.Random) -> list[list[int]]:
    """The numbers of all rows, in batches of about `batch_size` of one length; rows and batches in random order."""
    by_length: dict[int, list[int]] = {}
    for number, length in enumerate(lengths):
        by_length.setdefault(length, []).append(number)
    batches = []
    for _, group in sorted(by_length.items()):
        numbers = chooser.sample(group, len(group))
        count = max(1, round(len(numbers) / batch_size))
        batches += [numbers[i::count] for i in range(count)]
    return chooser.sample(batches, len(batches))


def equal_length_batches(samples: Sequence[Sample], batch_size: int, chooser: random.Random) -> list[Batch]:
    """All samples once, batched as by `rows_by_length`."""
    return [
        Batch(
            ids=torch.tensor([samples[number].ids for number in numbers]),
            weights=torch.tensor([samples[number].weights for number in numbers]),
        )
        for numbers in rows_by_length([len(sample.ids) for sample in samples], batch_size, chooser)
    ]


def cut(documents: Sequence[Sequence[int]], length: int) -> list[Sequence[int]]:
    """The documents in rows of at most `length` tokens; a rest of one token, which predicts nothing, is left out."""
    rows = [document[i : i + length] for document in documents for i in range(0, len(document), length)]
    return [row for row in rows if len(row) > 1]


def document_batches(
    documents: Sequence[Sequence[int]], length: int, batch_size: int, chooser: random.Random
) -> list[torch.Tensor]:
    """Token ids [B, T] of documents cut into rows of at most `length` tokens, batched as by `rows_by_length`."""
    rows = cut(documents, length)
    batches = rows_by_length([len(row) for row in rows], batch_size, chooser)
    return [torch.tensor([list(rows[number]) for number in numbers]) for numbers in batches]


def epoch_batches(rows: Sequence[Sequence[int]], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The numbers of all rows, batched as by `rows_by_length`, in the order that `seed` gives to `epoch`."""
    return rows_by_length([len(row) for row in rows], batch_size, random.Random(f"{seed}/{epoch}"))


def endless_batches(
    rows: Sequence[Sequence[int]], batch_size: int, seed: int, start: int = 0
) -> Iterator[torch.Tensor]:
    """Batches of token ids [B, T], epoch after epoch as by `epoch_batches`, from the batch `start` on."""
    epoch, skip = divmod(start, len(epoch_batches(rows, batch_size, seed, 0)))
    while True:
        for numbers in epoch_batches(rows, batch_size, seed, epoch)[skip:]:
            yield torch.tensor([list(rows[number]) for number in numbers])
        epoch, skip = epoch + 1, 0


def endless_order(count: int, seed: int, start: int = 0) -> Iterator[int]:
    """Indices below `count`, each once an epoch, from position `start` of the one order that `seed` gives."""
    epoch, skip = divmod(start, count)
    while True:
        yield from random.Random(f"{seed}/{epoch}").sample(range(count), count)[skip:]
        epoch, skip = epoch + 1, 0


def _encode(sentence: str, tokenizer: "Tokenizer") -> tuple[list[int], int]:
    """The sentence's token ids with `<bos>`, and how many of them belong to its question."""
    question, _ = question_and_answer(sentence)
    return tokenizer.encode(sentence).ids, len(tokenizer.encode(question).ids)


def split_held_out(
    documents: Sequence[Sequence[int]], fraction: float
) -> tuple[list[Sequence[int]], list[Sequence[int]]]:
    """The documents (token ids) to train on, and the `fraction` of them, by their hash, to measure on.

    Raises ConfigError where none is left for one of the two.
    """
    held = [is_held_out(json.dumps(list(document)), fraction) for document in documents]
    parts = [[d for d, h in zip(documents, held, strict=True) if h is wanted] for wanted in (False, True)]
    if not all(parts):
        raise ConfigError(
            f"train.eval_fraction={fraction} of {len(documents)} documents leaves none to train or measure on"
        )
    return parts[0], parts[1]
