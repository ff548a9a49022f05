"""Causal self-attention with rotated queries and keys, grouped heads, padding, and a cache that is made once."""

import torch
from torch import nn
from torch.nn import functional

from runner.evaluation.llama_config import LlamaConfig, frequencies

Rotation = tuple[torch.Tensor, torch.Tensor]  # cos and sin, [B or 1, 1, T, head_dim]


class Rotary(nn.Module):
    """The rotation of queries and keys at their positions."""

    inv_freq: torch.Tensor

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.grows = config.rope_parameters["rope_type"] in ("dynamic", "longrope")  # with the longest position
        inv_freq, self.scaling = frequencies(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def forward(self, hidden: torch.Tensor, positions: torch.Tensor) -> Rotation:
        """`positions` [B or 1, T] → cos and sin in the dtype of `hidden`."""
        inv_freq = frequencies(self.config, int(positions.max()) + 1)[0] if self.grows else self.inv_freq
        angles = positions[:, None, :, None].float() * inv_freq.to(hidden.device)
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * self.scaling).to(hidden.dtype), (angles.sin() * self.scaling).to(hidden.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """[B, heads, T, head_dim], the first half of the dimensions paired with the second."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


class KeyValueCache:
    """Keys and values of every layer at the positions so far; `length` of them, and more where that is too few.

    `padding` [B]: how many positions on the left of each row are padding. Llama layers take a cache of transformers,
    which has these methods too.
    """

    def __init__(self, padding: torch.Tensor | None = None, length: int = 0) -> None:
        self.padding = padding if padding is not None and bool(padding.any()) else None
        self._length = length
        self._layers: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._filled: list[int] = []

    def get_seq_length(self) -> int:
        """How many positions are in it."""
        return self._filled[0] if self._filled else 0

    def crop(self, length: int) -> None:
        """Forget all but the first `length` positions."""
        self._filled = [length] * len(self._filled)

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [B, heads, t, head_dim] to those of `layer` → all of them, views [B, heads, T, head_dim]."""
        if layer == len(self._layers):
            self._layers.append((_room(keys, self._length), _room(values, self._length)))
            self._filled.append(0)
        start, count = self._filled[layer], keys.shape[2]
        end = self._filled[layer] = start + count
        if end > self._layers[layer][0].shape[2]:
            larger = tuple(_room(old, 2 * end) for old in self._layers[layer])
            for new, old in zip(larger, self._layers[layer], strict=True):
                new[:, :, :start] = old[:, :, :start]
            self._layers[layer] = larger[0], larger[1]
        all_keys, all_values = self._layers[layer]
        all_keys.narrow(2, start, count).copy_(keys)
        all_values.narrow(2, start, count).copy_(values)
        return all_keys.narrow(2, 0, end), all_values.narrow(2, 0, end)


def _room(like: torch.Tensor, length: int) -> torch.Tensor:
    return like.new_empty(*like.shape[:2], max(length, like.shape[2]), like.shape[3])


def causal_mask(start: int, ids: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor | None:
    """Which of the positions so far each of `ids` [B, t], the first at `start`, attends to: [B or 1, 1, t, T].

    `seen` [B, T]: 0 where a position is padding. None where `attend` can do without.
    """
    count = ids.shape[1]
    seen = None if seen is None or bool(seen.all()) else seen.bool()
    if seen is None and (start == 0 or count == 1):
        return None
    positions = torch.arange(start + count, device=ids.device)
    mask = (positions <= positions[start:, None])[None, None]
    return mask if seen is None else mask & seen[:, None, None, :]


def attend(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, dropout: float = 0.0
) -> torch.Tensor:
    """Attention of `queries` [B, heads, t, n] over [B, groups, T, n] → [B, t, heads · n].

    Without a mask the queries are those of all positions, or of the last one.
    """
    batch, heads, count, size = queries.shape
    groups, grouped = keys.shape[1], False
    if heads > groups:
        if mask is None and size <= 256:
            grouped = True
        elif count == 1:
            queries = queries.reshape(batch, groups, heads // groups, size)
        else:
            keys, values = (each.repeat_interleave(heads // groups, dim=1) for each in (keys, values))
    found = functional.scaled_dot_product_attention(
        queries, keys, values, mask, dropout, mask is None and count > 1, enable_gqa=grouped
    )
    return found.reshape(batch, heads, count, size).transpose(1, 2).reshape(batch, count, heads * size)
