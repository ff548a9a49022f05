"""How one tensor is made of several of the same shape: each method is a pure function whose signature is its config.

Arithmetic is float64, whatever the tensors are stored in. What a method needs of whole tensors first (products,
thresholds, norms) is a few numbers, taken part by part as well.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch

from runner.merge.combination import Coefficient, Combination, Floats, TaskVectors, Tensors, part_of, steps
from runner.merge.masks import ByRank, Random, l1_scales, largest

# Above this |cosine| the arc between two tensors is too short for its sine: linear interpolation is the limit.
PARALLEL = 0.9995


def linear(tensors: Tensors, *, weights: Sequence[float], normalize: bool = True) -> Combination:
    """The sum of the tensors by their weights; with `normalize` the weights are made to sum to 1.

    Wortsman et al. 2022, "Model soups", arXiv:2203.05482.
    """
    return Combination(tensors=tensors, coefficients=weights, divisor=sum(weights) if normalize else 1.0)


def slerp(first: torch.Tensor, second: torch.Tensor, *, t: float) -> Combination:
    """From the first (t = 0) to the second (t = 1) along the arc between them, each taken as one vector.

    Where one is zero or they point (almost) the same or opposite way, which has no arc, it is linear.
    Shoemake 1985, "Animating rotation with quaternion curves".
    """
    cosine = _cosine(gram((first, second)))
    return Combination(tensors=(first, second), coefficients=arc(cosine, t, PARALLEL))


def arc(cosine: float, t: float, parallel: float) -> tuple[float, float]:
    """The two coefficients of spherical interpolation at `t`; linear where |cosine| is above `parallel`."""
    if not abs(cosine) <= parallel:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def nuslerp(
    first: torch.Tensor,
    second: torch.Tensor,
    *,
    weights: Sequence[float],
    base: torch.Tensor | None = None,
    row_wise: bool = False,
    flatten: bool = True,
) -> Combination:
    """`slerp` at t = the second's share of the weights; of the task vectors where there is a `base`.

    Without `flatten` each row is a vector of its own, with `row_wise` each column (mergekit's name for it). The method
    is mergekit's, without a paper.
    """
    t = weights[1] / sum(weights)
    one: Coefficient
    two: Coefficient
    if flatten or first.dim() < 2:
        one, two = arc(_cosine(gram((first, second), base)), t, _NUSLERP_PARALLEL)
    else:
        one, two = _arcs(first.double(), second.double(), base, t, 0 if row_wise else -1)
    if base is None:
        return Combination(tensors=(first, second), coefficients=(one, two))
    return Combination(tensors=(first, second, base), coefficients=(one, two, 1 - one - two))


# Where the sine of the angle is below 1e-8.
_NUSLERP_PARALLEL = math.sqrt(1 - 1e-16)


def _arcs(
    a: torch.Tensor, b: torch.Tensor, base: torch.Tensor | None, t: float, dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    if base is not None:
        a, b = a - base.double(), b - base.double()
    norms = a.norm(dim=dim, keepdim=True) * b.norm(dim=dim, keepdim=True)
    cosine = ((a * b).sum(dim=dim, keepdim=True) / norms.clamp(min=1e-300)).clamp(-1, 1)
    angle = torch.acos(cosine)
    sine = torch.sin(angle)
    straight = (sine < 1e-8) | (norms == 0)
    one = torch.where(straight, 1 - t, torch.sin((1 - t) * angle) / sine)
    return one, torch.where(straight, t, torch.sin(t * angle) / sine)


def model_stock(base: torch.Tensor, tensors: Tensors, *, filter_wise: bool = False) -> Combination:
    """Between `base` and the mean of the others, at t = N cos θ / (1 + (N - 1) cos θ); θ: between two task vectors.

    Of more than two the mean of the cosines of all pairs is taken, of which the paper says nothing. `filter_wise`:
    each row has an angle of its own. Jang et al. 2024, "Model Stock", arXiv:2403.19522.
    """
    count = len(tensors)
    if filter_wise and base.dim() > 1:
        deltas = [tensor.double() - base.double() for tensor in tensors]
        rows = [_pair_cosine(a, b) for i, a in enumerate(deltas) for b in deltas[i + 1 :]]
        cosine: Coefficient = torch.stack(rows).mean(dim=0)
    else:
        products = gram(tensors, base)
        pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
        cosines = [_bounded(products[i, j] / max(_length(products, i) * _length(products, j), 1e-6)) for i, j in pairs]
        cosine = sum(cosines) / len(cosines)
    t = count * cosine / (1 + (count - 1) * cosine)
    return Combination(tensors=(*tensors, base), coefficients=(*[t / count] * count, 1 - t))


def _pair_cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The cosine between each row of `a` and that of `b`, [rows, 1, …]."""
    norms = a.norm(dim=-1, keepdim=True) * b.norm(dim=-1, keepdim=True)
    return ((a * b).sum(dim=-1, keepdim=True) / norms.clamp(min=1e-6)).clamp(-1, 1)


def karcher(tensors: Tensors, *, max_iter: int = 10, tol: float = 1e-5) -> Combination:
    """The Riemannian mean of the directions, with the mean length: every iterate is a sum of the tensors by numbers.

    Karcher 1977, "Riemannian center of mass and mollifier smoothing".
    """
    products = gram(tensors)
    lengths = [_length(products, i) for i in range(len(tensors))]
    valid = [i for i, length in enumerate(lengths) if length > tol]
    if not valid:
        return Combination(tensors=tensors, coefficients=[0.0] * len(tensors))
    cosines = np.array([[products[i, j] / (lengths[i] * lengths[j]) for j in valid] for i in valid])
    share = 1 / len(valid)
    # Directions as sums of the unit vectors by `mean`; the product of two is mean · cosines · other.
    mean = np.full(len(valid), share)
    norm = math.sqrt(max(float(mean @ cosines @ mean), 0.0))
    mean = np.eye(len(valid))[0] if norm < tol else mean / norm
    for _ in range(max_iter):
        step = np.zeros(len(valid))
        for number, unit in enumerate(np.eye(len(valid))):
            dot = _bounded(float(mean @ cosines[number]))
            angle = math.acos(dot)
            if angle >= tol:
                step += share * (angle / math.sin(angle)) * (unit - dot * mean)
        length = math.sqrt(max(float(step @ cosines @ step), 0.0))
        if length < tol:
            break
        mean = math.cos(length) * mean + math.sin(length) * (step / length)
        norm = math.sqrt(max(float(mean @ cosines @ mean), 0.0))
        mean = mean / norm if norm > tol else mean
    scale = sum(lengths) / len(tensors)
    found = dict(zip(valid, mean, strict=True))
    return Combination(
        tensors=tensors,
        coefficients=[scale * float(found[i]) / lengths[i] if i in found else 0.0 for i in range(len(tensors))],
    )


def passthrough(tensor: torch.Tensor, *, scale: float = 1.0) -> Combination:
    """The tensor itself, times `scale`."""
    return Combination(tensors=(tensor,), coefficients=(scale,))


def task_arithmetic(
    base: torch.Tensor, tensors: Tensors, *, weights: Sequence[float], normalize: bool = False, factor: float = 1.0
) -> TaskVectors:
    """`base` and the task vectors by their weights. Ilharco et al. 2023, arXiv:2212.04089."""
    return TaskVectors(base=base, tensors=tensors, weights=weights, normalize=normalize, factor=factor)


def ties(
    base: torch.Tensor,
    tensors: Tensors,
    *,
    weights: Sequence[float],
    densities: Sequence[float],
    normalize: bool = True,
    rescale: bool = False,
    factor: float = 1.0,
) -> TaskVectors:
    """Of each task vector the largest `density` of its elements; then only those with the sign of the weighted sum.

    Yadav et al. 2023, "TIES-Merging", arXiv:2306.01708.
    """
    masks = [largest(base, tensor, density) for tensor, density in zip(tensors, densities, strict=True)]
    return TaskVectors(
        base=base, tensors=tensors, weights=weights, masks=masks, elect=True, normalize=normalize, factor=factor,
        scales=l1_scales(base, tensors, masks) if rescale else (),
    )  # fmt: skip


def dare(
    base: torch.Tensor,
    tensors: Tensors,
    *,
    weights: Sequence[float],
    densities: Sequence[float],
    seeds: Sequence[bytes],
    elect: bool,
    normalize: bool = False,
    rescale: bool = True,
    factor: float = 1.0,
) -> TaskVectors:
    """Of each task vector a random `density` of its elements, drawn from its seed; with `elect` as TIES (dare_ties).

    `rescale` keeps its L1 norm, as mergekit does; the paper divides by the density, which is the same on average.
    Yu et al. 2024, "Language models are super Mario", arXiv:2311.03099.
    """
    drawn = zip(seeds, densities, strict=True)
    masks = [None if density >= 1 else Random(seed=seed, density=density) for seed, density in drawn]
    return TaskVectors(
        base=base, tensors=tensors, weights=weights, masks=masks, elect=elect, normalize=normalize, factor=factor,
        scales=l1_scales(base, tensors, masks) if rescale else (),
    )  # fmt: skip


def della(
    base: torch.Tensor,
    tensors: Tensors,
    *,
    weights: Sequence[float],
    densities: Sequence[float],
    epsilons: Sequence[float],
    seeds: Sequence[bytes],
    elect: bool = True,
    normalize: bool = True,
    rescale: bool = True,
    factor: float = 1.0,
) -> TaskVectors:
    """`dare` whose probability grows with an element's rank in its row: from density - epsilon to density + epsilon.

    Deep et al. 2024, "DELLA-Merging", arXiv:2406.11617.
    """
    masks = [
        None if density >= 1 else ByRank(base=base, tensor=tensor, density=density, epsilon=epsilon, seed=seed)
        for tensor, density, epsilon, seed in zip(tensors, densities, epsilons, seeds, strict=True)
    ]
    return TaskVectors(
        base=base, tensors=tensors, weights=weights, masks=masks, elect=elect, normalize=normalize, factor=factor,
        scales=l1_scales(base, tensors, masks) if rescale else (),
    )  # fmt: skip


def gram(tensors: Tensors, base: torch.Tensor | None = None) -> Floats:
    """The products of all pairs of the tensors as vectors (of their task vectors over `base`), float64 [N, N]."""
    count = len(tensors)
    products = np.zeros((count, count))
    for start, stop in steps(tensors[0].numel()):
        parts = [part_of(tensor, start, stop) for tensor in tensors]
        if base is not None:
            below = part_of(base, start, stop)
            parts = [part.sub_(below) for part in parts]
        for i, a in enumerate(parts):
            for j in range(i, count):
                products[i, j] += float(torch.dot(a, parts[j]))
    return products + np.triu(products, 1).T


def _length(products: Floats, number: int) -> float:
    return math.sqrt(max(float(products[number, number]), 0.0))


def _cosine(products: Floats) -> float:
    """Between the first two; 1 where one is zero, which has no direction."""
    norm = _length(products, 0) * _length(products, 1)
    return _bounded(float(products[0, 1]) / norm) if norm else 1.0


def _bounded(cosine: float) -> float:
    return min(max(cosine, -1.0), 1.0)
