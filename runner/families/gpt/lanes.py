"""The residual streams of 2026: two lanes, one lane, and the gates and connections that MUDD computes for each token.

x0 is the first residual state, b the bigram embedding (its m dimensions are added to the first m of the stream), K the
gate of the skip from block 3 into block 6. README.md has the formulas.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from runner.families.gpt.attention import Pass
from runner.families.gpt.pieces import Pieces

SKIP_FROM, SKIP_INTO, SPLIT, COMPOSED = 3, 6, 7, 10


def plus_first(x: Tensor, added: Tensor) -> Tensor:
    """`x` [B, T, d] with `added` [B, T, m] on its first m dimensions."""
    if added.shape[-1] == x.shape[-1]:
        return x + added
    return torch.cat([x[..., : added.shape[-1]] + added, x[..., added.shape[-1] :]], -1)


def two_lanes(model: Pieces, ids: Tensor, x0: Tensor, this: Pass, outputs: list[Tensor]) -> Tensor:
    """2026-02-12: from block 7 on attention reads lane 0, the MLP lane 1, and both add to both."""
    z, beta, r, w = (model.weight(name) for name in ("x0_lambda", "bigram_lambda", "resid_lambda", "w_post"))
    values, angles, b = model.value_embeddings(ids), model.rotations(this), model.bigrams(ids, this)
    lane = other = x0 + beta[0] * b
    skipped = lane
    for i in range(model.config.num_layers):
        first, second = 2 * i, 2 * i + 1
        split = i >= SPLIT
        if i == SPLIT:
            other = lane
        if i == SKIP_INTO:
            lane = lane + model.gated_skip(x0, "skip_gate.weight", model.scalar("skip")[0]) * skipped
        else:
            enters = z[first] * x0 + (beta[first] * b if i else 0)
            out = model.attention(i, model.norm(lane), this, angles, values.get(i)) + enters
            lane = r[first] * lane + w[first, 0, 0] * out
            if split:
                other = r[first] * other + w[first, 1, 0] * out
        if i == SKIP_FROM:
            skipped = lane
        out = model.mlp(i, other if split else lane)
        lane = r[second] * lane + w[second, 0, 0] * out
        if split:
            other = r[second] * other + w[second, 1, 0] * out
        outputs.append(lane)
    return (lane + other) * 0.5 - model.scalar("backout")[0] * outputs[SPLIT]


def flat_lanes(model: Pieces, ids: Tensor, x0: Tensor, this: Pass, outputs: list[Tensor]) -> Tensor:
    """2026-02-16: as `two_lanes`; embeddings enter lane 0 alone, and before block 7 attention is added as it is."""
    z, beta, r, p = (model.weight(name) for name in ("x0_lambdas", "bigram_lambdas", "resid_lambdas", "post_lambdas"))
    values, angles, b = model.value_embeddings(ids), model.rotations(this), model.bigrams(ids, this)
    lane = other = x0 + beta[0] * b
    skipped = lane
    for i in range(model.config.num_layers):
        split = i >= SPLIT
        if i == SPLIT:
            other = lane
        if i == SKIP_INTO:
            lane = lane + model.gated_skip(x0, "skip_gate.weight", model.scalar("skip")[0]) * skipped
        else:
            enters = z[i] * x0 + (beta[i] * b if i else 0)
            out = model.attention(i, model.norm(lane), this, angles, values.get(i))
            lane = r[i, 0] * lane + (p[i, 0, 0] * out if split else out) + enters
            if split:
                other = r[i, 0] * other + p[i, 0, 1] * out
        if i == SKIP_FROM:
            skipped = lane
        out = model.mlp(i, other if split else lane)
        lane = r[i, 1] * lane + p[i, 1, 0] * out
        if split:
            other = r[i, 1] * other + p[i, 1, 1] * out
        outputs.append(lane)
    return (lane + other) * 0.5 - model.scalar("backout")[0] * outputs[SPLIT]


def one_lane(model: Pieces, ids: Tensor, x0: Tensor, this: Pass, outputs: list[Tensor]) -> Tensor:
    """From 2026-03-06 on: after block 7 attention reads that block's output.

    With `mudd` the coefficients of the last block, and of what is added after it, are computed for each token.
    """
    record, last = model.record, model.config.num_layers - 1
    r, p = model.weight("resid_lambdas"), model.weight("post_lambdas")
    values, angles, b = model.value_embeddings(ids), model.rotations(this), model.bigrams(ids, this)
    tokens = _Gates(model, x0) if record.mudd == "gated" else _Lambdas(model, x0)
    x = before_last = start = plus_first(x0, tokens.bigram(0) * b)
    if record.bigram == "sign" and record.mudd != "gated":
        x0 = start  # one memory in those scripts: what is added to x is added to x0
    for i in range(last + 1):
        if i == SKIP_FROM + 1:
            tokens.before_fourth(x)
        mlp = r[i, 1], p[i, 1]
        if i == SKIP_INTO:
            x = x + tokens.skip(x0) * outputs[SKIP_FROM]
        else:
            u = model.norm(x if i <= SPLIT else outputs[SPLIT])
            own = None
            if i == last and record.mudd:
                before_last = x
                own = (_dense_last if record.mudd == "dense" else _last)(model, x, start, outputs[SPLIT])
            out = model.attention(
                i,
                u,
                this,
                angles,
                values.get(i),
                value_gate=own.value_gate if own else None,
                added=own.values if own else None,
                alpha=tokens.alpha(i),
                head_gate=tokens.heads(i),
                composition=tokens.composition(i),
            )
            if own is not None:
                x = own.attention[0] * own.x + own.attention[1] * out + own.enters
                x, mlp = plus_first(x, own.bigram * b), own.mlp
            else:
                x = r[i, 0] * x + p[i, 0] * out + tokens.x0(i) * x0
                x = plus_first(x, tokens.bigram(i) * b) if i else x
        x = mlp[0] * x + mlp[1] * model.mlp(i, x)
        outputs.append(x)
    if record.backout is not None:
        x = x - model.scalar("backout")[0] * outputs[record.backout]
    if record.mudd:
        k = _dense(model, 1, x)[8:13] if record.mudd == "dense" else coefficients(model, "mudd", 1, x, 5)
        sources = (start, outputs[SPLIT], before_last, values[1], outputs[SKIP_FROM])
        for share, source in zip(k, sources, strict=True):
            x = x + share * source
    return x


class _Lambdas:
    """What enters each block, and its gates, where they are learned numbers."""

    def __init__(self, model: Pieces, x0: Tensor) -> None:
        self.model = model
        self._alphas = model.weight("xsa_alphas") if model.has("xsa_alphas") else None

    def bigram(self, i: int) -> Tensor:
        """β."""
        return self.model.weight("bigram_lambdas")[i]

    def x0(self, i: int) -> Tensor:
        """z."""
        return self.model.weight("x0_lambdas")[i]

    def alpha(self, i: int) -> Tensor | None:
        """α of XSA [H]."""
        has = self._alphas is not None and i in self.model.record.xsa and i not in self.model.record.paired
        return self._alphas[i] if self._alphas is not None and has else None

    def heads(self, i: int) -> Tensor | None:
        """The gates of heads, where they are not the bank's."""

    def composition(self, i: int) -> tuple[Tensor, Tensor] | None:
        """The weights of dynamic composition."""

    def skip(self, x0: Tensor) -> Tensor:
        """K."""
        return self.model.gated_skip(x0, "skip_gate.weight", self.model.scalar("skip")[0])

    def before_fourth(self, x: Tensor) -> None:
        """Called with the input of block 4."""


class _Gates(_Lambdas):
    """2026-05-27: the same numbers for each token [B, T, 1 or H], from x0 and from the input of block 4."""

    def __init__(self, model: Pieces, x0: Tensor) -> None:
        super().__init__(model, x0)
        found = torch.cat(coefficients(model, "mudd_gate", 0, x0, 26), -1)
        self._alpha = {1: found[..., :6], 3: found[..., 6:12]}
        self._heads = {3: found[..., 12:18]}
        self._enters = {i: found[..., 18 + 2 * i : 20 + 2 * i] for i in range(4)}
        self._skip, self._composition = found[..., :1], (found, found)

    def before_fourth(self, x: Tensor) -> None:
        found = torch.cat(coefficients(self.model, "mudd_gate", 1, x, 41), -1)
        self._alpha |= {4: found[..., :6], 7: found[..., 6:12]}
        self._heads[10] = found[..., 12:18]
        self._enters |= {i: found[..., 18 + 2 * n : 20 + 2 * n] for n, i in enumerate((4, 5, 7, 8, 9))}
        self._skip, self._composition = found[..., 28:29], (found[..., 29:35], found[..., 35:41])

    def bigram(self, i: int) -> Tensor:
        return self._enters[i][..., 1:]

    def x0(self, i: int) -> Tensor:
        return self._enters[i][..., :1]

    def alpha(self, i: int) -> Tensor | None:
        return self._alpha.get(i)

    def heads(self, i: int) -> Tensor | None:
        return self._heads.get(i)

    def composition(self, i: int) -> tuple[Tensor, Tensor] | None:
        return self._composition if i == COMPOSED else None

    def skip(self, x0: Tensor) -> Tensor:
        return torch.sigmoid(self.model.scalar("skip")[0]) * self._skip


@dataclass(frozen=True, kw_only=True)
class _LastBlock:
    """The last block: `x` goes on, `values` are added to v, `enters` stands beside attention; r and p of both."""

    x: Tensor
    values: Tensor
    value_gate: Tensor
    attention: tuple[Tensor, Tensor]
    enters: Tensor
    bigram: Tensor
    mlp: tuple[Tensor, Tensor]


def _dense_last(model: Pieces, x: Tensor, start: Tensor, h7: Tensor) -> _LastBlock:
    """2026-04-22: two channels of eight."""
    k = _dense(model, 0, x)
    return _LastBlock(
        values=1.15 * (k[0] * start + k[1] * h7 + k[2] * x),
        x=(1 + k[10]) * x + k[8] * start + k[9] * h7,
        value_gate=_halves(k[3] + 2, k[11] + 2, model.config.num_heads),
        attention=(k[4], k[5]),
        enters=k[6] * start,
        bigram=k[7],
        mlp=(k[12], k[13]),
    )


def _last(model: Pieces, x: Tensor, start: Tensor, h7: Tensor) -> _LastBlock:
    """From 2026-05-27 on: fourteen numbers."""
    k = coefficients(model, "mudd", 0, x, 14)
    return _LastBlock(
        values=k[0] * start + k[1] * h7 + k[2] * x,
        x=(1 + k[5]) * x + k[3] * start + k[4] * h7,
        value_gate=_halves(k[6], k[7], model.config.num_heads),
        attention=(k[8], k[9]),
        enters=k[10] * start,
        bigram=k[11],
        mlp=(k[12], k[13]),
    )


def _halves(first: Tensor, second: Tensor, heads: int) -> Tensor:
    """Two gates [B, T, 1], one for each half of the heads [B, T, H]."""
    return torch.cat([first, second], -1).repeat_interleave(heads // 2, -1)


def _dense(model: Pieces, place: int, x: Tensor) -> list[Tensor]:
    """2026-04-22: (gelu(x w1ᵀ) w2 + bs) 0.2/√3: 16 coefficients [B, T, 1], those of channel 0 first."""
    w1, w2, bias = (model.weight(f"dense_{each}")[place] for each in ("w1", "w2", "bs"))
    found = (F.gelu(F.linear(x, w1)) @ w2.flatten(1) + bias.flatten()) * (0.2 / 3**0.5)
    return list(found.split(1, -1))


def coefficients(model: Pieces, kind: str, place: int, x: Tensor, count: int) -> list[Tensor]:
    """(gelu(x w1ᵀ) w2ᵀ + b2) · scale: the first `count` coefficients [B, T, 1] of `mudd` or `mudd_gate`."""
    w1, w2, bias = (model.weight(f"{kind}_{each}")[place] for each in ("w1", "w2", "b2"))
    scale = model.weight("_mudd_gate_scale") if kind == "mudd_gate" else 0.1
    found = (F.linear(F.gelu(F.linear(x, w1)), w2[:count]) + bias[:count]) * scale
    return list(found.split(1, -1))
