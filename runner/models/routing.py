"""From a router's logits to the weight of each expert for each token (spec/formats.md §4)."""

import torch


def top_k_weights(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Softmax over the k largest of the router's logits [..., E], without temperature; 0 for the others."""
    values, indices = logits.topk(k, dim=-1)
    weights = values.softmax(-1, dtype=torch.float32).to(logits.dtype)
    return torch.zeros_like(logits).scatter(-1, indices, weights)


def dense_weights(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Softmax of all of the router's logits [..., E] at `temperature`."""
    return (logits / temperature).softmax(-1, dtype=torch.float32).to(logits.dtype)


def balance_loss(weights: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """The MSE between the experts' mean use and 1/E: 0 when all are used alike.

    `weights` [B, T, E]; positions where `attention_mask` [B, T] is 0 do not count.
    """
    tokens = weights.flatten(0, -2)
    if attention_mask is not None:
        tokens = tokens[attention_mask[:, -weights.shape[1] :].flatten().bool()]
    return (tokens.mean(0) - 1 / weights.shape[-1]).square().mean()
