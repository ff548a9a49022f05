"""Batches of token ids for the loop: those of documents in memory, and those of a stream that does not fit there."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, TypeVar

import torch

from runner.data.streams import Documents, Mixture, Part, is_held_out
from runner.data.windows import Encode, Windows, first_rows
from runner.errors import ConfigError
from runner.training.distributed import ALONE, World
from runner.training.settings import TrainingSettings

B = TypeVar("B")


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """`ids` [B, T] without padding. Batches of one `number` are equal: what is computed of them may be kept."""

    ids: torch.Tensor
    number: int | None = None


def position_in(state: Mapping[str, Any]) -> int:
    """How many batches were given, of a source whose state is {"position": that}. Raises ValueError or KeyError."""
    position = state["position"]
    if type(position) is not int or position < 0:
        raise ValueError(f"{position!r} is no number of batches")
    return position


class Ordered(Generic[B]):
    """Batches whose order follows from their place alone: `make(n)` gives them from the n-th on."""

    def __init__(self, make: Callable[[int], Iterator[B]]) -> None:
        self._make, self._position = make, 0
        self._batches = make(0)

    def next(self) -> B:
        """The next batch."""
        self._position += 1
        return next(self._batches)

    def state(self) -> dict[str, object]:
        """How many were given."""
        return {"position": self._position}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Give those after as many. Raises ValueError."""
        self._position = position_in(state)
        self._batches = self._make(self._position)


class Streamed:
    """Rows of a stream, `batch_size` for each process: of those that all processes together take, every one its own."""

    def __init__(self, windows: Windows, batch_size: int, world: World = ALONE) -> None:
        self._windows, self._batch_size, self._world = windows, batch_size, world

    def next(self) -> TokenBatch:
        """The next batch of this process."""
        rows = self._windows.rows(self._batch_size * self._world.size)
        return TokenBatch(ids=torch.from_numpy(rows[self._world.rank :: self._world.size].copy()))

    def state(self) -> dict[str, object]:
        """Where the stream stands: the same in every process."""
        return {"stream": self._windows.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Stand where `state` says. Raises ValueError, KeyError or TypeError."""
        self._windows.restore(state["stream"])


@dataclass(frozen=True, kw_only=True)
class TextStream:
    """Text of any size: corpora with their weights, the column of their rows, and what makes token ids of documents."""

    corpora: Sequence[tuple[Sequence[Part], float]]
    column: str
    encode: Encode

    def batches(self, settings: TrainingSettings, world: World = ALONE) -> Streamed:
        """Batches of the documents that are not held out."""
        held = settings.eval_fraction if settings.eval_every is not None else 0.0
        windows = Windows(
            self._corpus(settings.seed, lambda text: not is_held_out(text, held)),
            self.encode,
            length=settings.sequence_length,
            stride=settings.stride,
            buffer=settings.shuffle_buffer,
            seed=settings.seed,
        )
        return Streamed(windows, settings.batch_size, world)

    def held_out(self, settings: TrainingSettings) -> list[torch.Tensor]:
        """`eval_batches` batches of held-out documents, always the same. Raises ConfigError where there are none."""
        corpus = self._corpus(settings.seed, lambda text: is_held_out(text, settings.eval_fraction))
        wanted = settings.eval_batches * settings.batch_size
        rows = torch.from_numpy(first_rows(corpus, self.encode, length=settings.sequence_length, count=wanted))
        if not len(rows):
            raise ConfigError(
                f"train.eval_fraction={settings.eval_fraction}: the documents held out make no row of "
                f"{settings.sequence_length} tokens; give a larger one, or train.eval_every=null"
            )
        return list(rows.split(settings.batch_size))

    def first(self, count: int) -> list[list[int]]:
        """Token ids of the first documents, each by itself."""
        texts = list(islice(self._corpus(0, lambda text: True).epoch(), count))
        return self.encode(texts) if texts else []

    @property
    def size(self) -> int | None:
        """The bytes of all files; None where a part has no known size."""
        sizes = [part.size for parts, _ in self.corpora for part in parts]
        return None if None in sizes else sum(size for size in sizes if size is not None)

    def _corpus(self, seed: int, wanted: Callable[[str], bool]) -> Documents | Mixture:
        corpora = [Documents(parts, self.column, seed=seed, wanted=wanted) for parts, _ in self.corpora]
        if len(corpora) == 1:
            return corpora[0]
        return Mixture(corpora, [weight for _, weight in self.corpora], seed=seed)
