"""Continuations of a prompt, and where two of them part."""

from collections.abc import Sequence

import torch
from torch import nn


@torch.inference_mode()
def generate(
    model: nn.Module, prompt: torch.Tensor, count: int, *, temperature: float = 0.0, seed: int = 0, cache: bool = True
) -> list[int]:
    """`count` further tokens after `prompt` [T], the end-of-text token included like any other.

    Greedy at temperature 0, else sampled from a generator of its own, so that two models see the same draws. With
    `cache` each step feeds one token to a KV cache; without, the whole sequence again: the tokens are the same.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens, past = prompt.unsqueeze(0), None
    for _ in range(count):
        if cache:
            output = model(tokens if past is None else tokens[:, -1:], past_key_values=past, use_cache=True)
            past = output.past_key_values
        else:
            output = model(tokens)
        logits = output.logits[0, -1].float().cpu()
        if temperature == 0:
            chosen = int(logits.argmax())
        else:
            # Inverse-CDF sampling: one uniform draw a token, whatever the distribution.
            cumulative = (logits.double() / temperature).softmax(-1).cumsum(-1)
            draw = torch.rand((), generator=generator, dtype=torch.float64) * cumulative[-1]
            chosen = min(int(torch.searchsorted(cumulative, draw, right=True)), len(logits) - 1)
        tokens = torch.cat([tokens, tokens.new_tensor([[chosen]])], dim=1)
    return tokens[0, len(prompt) :].tolist()


def agreement(subject: Sequence[int], reference: Sequence[int]) -> dict[str, float | None]:
    """Share of equal tokens by position, and the first position where they differ (None where none does)."""
    same = [a == b for a, b in zip(subject, reference, strict=True)]
    return {
        "agreement": sum(same) / len(same) if same else None,
        "first_divergence": same.index(False) if False in same else None,
    }


def repetition(tokens: Sequence[int], n: int = 3) -> float | None:
    """Share of n-grams that occurred before in the same sequence: 0 has no repeats; None under n tokens."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else None
