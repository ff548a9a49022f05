"""Rows of token ids in batches of one length, without padding, in an order that only the seed and the epoch give."""

import random
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import DataLoader, Sampler

Row = Sequence[int]


def cut(documents: Sequence[Row], length: int) -> list[Row]:
    """The documents in rows of at most `length` tokens; a rest of one token, which predicts nothing, is left out."""
    rows = [document[i : i + length] for document in documents for i in range(0, len(document), length)]
    return [row for row in rows if len(row) > 1]


class EqualLengthBatches(Sampler[list[int]]):
    """The numbers of the rows of each batch: all rows once an epoch, about `batch_size` of one length together."""

    def __init__(self, rows: Sequence[Row], batch_size: int, seed: int) -> None:
        by_length: dict[int, list[int]] = {}
        for number, row in enumerate(rows):
            by_length.setdefault(len(row), []).append(number)
        self.groups = [(group, max(1, round(len(group) / batch_size))) for _, group in sorted(by_length.items())]
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Make the next iteration that of `epoch`."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(count for _, count in self.groups)

    def __iter__(self) -> Iterator[list[int]]:
        chooser = random.Random(f"{self.seed}/{self.epoch}")
        batches = []
        for group, count in self.groups:
            numbers = chooser.sample(group, len(group))
            batches += [numbers[i::count] for i in range(count)]
        return iter(chooser.sample(batches, len(batches)))


class RowLoader(DataLoader[Row]):
    """Batches {"input_ids": [B, T]} of `rows`. The Trainer says which epoch begins."""

    def __init__(self, rows: Sequence[Row], batches: EqualLengthBatches) -> None:
        super().__init__(rows, batch_sampler=batches, collate_fn=stack)  # type: ignore[arg-type]  # a list will do
        self.batches = batches

    def set_epoch(self, epoch: int) -> None:
        """Make the next iteration that of `epoch`."""
        self.batches.set_epoch(epoch)


def stack(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """Rows of one length as a batch {"input_ids": [B, T]}."""
    return {"input_ids": torch.tensor([list(row) for row in rows])}
