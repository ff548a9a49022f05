"""A tensor that is made of others of its shape, part by part in float64, or element by element on another way.

Nothing is computed before it is asked for.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

Tensors: TypeAlias = Sequence[torch.Tensor]
Floats: TypeAlias = NDArray[np.float64]
Indices: TypeAlias = NDArray[np.int64]
# One number for a tensor, or one for each of its rows, [rows, 1], or columns, [1, columns].
Coefficient: TypeAlias = "float | torch.Tensor"

# Elements of one step: what it needs in float64 stays in the processor's second cache.
PART = 1 << 17


class Computed(Protocol):
    """A tensor that is computed where it is asked for: in order, or element by element on another way, by NumPy."""

    def part(self, start: int, stop: int) -> torch.Tensor:
        """The elements from `start` to `stop`, float64 [stop - start]."""

    def sample(self, indices: Indices) -> Floats:
        """The elements at `indices` [N], float64 [N]."""


@dataclass(frozen=True, kw_only=True)
class Combination:
    """The sum of `coefficients[i]` · `tensors[i]`, divided by `divisor`; a tensor of coefficient 0 does not count."""

    tensors: Tensors
    coefficients: Sequence[Coefficient]
    divisor: float = 1.0

    def part(self, start: int, stop: int) -> torch.Tensor:
        """As `Computed.part`."""
        total: torch.Tensor | None = None
        for tensor, coefficient in zip(self.tensors, self.coefficients, strict=True):
            if not isinstance(coefficient, torch.Tensor) and not coefficient:
                continue
            term = part_of(tensor, start, stop).mul_(_slice(coefficient, tensor.shape, start, stop))
            total = term if total is None else total.add_(term)
        if total is None:
            return torch.zeros(stop - start, dtype=torch.float64)
        return total.div_(self.divisor) if self.divisor != 1 else total

    def sample(self, indices: Indices) -> Floats:
        """As `Computed.sample`."""
        terms = []
        for tensor, coefficient in zip(self.tensors, self.coefficients, strict=True):
            if isinstance(coefficient, torch.Tensor):
                terms.append(elements(tensor, indices) * elements(coefficient.expand(tensor.shape), indices))
            elif coefficient:
                terms.append(elements(tensor, indices) * coefficient)
        total = reduce(np.add, terms) if terms else np.zeros(len(indices))
        return total / self.divisor if self.divisor != 1 else total


class Mask(Protocol):
    """Which elements of a task vector are kept."""

    def part(self, start: int, stop: int, delta: torch.Tensor) -> torch.Tensor:
        """bool [stop - start] of the elements from `start` to `stop`, whose task vector is `delta`."""

    def sample(self, indices: Indices, delta: Floats) -> NDArray[np.bool_]:
        """bool [N] of the elements at `indices`."""


@dataclass(frozen=True, kw_only=True)
class TaskVectors:
    """`base` + `factor` · the mix of the task vectors `tensors[i]` - `base`, each masked, scaled and weighted.

    `elect`: only what has the sign of the weighted sum is mixed (TIES). `normalize`: the mix is divided by the sum of
    the weights that are in it.
    """

    base: torch.Tensor
    tensors: Tensors
    weights: Sequence[float]
    masks: Sequence[Mask | None] = ()
    scales: Sequence[float] = ()
    elect: bool = False
    normalize: bool = False
    factor: float = 1.0

    def part(self, start: int, stop: int) -> torch.Tensor:
        """As `Computed.part`."""
        base = part_of(self.base, start, stop)
        deltas = []
        for number, (tensor, weight) in enumerate(zip(self.tensors, self.weights, strict=True)):
            delta = part_of(tensor, start, stop).sub_(base)
            if self.masks and (mask := self.masks[number]) is not None:
                delta = delta.mul_(mask.part(start, stop, delta))
            if self.scales:
                delta = delta.mul_(self.scales[number])
            deltas.append(delta.mul_(weight))
        if not deltas:
            return base
        total = deltas[0].clone()
        for delta in deltas[1:]:
            total.add_(delta)
        divisor: torch.Tensor | float = sum(self.weights)
        if self.elect:
            # In float64 throughout: torch takes several times as long where a mask of booleans is made or used.
            sign = torch.copysign(torch.ones((), dtype=torch.float64), total.add_(0.0))
            mixed, divisor = torch.zeros_like(total), torch.zeros_like(total)
            for delta, weight in zip(deltas, self.weights, strict=True):
                agreeing = delta.mul_(sign).clamp_(min=0)
                mixed.add_(agreeing)
                if self.normalize:
                    divisor.add_(agreeing.sign_().mul_(weight))
            total = mixed.mul_(sign)
            if self.normalize:
                divisor.masked_fill_(divisor == 0, 1)
        if self.normalize:
            total.div_(divisor)
        if self.factor != 1:
            total.mul_(self.factor)
        return base.add_(total)

    def sample(self, indices: Indices) -> Floats:
        """As `Computed.sample`."""
        base = elements(self.base, indices)
        deltas = []
        for number, (tensor, weight) in enumerate(zip(self.tensors, self.weights, strict=True)):
            delta = elements(tensor, indices) - base
            if self.masks and (mask := self.masks[number]) is not None:
                delta = delta * mask.sample(indices, delta)
            deltas.append((delta * self.scales[number] if self.scales else delta) * weight)
        if not deltas:
            return base
        total = deltas[0].copy()
        for delta in deltas[1:]:
            total += delta
        divisor = np.full_like(total, sum(self.weights))
        if self.elect:
            sign = np.copysign(1.0, total + 0.0)
            agreeing = [np.where(delta * sign > 0, delta * sign, 0.0) for delta in deltas]
            total, divisor = np.zeros_like(total), np.zeros_like(total)
            for delta, weight in zip(agreeing, self.weights, strict=True):
                total += delta
                divisor += np.where(delta > 0, weight, 0.0)
            total *= sign
            divisor[divisor == 0] = 1
        mixed = total / divisor if self.normalize else total
        return base + (mixed * self.factor if self.factor != 1 else mixed)


def steps(count: int) -> Iterator[tuple[int, int]]:
    """Where each step of PART elements starts and stops."""
    return ((start, min(start + PART, count)) for start in range(0, count, PART))


def elements(tensor: torch.Tensor, indices: Indices) -> Floats:
    """The elements at flat `indices`, float64."""
    found = tensor[np.unravel_index(indices, tensor.shape)] if tensor.dim() else tensor.reshape(1)[indices]
    return np.asarray(found.double().numpy())


def part_of(tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """A copy of these elements in float64."""
    return tensor.reshape(-1)[start:stop].to(torch.float64, copy=True)


def _slice(coefficient: Coefficient, shape: torch.Size, start: int, stop: int) -> Coefficient:
    """That of the elements from `start` to `stop`."""
    if not isinstance(coefficient, torch.Tensor):
        return coefficient
    places = np.unravel_index(np.arange(start, stop), shape)
    return coefficient.expand(shape)[tuple(torch.from_numpy(np.asarray(p)) for p in places)]
