"""Attention of the records: rotary embeddings, what a position may see, and what is kept between passes.

Tensors of heads are [B, T, heads, size]. Positions count from 0 at a row's first token; padding on the left has
negative ones. Scores, softmax and rotary run in float32.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

QUERY_CHUNK = 512  # queries that meet their keys at once: the scores of a long sequence are never whole in memory
BLOCK = 128  # positions that a window counts in

Rotation = tuple[Tensor, Tensor]
# The queries from … to … of a pass, → what each sees [B or 1, 1, queries, keys]; None: all that came before it.
Mask = Callable[[int, int], Tensor] | None


def frequencies(size: int, kind: str) -> Tensor:
    """Radians a position for each of the `size`/2 pairs.

    F: 10000^(-2j/size). H and I: 1024^(-j/(size/4 - 1)) for the first half of the pairs, and 0 for the rest.
    """
    if kind == "F":
        return 10000.0 ** -(torch.arange(0, size, 2, dtype=torch.float32) / size)
    turning = (1 / 1024) ** torch.linspace(0, 1, size // 4, dtype=torch.float32)
    return F.pad(turning, (0, size // 2 - size // 4))


def yarn(turns: Tensor, windows: tuple[int, ...]) -> tuple[Tensor, float]:
    """Frequencies and scale of attention after training went through `windows` (blocks of 128).

    A change from a to b: r = 128 a f/2π, w = clamp((r - 1)/31, 0, 1), f ← f (a/b + w (1 - a/b)),
    s ← s (1 + 0.2 ln(b/a)); s starts at 0.1.
    """
    scale = 0.1
    for before, after in pairwise(windows):
        weight = ((BLOCK * before * turns / (2 * math.pi) - 1) / 31).clamp(0, 1)
        turns = turns * (before / after + weight * (1 - before / after))
        scale *= 1 + 0.2 * math.log(after / before)
    return turns, scale


def rotation(positions: Tensor, turns: Tensor, *, paired: bool = False) -> Rotation:
    """Cosines and sines [B or 1, T, 1, pairs] at `positions` [B or 1, T]; for paired heads [B or 1, T, 1, 2, pairs].

    Of paired heads those of even number turn at position 2t, those of odd number at 2t + 1.
    """
    if paired:
        positions = torch.stack([2 * positions, 2 * positions + 1], -1)
    angles = positions.float().unsqueeze(-1) * turns.to(positions.device)
    return angles.cos().unsqueeze(2), angles.sin().unsqueeze(2)


def rotate(x: Tensor, angles: Rotation, *, neighbours: bool = False) -> Tensor:
    """a' = a cos + b sin, b' = b cos - a sin for the pairs (a, b) of the last dimension of `x`.

    Pairs are element j of both halves, or `neighbours`: elements 2j and 2j + 1.
    """
    cos, sin = angles
    if neighbours:
        a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([a * cos + b * sin, b * cos - a * sin], -1).flatten(-2).to(x.dtype)
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1).to(x.dtype)


def pair(x: Tensor) -> Tensor:
    """[B, T, H, size] → [B, 2T, H/2, size]: position 2t has the first half of the heads, 2t + 1 the other."""
    return x.reshape(x.shape[0], 2 * x.shape[1], x.shape[2] // 2, x.shape[3])


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float = 0.12, mask: Mask = None) -> Tensor:
    """q [B, heads, T, size], k and v [B, heads, N, size] → [B, heads, T, size]; the last query is at the last key."""
    length, count = q.shape[2], k.shape[2]
    if mask is None and q.dtype == torch.float32 and length in (1, count):
        return F.scaled_dot_product_attention(q, k, v, is_causal=length > 1, scale=scale)
    parts = []
    for start in range(0, length, QUERY_CHUNK):
        end = min(start + QUERY_CHUNK, length)
        if mask is None:
            seen = torch.ones(end - start, count, dtype=torch.bool, device=q.device).tril(count - length + start)
        else:
            seen = mask(start, end)
        if q.dtype == torch.float32:
            parts.append(F.scaled_dot_product_attention(q[:, :, start:end], k, v, attn_mask=seen, scale=scale))
            continue
        scores = q[:, :, start:end].float() @ k.float().mT * scale
        parts.append(scores.masked_fill(~seen, float("-inf")).softmax(-1).to(v.dtype) @ v)
    return torch.cat(parts, dim=2)


@dataclass(frozen=True, kw_only=True)
class Window:
    """How far back a position sees. `blocks`: its own block of 128 and the `size` - 1 before it; else `size` positions
    before its own."""

    size: int
    blocks: bool

    def first(self, positions: Tensor) -> Tensor:
        """The first position that each of `positions` sees."""
        if self.blocks:
            return (positions.div(BLOCK, rounding_mode="floor") - (self.size - 1)).clamp(min=0) * BLOCK
        return positions - self.size

    @property
    def room(self) -> int:
        """How many positions a cache holds, its last block complete."""
        return self.size * BLOCK if self.blocks else self.size + BLOCK


@dataclass
class Memory:
    """Keys and values of one layer [B, heads, room, size]; those of slots `start` to `end` are kept, from 0 on."""

    keys: Tensor
    values: Tensor
    start: int = 0
    end: int = 0

    def extended(self, k: Tensor, v: Tensor, keep: int) -> tuple[Tensor, Tensor]:
        """What is kept, and the new after it; slots before `keep` are dropped where there is no more room."""
        known, total = self.end - self.start, self.end - self.start + k.shape[2]
        if total <= self.keys.shape[2]:
            self.keys[:, :, known:total], self.values[:, :, known:total] = k, v
            self.end += k.shape[2]
            return self.keys[:, :, :total], self.values[:, :, :total]
        k = torch.cat([self.keys[:, :, :known], k], dim=2)
        v = torch.cat([self.values[:, :, :known], v], dim=2)
        self.end, self.start = self.start + total, keep
        tail = self.end - keep
        if tail > self.keys.shape[2]:  # more was fed than there was to be room for
            self.keys, self.values = k[:, :, total - tail :].clone(), v[:, :, total - tail :].clone()
        else:
            self.keys[:, :, :tail], self.values[:, :, :tail] = k[:, :, total - tail :], v[:, :, total - tail :]
        return k, v


@dataclass(kw_only=True)
class Cache:
    """What a model keeps of `count` positions: `layers`, and of the last position what the next looks back to (`last`).

    `padding` [B]: positions on the left of each row that are none. `documents` [B, count]: the number of each
    position's document, where documents are told apart.
    """

    padding: Tensor
    length: int
    count: int = 0
    layers: dict[int, Memory] = field(default_factory=dict)
    last: dict[str, Tensor] = field(default_factory=dict)
    documents: Tensor | None = None


class Pass:
    """One pass over T new tokens of B rows, after those in `cache` where there is one."""

    def __init__(self, ids: Tensor, end_of_text: int | None, cache: Cache | None) -> None:
        self.cache, self.length = cache, ids.shape[1]
        self.before = cache.count if cache else 0
        slots = torch.arange(self.before, self.before + self.length, device=ids.device)
        self.padded = cache is not None and bool(cache.padding.any())
        self.positions = slots[None] - cache.padding[:, None] if cache and self.padded else slots[None]
        self.documents: Tensor | None = None  # of all positions so far
        if end_of_text is not None:
            new = (ids == end_of_text).cumsum(1)
            known = cache.documents if cache else None
            self.documents = new if known is None else torch.cat([known, new + known[:, -1:]], dim=1)
        if cache:
            cache.documents, cache.count = self.documents, self.before + self.length
        self.first_values: Tensor | None = None  # v of the first block, where the others mix it into theirs
        self._masks: dict[tuple[Window | None, bool, int], Callable[[int, int], Tensor]] = {}

    def previous(self, name: str, x: Tensor, first: Tensor) -> Tensor:
        """`x` [B, T, …] of the position before each; for a row's first token `first` [B, T, …]."""
        known = self.cache.last.get(name) if self.cache else None
        shifted = torch.cat([first[:, :1] if known is None else known, x[:, :-1]], dim=1)
        if self.cache:
            self.cache.last[name] = x[:, -1:].clone()
        if self.padded:
            begins = (self.positions == 0).reshape(*self.positions.shape, *[1] * (x.dim() - 2))
            shifted = torch.where(begins, first, shifted)
        return shifted

    def remember(
        self, layer: int, k: Tensor, v: Tensor, window: Window | None, *, paired: bool
    ) -> tuple[Tensor, Tensor, int]:
        """Keys and values [B, heads, N, size] that these [B, heads, T or 2T, size] may see, and the first slot."""
        if self.cache is None:
            return k, v, 0
        memory = self.cache.layers.get(layer)
        steps = 2 if paired else 1
        if memory is None:
            room = steps * self.cache.length
            if window is not None:
                room = min(room, window.room + (BLOCK if self.padded and window.blocks else 0))
            shape = (k.shape[0], k.shape[1], room, k.shape[3])
            memory = self.cache.layers[layer] = Memory(keys=k.new_empty(shape), values=v.new_empty(shape))
        start, keep = memory.start, 0
        if window is not None:
            after = self.positions[:, -1:] + 1
            first = window.first(steps * after) + steps * (self.before + self.length - after)
            keep = max(0, int(first.min()))
        return *memory.extended(k, v, keep), start

    def mask(self, window: Window | None, start: int, *, paired: bool = False) -> Mask:
        """What the new positions see of those from slot `start` on; None: all before them."""
        steps, end = 2 if paired else 1, self.before + self.length
        if not self.padded and self.documents is None and (window is None or self._is_whole(window, steps)):
            return None if steps * self.length in (1, steps * end - start) else self._seen(None, paired, start)
        return self._seen(window, paired, start)

    def always(self, window: Window, start: int) -> Callable[[int, int], Tensor]:
        """What the new positions see of those from slot `start` on, as a mask whatever it hides."""
        return self._seen(window, False, start)

    def _is_whole(self, window: Window, steps: int) -> bool:
        """Whether even the last position sees the first."""
        return int(window.first(torch.tensor(steps * (self.before + self.length) - 1))) <= 0

    def _seen(self, window: Window | None, paired: bool, start: int) -> Callable[[int, int], Tensor]:
        key = (window, paired, start)
        if key not in self._masks:
            self._masks[key] = self._new_mask(*key)
        return self._masks[key]

    def _new_mask(self, window: Window | None, paired: bool, start: int) -> Callable[[int, int], Tensor]:
        steps, end = 2 if paired else 1, self.before + self.length
        slots = torch.arange(start, steps * end, device=self.positions.device)[None]
        padding = self.cache.padding[:, None] if self.cache and self.padded else torch.zeros_like(slots[:, :1])
        keys = slots - steps * padding
        documents = None if self.documents is None else self.documents.repeat_interleave(steps, 1)

        def seen(first: int, last: int) -> Tensor:
            chosen = slice(steps * self.before - start + first, steps * self.before - start + last)
            queries = keys[:, chosen, None]
            mask = keys[:, None] <= queries
            if window is not None:
                mask &= keys[:, None] >= window.first(queries)
            if documents is not None:
                own = documents[:, start:]
                mask = mask & (own[:, None] == own[:, chosen, None])
            if self.padded:  # padding sees itself: a row of nothing would be NaN
                mask = (mask & (keys[:, None] >= 0)) | (slots[:, None] == slots[:, chosen, None])
            return mask[:, None]

        return seen
