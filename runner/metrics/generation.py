"""The next token out of logits, and where two continuations part: pure functions of tensors and numbers."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch

# How many candidates are looked at for the nucleus of top_p before all: sorting a vocabulary takes ten times as long.
_CANDIDATES = (128, 4096)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn. `temperature` 0: the likeliest one, the lowest id where several are.

    In this order: `repetition_penalty` θ on ids seen before (z > 0: z/θ, else z·θ), division by the temperature,
    `top_k` (ties at the k-th stay), `top_p` (the smallest set, likeliest first, lowest id first, whose probabilities
    sum up to it), `min_p` (what has at least that share of the likeliest one's probability).
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


def penalised(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """`logits` [B, V] with the repetition penalty at the ids that are True in `seen` [B, V]."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def probabilities(logits: torch.Tensor, how: Sampling) -> torch.Tensor:
    """What remains of softmax(logits / temperature) [B, V] in float64, 0 for what a filter removes.

    `logits` [B, V] in float32, the repetition penalty already in them; the temperature is above 0.
    """
    scaled = logits.double() / how.temperature
    if how.top_k is not None and how.top_k < scaled.shape[-1]:
        scaled = scaled.masked_fill(scaled < scaled.topk(how.top_k).values[:, -1:], -math.inf)
    p = scaled.softmax(-1)
    if how.top_p < 1:
        p = _nucleus(p, how.top_p)
    if how.min_p > 0:
        p = p.masked_fill(p < how.min_p * p.amax(-1, keepdim=True), 0)
    return p


def _nucleus(p: torch.Tensor, top_p: float) -> torch.Tensor:
    # Elsewhere than on a CPU a look at the sums would be a wait for the device.
    for count in _CANDIDATES if p.device.type == "cpu" else ():
        if count < p.shape[-1] and bool(((largest := p.topk(count).values).sum(-1) > top_p).all()):
            break
    else:
        largest = p.sort(-1, descending=True).values
    sums = largest.cumsum(-1)
    # Of the set, the last one's probability; and how many of those that have just that belong to the set.
    last = (sums < top_p).sum(-1, keepdim=True).clamp(max=sums.shape[-1] - 1)
    least = largest.gather(-1, last)
    equal = p == least
    room = last + 1 - (largest > least).sum(-1, keepdim=True)
    return p.masked_fill((p < least) | (equal & (equal.cumsum(-1) > room)), 0)


def choose(logits: torch.Tensor, how: Sampling, draws: torch.Tensor | None) -> torch.Tensor:
    """Ids [B] for `logits` [B, V] in float32: greedy, or where `draws` [B] (float64, uniform in [0, 1)) falls.

    Inverse-CDF sampling in the order of ids: the first whose cumulative probability exceeds the draw's share of the
    total. One draw a token, whatever the distribution, so models that get the same draws can be compared.
    """
    if how.temperature == 0:
        return logits.argmax(-1)
    assert draws is not None
    cumulative = probabilities(logits, how).cumsum(-1)
    total = cumulative[:, -1:].contiguous()
    found = torch.searchsorted(cumulative, draws.unsqueeze(-1) * total, right=True)
    # The product may round up to the total itself; where logits are not finite, any id is as wrong as another.
    return torch.minimum(found, torch.searchsorted(cumulative, total)).clamp(max=logits.shape[-1] - 1).squeeze(-1)


def until_end(tokens: Sequence[int], ends: Collection[int]) -> list[int]:
    """`tokens` up to the first of `ends`, that one included: what a model says after the end of a text is no text."""
    return list(tokens[: next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))])


def agreement(subject: Sequence[int], reference: Sequence[int]) -> dict[str, float | None]:
    """Share of equal tokens by position, and the first position where they differ (None where none does).

    Where one has ended, the other's further tokens are different.
    """
    same = [a == b for a, b in zip_longest(subject, reference)]
    return {
        "agreement": sum(same) / len(same) if same else None,
        "first_divergence": same.index(False) if False in same else None,
    }


def repetition(tokens: Sequence[int], n: int = 3) -> float | None:
    """Share of n-grams that occurred before in the same sequence: 0 has no repeats; None under n tokens."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else None
