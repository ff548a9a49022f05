"""Which elements of a task vector are kept: the largest (TIES), random ones (DARE), random by rank (DELLA).

Any place of a mask is at hand: it is made again wherever it is asked for.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from runner.merge.combination import Floats, Indices, Mask, Tensors, part_of, steps


@dataclass(frozen=True, kw_only=True)
class Largest:
    """Elements whose magnitude, in float32, is above `threshold`; of those that equal it, the ones up to `last`."""

    threshold: float
    last: int

    def part(self, start: int, stop: int, delta: torch.Tensor) -> torch.Tensor:
        """As `Mask.part`."""
        size = delta.float().abs_()
        if self.last >= stop:
            return size >= self.threshold
        kept = size > self.threshold
        kept[: max(self.last + 1 - start, 0)] |= size[: max(self.last + 1 - start, 0)] == self.threshold
        return kept

    def sample(self, indices: Indices, delta: Floats) -> NDArray[np.bool_]:
        """As `Mask.sample`."""
        size = np.abs(delta.astype(np.float32)).astype(np.float64)
        return (size > self.threshold) | ((size == self.threshold) & (indices <= self.last))


def largest(base: torch.Tensor, tensor: torch.Tensor, density: float) -> Largest | None:
    """The mask of the `density` · N largest; None where all are kept."""
    count = base.numel()
    wanted = int(density * count)
    if density >= 1 or not count:
        return None
    if not wanted:
        return Largest(threshold=math.inf, last=-1)
    sizes = np.empty(count, dtype=np.float32)
    for start, stop in steps(count):
        difference = part_of(tensor, start, stop).sub_(part_of(base, start, stop))
        sizes[start:stop] = difference.float().abs_().numpy()
    sizes.partition(count - wanted)
    threshold = sizes[count - wanted]
    kept = sizes[count - wanted :]
    equal, all_equal = int(np.count_nonzero(kept == threshold)), int(np.count_nonzero(sizes == threshold))
    last = count if equal == all_equal else _place_of(base, tensor, float(threshold), equal)
    return Largest(threshold=float(threshold), last=last)


def _place_of(base: torch.Tensor, tensor: torch.Tensor, size: float, number: int) -> int:
    """The index of the `number`-th element of this magnitude."""
    for start, stop in steps(base.numel()):
        difference = part_of(tensor, start, stop).sub_(part_of(base, start, stop))
        found = torch.nonzero(difference.float().abs_() == size).reshape(-1)
        if number <= len(found):
            return start + int(found[number - 1])
        number -= len(found)
    raise AssertionError("fewer elements of the threshold than were counted")


@dataclass(frozen=True, kw_only=True)
class Random:
    """Element i is kept where the i-th 32 bits of a stream are below density · 2³²: PCG64DXSM, begun from `seed`.

    The stream is the same on every machine, and any place of it is at hand.
    """

    seed: bytes
    density: float

    def part(self, start: int, stop: int, delta: torch.Tensor) -> torch.Tensor:
        """As `Mask.part`."""
        return torch.from_numpy(uniform(self.seed, start, stop) < math.ceil(self.density * 2**32))

    def sample(self, indices: Indices, delta: Floats) -> NDArray[np.bool_]:
        """As `Mask.sample`."""
        return np.array([uniform(self.seed, int(i), int(i) + 1)[0] / 2**32 < self.density for i in indices], bool)


def uniform(seed: bytes, start: int, stop: int) -> NDArray[np.uint32]:
    """The 32-bit numbers `start` to `stop` of the stream that `seed` begins."""
    stream = np.random.PCG64DXSM(int.from_bytes(hashlib.sha256(seed).digest(), "little"))
    stream.advance(start // 2)
    words = stream.random_raw((stop + 1) // 2 - start // 2)
    return words.astype("<u8", copy=False).view("<u4")[start % 2 :][: stop - start]


@dataclass(frozen=True, kw_only=True)
class ByRank:
    """Element i is kept with a probability by the rank of its magnitude (float32) in its row, the smallest first."""

    base: torch.Tensor
    tensor: torch.Tensor
    density: float
    epsilon: float
    seed: bytes

    def part(self, start: int, stop: int, delta: torch.Tensor) -> torch.Tensor:
        """As `Mask.part`."""
        chances = np.concatenate(list(self._rows(start, stop)))
        return torch.from_numpy(uniform(self.seed, start, stop) < chances * 2.0**32)

    def sample(self, indices: Indices, delta: Floats) -> NDArray[np.bool_]:
        """As `Mask.sample`."""
        chances = np.array([next(self._rows(int(i), int(i) + 1))[0] for i in indices])
        drawn = np.array([uniform(self.seed, int(i), int(i) + 1)[0] for i in indices], np.float64)
        return drawn / 2**32 < chances

    def _rows(self, start: int, stop: int) -> Iterator[Floats]:
        """The probabilities of the elements from `start` to `stop`, row by row."""
        width = self.base.shape[-1] if self.base.dim() else 1
        for row in range(start // width, (stop - 1) // width + 1):
            low, high = row * width, (row + 1) * width
            size = part_of(self.tensor, low, high).sub_(part_of(self.base, low, high)).float().abs_().numpy()
            rank = np.empty(width)
            rank[np.argsort(size, kind="stable")] = np.arange(width)
            chance = self.density - self.epsilon + (rank / (width - 1) if width > 1 else rank + 0.5) * 2 * self.epsilon
            yield chance[max(start - low, 0) : min(stop - low, width)]


def l1_scales(base: torch.Tensor, tensors: Tensors, masks: Sequence[Mask | None]) -> list[float]:
    """What gives each masked task vector the L1 norm that it had."""
    scales = []
    for tensor, mask in zip(tensors, masks, strict=True):
        before = after = 0.0
        for start, stop in steps(base.numel() if mask is not None else 0):
            assert mask is not None
            delta = part_of(tensor, start, stop).sub_(part_of(base, start, stop))
            kept = mask.part(start, stop, delta)
            size = delta.abs_()
            before += float(size.sum())
            after += float(size.mul_(kept).sum())
        scales.append(before / after if before >= _TINY and after >= _TINY else 1.0)
    return scales


# Norms below it are not scaled to.
_TINY = 1e-7
