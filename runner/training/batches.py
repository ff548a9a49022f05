"""From sentences to batches of token ids, without padding: rows of a batch have one length."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from runner.data.world import EOS, question_and_answer

if TYPE_CHECKING:
    from tokenizers import Tokenizer


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


def equal_length_batches(samples: Sequence[Sample], batch_size: int, chooser: random.Random) -> list[Batch]:
    """All samples once, in batches of about `batch_size` rows of one length, rows and batches in random order."""
    by_length: dict[int, list[Sample]] = {}
    for sample in samples:
        by_length.setdefault(len(sample.ids), []).append(sample)
    batches = []
    for _, group in sorted(by_length.items()):
        rows = chooser.sample(group, len(group))
        count = max(1, round(len(rows) / batch_size))
        batches += [
            Batch(
                ids=torch.tensor([row.ids for row in rows[i::count]]),
                weights=torch.tensor([row.weights for row in rows[i::count]]),
            )
            for i in range(count)
        ]
    return chooser.sample(batches, len(batches))


def document_batches(
    documents: Sequence[Sequence[int]], length: int, batch_size: int, chooser: random.Random
) -> list[torch.Tensor]:
    """Token ids [B, T] of documents cut into rows of at most `length` tokens; a rest of one token is left out."""
    rows = [document[i : i + length] for document in documents for i in range(0, len(document), length)]
    samples = [Sample(ids=tuple(row), weights=(1.0,) * len(row)) for row in rows if len(row) > 1]
    return [batch.ids for batch in equal_length_batches(samples, batch_size, chooser)]


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
