"""The methods as their papers write them, on whole tensors in float64: what the streamed ones must equal."""

import math

import numpy as np
import torch

from runner.merge.masks import uniform


def linear(tensors, weights, normalize=True):
    total = sum(w * t.double() for w, t in zip(weights, tensors, strict=True))
    return total / sum(weights) if normalize else total


def slerp(a, b, t):
    a, b = a.double(), b.double()
    cosine = float((a * b).sum() / (a.norm() * b.norm())) if a.norm() and b.norm() else 1.0
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


def nuslerp(a, b, weights, base=None, dim=None):
    t = weights[1] / sum(weights)
    a, b = a.double(), b.double()
    if base is not None:
        a, b = a - base.double(), b - base.double()
    shape = a.shape
    if dim is None:
        a, b, dim = a.reshape(-1), b.reshape(-1), 0
    cosine = (a * b).sum(dim, keepdim=True) / (a.norm(dim=dim, keepdim=True) * b.norm(dim=dim, keepdim=True))
    angle = torch.acos(cosine.clamp(-1, 1))
    mixed = (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)
    return mixed.reshape(shape) + (base.double() if base is not None else 0)


def model_stock(base, tensors, filter_wise=False):
    base, others = base.double(), [t.double() for t in tensors]
    deltas = [t - base if filter_wise else (t - base).reshape(1, -1) for t in others]
    cosines = [
        (a * b).sum(-1, keepdim=True) / (a.norm(dim=-1, keepdim=True) * b.norm(dim=-1, keepdim=True))
        for i, a in enumerate(deltas)
        for b in deltas[i + 1 :]
    ]
    cosine = sum(cosines) / len(cosines)
    n = len(others)
    t = n * cosine / (1 + (n - 1) * cosine)
    if not filter_wise:
        t = t.item()
    return t * sum(others) / n + (1 - t) * base


def karcher(tensors, max_iter=10, tol=1e-5):
    vectors = [t.double().reshape(-1) for t in tensors]
    units = [v / v.norm() for v in vectors]
    mean = sum(units) / len(units)
    mean = mean / mean.norm()
    for _ in range(max_iter):
        step = torch.zeros_like(mean)
        for unit in units:
            angle = math.acos(max(-1.0, min(1.0, float(mean @ unit))))
            if angle >= tol:
                step += angle / math.sin(angle) * (unit - float(mean @ unit) * mean) / len(units)
        length = float(step.norm())
        if length < tol:
            break
        mean = math.cos(length) * mean + math.sin(length) * step / length
        mean = mean / mean.norm()
    return (mean * sum(float(v.norm()) for v in vectors) / len(vectors)).reshape(tensors[0].shape)


def largest(delta, density):
    """1 where an element is among the int(density · N) largest in float32; of equal ones the first count."""
    size = delta.float().abs().reshape(-1).numpy()
    order = np.argsort(-size, kind="stable")[: int(density * size.size)]
    mask = np.zeros(size.size)
    mask[order] = 1
    return torch.from_numpy(mask).reshape(delta.shape)


def drawn(delta, density, seed):
    """1 where the element's random number is below the density."""
    numbers = uniform(seed, 0, delta.numel()) / 2**32
    return torch.from_numpy((numbers < density).astype(np.float64)).reshape(delta.shape)


def drawn_by_rank(delta, density, epsilon, seed):
    size = delta.float().abs()
    rows = size.reshape(-1, size.shape[-1]).numpy()
    rank = np.argsort(np.argsort(rows, axis=1, kind="stable"), axis=1, kind="stable")
    chance = density - epsilon + rank / (rows.shape[1] - 1) * 2 * epsilon
    numbers = (uniform(seed, 0, delta.numel()) / 2**32).reshape(chance.shape)
    return torch.from_numpy((numbers < chance).astype(np.float64)).reshape(delta.shape)


def task_vectors(base, tensors, weights, masks=None, elect=False, normalize=False, rescale=False, factor=1.0):
    base = base.double()
    deltas = [t.double() - base for t in tensors]
    if masks is not None:
        for i, mask in enumerate(masks):
            before = deltas[i].abs().sum()
            deltas[i] = deltas[i] * mask
            if rescale and before >= 1e-7 and deltas[i].abs().sum() >= 1e-7:
                deltas[i] = deltas[i] * (before / deltas[i].abs().sum())
    weighted = [delta * w for delta, w in zip(deltas, weights, strict=True)]
    total = sum(weighted)
    divisor = torch.full_like(base, sum(weights))
    if elect:
        sign = torch.where(total >= 0, 1.0, -1.0).double()
        agrees = [(d.sign() == sign).double() for d in weighted]
        total = sum(d * a for d, a in zip(weighted, agrees, strict=True))
        divisor = sum(w * a for w, a in zip(weights, agrees, strict=True))
        divisor[divisor == 0] = 1
    return base + factor * (total / divisor if normalize else total)
