"""From documents to rows of token ids of one length in a random order, in memory that does not grow with the corpus."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch

# So many documents are tokenised together, or so many characters of them: one at a time takes twice as long.
_DOCUMENTS, _CHARACTERS = 64, 1 << 16
# So many rows are there before the first is drawn; then the buffer grows by one with each, so that nobody waits.
_AT_START = 64

Encode = Callable[[Sequence[str]], list[list[int]]]


class Corpus(Protocol):
    """Documents without end; where it stands can be saved."""

    def __next__(self) -> str: ...

    def epoch(self) -> Iterator[str]:
        """The documents up to the end of this epoch."""

    def state(self) -> dict[str, object]:
        """Where it stands."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Stand where `state` says."""


class Windows:
    """Documents in a row, each with its special tokens, cut into rows of `length` tokens every `stride`.

    Drawn from a buffer of `buffer` rows in an order that `seed` gives.
    """

    def __init__(
        self, corpus: Corpus, encode: Encode, *, length: int, stride: int | None, buffer: int, seed: int
    ) -> None:
        self._corpus, self._encode = corpus, encode
        self._length, self._stride, self._size, self._seed = length, stride or length, buffer, seed
        self._tokens = np.empty(0, np.int32)
        self._offset = self._drawn = 0
        self._rows: list[np.ndarray] = []

    def rows(self, count: int) -> np.ndarray:
        """The next `count` rows [count, length], int64."""
        return np.stack([self._draw() for _ in range(count)]).astype(np.int64)

    def state(self) -> dict[str, object]:
        """Where the documents stand, the tokens that were read but not cut, and the rows that were not drawn."""
        import torch

        rows = np.stack(self._rows) if self._rows else np.empty((0, self._length), np.int32)
        return {
            "documents": self._corpus.state(),
            "tokens": torch.from_numpy(self._tokens[self._offset :].copy()),
            "rows": torch.from_numpy(rows),
            "drawn": self._drawn,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Stand where `state` says. Raises ValueError, KeyError or TypeError where it does not fit."""
        rows: torch.Tensor = state["rows"]
        if rows.ndim != 2 or rows.shape[1] != self._length:
            raise ValueError(f"its rows are {list(rows.shape)}, those asked for have {self._length} tokens")
        self._corpus.restore(state["documents"])
        self._tokens, self._offset = state["tokens"].numpy().copy(), 0
        self._rows, self._drawn = list(rows.numpy().copy()), int(state["drawn"])

    def _draw(self) -> np.ndarray:
        while len(self._rows) < min(self._size, _AT_START + self._drawn):
            self._rows.append(self._cut())
        place = random.Random(f"{self._seed}/rows/{self._drawn}").randrange(len(self._rows))
        self._drawn += 1
        self._rows[place], self._rows[-1] = self._rows[-1], self._rows[place]
        return self._rows.pop()

    def _cut(self) -> np.ndarray:
        while len(self._tokens) - self._offset < self._length:
            documents = [next(self._corpus)]
            while sum(map(len, documents)) < _CHARACTERS and len(documents) < _DOCUMENTS:
                documents.append(next(self._corpus))
            encoded = [np.asarray(ids, np.int32) for ids in self._encode(documents)]
            self._tokens = np.concatenate([self._tokens[self._offset :], *encoded])
            self._offset = 0
        row = self._tokens[self._offset : self._offset + self._length].copy()
        self._offset += self._stride
        return row


def first_rows(corpus: Corpus, encode: Encode, *, length: int, count: int) -> np.ndarray:
    """The first rows [≤ count, length] of an epoch, in order; documents that make less than one row make none."""
    rows: list[np.ndarray] = []
    tokens: list[int] = []
    for document in corpus.epoch():
        tokens += encode([document])[0]
        while len(tokens) >= length and len(rows) < count:
            rows.append(np.asarray(tokens[:length], np.int64))
            tokens = tokens[length:]
        if len(rows) == count:
            break
    return np.stack(rows) if rows else np.empty((0, length), np.int64)
