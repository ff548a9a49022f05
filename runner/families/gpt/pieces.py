"""The pieces that the records' scripts are made of, over the tensors of one checkpoint: README.md has the formulas.

Parameters are named as in the checkpoint. Weights are held in the compute dtype; λs and other coefficients stay in
float32 and promote nothing. Shapes: x and u [B, T, d], heads [B, T, H, size].
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runner.errors import ModelError
from runner.families.gpt.attention import (
    Pass,
    Rotation,
    Window,
    causal_attention,
    frequencies,
    pair,
    rotate,
    rotation,
    yarn,
)
from runner.families.gpt.records import Record, layers_with_values, skip_connections, undefined_depth

# Coefficients, and tensors that nothing trains.
COEFFICIENT = re.compile(r"lambdas?\b|\blamb\b|scalars|skip_weights|w_post|_scale|inv_freq|\brecord\b")
BUFFER = re.compile(r"inv_freq|\brecord\b|sign_table|_mlp_down_")
EPSILON = {"2024-10-10_Muon": 1e-6}
DC_WINDOW = 112  # positions that dynamic composition reads, the own one included

CAPS: Mapping[str, tuple[Callable[[Tensor, int], Tensor], tuple[float, float]]] = {
    "": (lambda z, d: z, (float("-inf"), float("inf"))),
    "T30": (lambda z, d: 30 * torch.tanh(z / 30), (-30.0, 30.0)),
    "T15": (lambda z, d: 15 * torch.tanh(z / 15), (-15.0, 15.0)),
    "S30": (lambda z, d: 30 * torch.sigmoid(z / 7.5), (0.0, 30.0)),
    "S30d": (lambda z, d: 30 * torch.sigmoid(z / (7.5 * d**0.5)), (0.0, 30.0)),
    "S23": (lambda z, d: 23 * torch.sigmoid((z + 5) / 7.5), (0.0, 23.0)),
    "R15": (lambda z, d: 15 * z * torch.rsqrt(z.square() + 225), (-15.0, 15.0)),
}


@dataclass(frozen=True, kw_only=True)
class GptConfig:
    """Sizes and state: `vocab_size` rows of each embedding, `head_rows` logits, heads of `head_dim`.

    `yarn`: the windows (blocks of 128) that training went through so far; `before_split`: the head's rows are the
    embedding. `end_of_text`: the token at which a document starts, where documents see themselves alone. `window`: how
    many positions long blocks, short ones and the last one see, as the record counts them. Raises ModelError for sizes
    whose arithmetic is not defined.
    """

    record: Record
    vocab_size: int
    head_rows: int
    num_layers: int
    model_dim: int
    head_dim: int = 128
    yarn: tuple[int, ...] = ()
    before_split: bool = False
    end_of_text: int | None = None
    window: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        if text := undefined_depth(self.record, self.num_layers):
            raise ModelError(text)
        if self.model_dim % self.head_dim:
            raise ModelError(f"a GPT's width is a multiple of the head size {self.head_dim}, not {self.model_dim}")

    @property
    def num_heads(self) -> int:
        """Heads of attention."""
        return self.model_dim // self.head_dim


def norm(x: Tensor, eps: float | None = None) -> Tensor:
    """RMS norm over the last dimension, without weights; eps is float32's machine epsilon."""
    return F.rms_norm(x, (x.shape[-1],), eps=eps)


class Pieces(nn.Module):
    """A checkpoint's tensors by name, and what the programs of `model.py` and `lanes.py` do with them."""

    def __init__(self, config: GptConfig, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.config = config
        self.record = config.record
        self._places: dict[str, tuple[nn.Module, str]] = {}
        self._changes: dict[str, list[Callable[[Tensor], Tensor]]] = {}
        for name, tensor in tensors.items():
            *path, leaf = name.split(".")
            module: nn.Module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module._modules[part]  # type: ignore[assignment]
            if BUFFER.search(name):
                module.register_buffer(leaf, tensor)
            else:
                module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
            self._places[name] = (module, leaf)
        record, depth, start = self.record, config.num_layers, 0
        self._scalars: dict[str, slice] = {}
        for what, count in record.scalars:
            size = depth * int(count.removesuffix("L") or 1) if count.endswith("L") else int(count)
            self._scalars[what] = slice(start, start + size)
            start += size
        self.attention_layers = [i for i in range(depth) if i not in record.no_attention]
        self.value_layers = layers_with_values(record, depth)
        self.skips = skip_connections(record, depth)
        turns, scale = frequencies(config.head_dim, record.rotary), config.head_dim**-0.5
        if record.yarn:
            turns, scale = yarn(turns, config.yarn)
        self.turns, self.scale = turns, record.scale if isinstance(record.scale, float) else scale
        self.eps = EPSILON.get(record.name)

    # Tensors.

    def weight(self, name: str) -> Tensor:
        """The tensor `name` of the checkpoint."""
        module, leaf = self._places[name]
        found: Tensor = getattr(module, leaf)
        for change in self._changes.get(name, ()):
            found = change(found)
        return found

    def change_weight(self, name: str, change: Callable[[Tensor], Tensor]) -> None:
        """Compute with `change(tensor)` in the place of the tensor `name`, after what changes it already."""
        self._changes.setdefault(name, []).append(change)

    def has(self, name: str) -> bool:
        """Whether the checkpoint has a tensor `name`."""
        return name in self._places

    def scalar(self, what: str) -> Tensor:
        """The part `what` of `scalars` [n]."""
        return self.weight("scalars")[self._scalars[what]]

    @property
    def block_prefix(self) -> str:
        """What the names of blocks begin with."""
        return self._prefix

    @cached_property
    def _prefix(self) -> str:
        return "transformer.h" if self.has("transformer.wte.weight") else "blocks"

    def of_block(self, i: int, name: str) -> Tensor:
        """The tensor `name` of block i."""
        return self.weight(f"{self._prefix}.{i}.{name}")

    def norm(self, x: Tensor) -> Tensor:
        """RMS norm with the record's epsilon."""
        return norm(x, self.eps)

    # Embeddings.

    def embedded(self, ids: Tensor, this: Pass) -> Tensor:
        """x0 [B, T, d], the first residual state: e_t + λ σ(g · e_t[:n]) e_{t-1} where the record smears, normed."""
        record = self.record
        x = F.embedding(ids, self.weight("lm_head.weight" if self.config.before_split else record.table))
        if record.smear:
            gate = torch.sigmoid(self._gate("smear_gate.weight", x))
            x = x + self.scalar("smear")[0] * gate * this.previous("smear", x, torch.zeros_like(x))
        return self.norm(x) if record.embedding_norm else x

    def value_embeddings(self, ids: Tensor) -> dict[int, Tensor]:
        """Block → its value embedding [B, T, d]."""
        if not self.value_layers:
            return {}
        count = 1 + max(self.value_layers.values())
        if self.has("transformer.vte.weight"):
            tables = F.embedding(ids, self.weight("transformer.vte.weight")).chunk(count, -1)
        elif self.has("value_embeds"):
            rows = self.weight("value_embeds").unflatten(0, (count, -1))
            tables = tuple(F.embedding(ids, table) for table in rows)
        else:
            at = "value_embeds.embed" if self.has("value_embeds.embed.0.weight") else "value_embeds"
            tables = tuple(F.embedding(ids, self.weight(f"{at}.{i}.weight")) for i in range(count))
        return {i: tables[table] for i, table in self.value_layers.items()}

    def bigrams(self, ids: Tensor, this: Pass) -> Tensor:
        """The bigram embedding [B, T, m]: row (36313 x_t xor 27191 x_{t-1}) mod (R-1), R-1 for a row's first token.

        With signs: times row (x_{t-1} xor x_t) mod rows of the sign table, row 0 for the first token.
        """
        table = self.weight("bigram_embed.weight")
        last, first = len(table) - 1, torch.full_like(ids, -1)
        before = this.previous("ids", ids, first)
        rows = torch.where(before < 0, last, (36313 * ids ^ 27191 * before) % last)
        found = F.embedding(rows, table)
        if self.record.bigram == "plain":
            return found
        signs = self.weight("bigram_sign_table")
        return found * F.embedding(torch.where(before < 0, 0, (before ^ ids) % len(signs)), signs)

    # The residual stream.

    def gated_skip(self, x0: Tensor, name: str, weight: Tensor) -> Tensor:
        """K: σ(λ) 2σ(g · x0[:n]) [B, T, 1]."""
        return torch.sigmoid(weight) * 2 * torch.sigmoid(self._gate(name, x0))

    def _gate(self, name: str, x: Tensor) -> Tensor:
        gate = self.weight(name)
        return F.linear(x[..., : gate.shape[-1]], gate)

    def mlp(self, i: int, x: Tensor) -> Tensor:
        """relu(x W1)² W2 (the first record: GELU) of the normed x."""
        x = self.norm(x)
        if self.has("mlp_bank"):
            first, second = self.weight("mlp_bank")[i].unbind(0)
            return F.linear(x, first).relu().square() @ second
        names = ("mlp.fc_w", "mlp.proj_w") if self.has(f"{self._prefix}.{i}.mlp.fc_w") else ("mlp.c_fc", "mlp.c_proj")
        if not self.has(f"{self._prefix}.{i}.{names[0]}"):
            names = ("mlp.c_fc.weight", "mlp.c_proj.weight")
        first, second = (self.of_block(i, name) for name in names)
        wide = F.linear(x, first) if first.shape[1] == x.shape[-1] else x @ first
        wide = F.gelu(wide) if self.record.activation == "gelu" else wide.relu().square()
        return F.linear(wide, second) if second.shape[0] == x.shape[-1] else wide @ second

    # Attention.

    def rotations(self, this: Pass) -> dict[bool, Rotation]:
        """The angles of plain and of paired layers."""
        turns = self.turns
        name = f"{self._prefix}.0.attn.rotary.inv_freq"
        if self.has(name):
            turns = self.weight(name)  # as stored: it may have been rounded
        kinds = {False, *([True] if self.record.paired else [])}
        return {paired: rotation(this.positions, turns, paired=paired) for paired in kinds}

    def window(self, i: int) -> Window | None:
        """How far back block i sees."""
        chosen, record = self.config.window, self.record
        if chosen is None:
            return None
        is_long = record.long is None or (i % record.pattern if record.pattern else i) in record.long
        size = chosen[0] if is_long else chosen[1]
        if record.last_window and i == self.config.num_layers - 1:
            size = chosen[2]
        if record.window == "flash":
            return Window(size=128 * size, blocks=False)
        return Window(size=size, blocks=True) if record.window == "blocks" else Window(size=size - 1, blocks=False)

    def attention(
        self,
        i: int,
        u: Tensor,
        this: Pass,
        angles: Mapping[bool, Rotation],
        value: Tensor | None = None,
        *,
        value_gate: Tensor | None = None,
        added: Tensor | None = None,
        alpha: Tensor | None = None,
        head_gate: Tensor | None = None,
        composition: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attention of block i over its input u, with the output matrix.

        `value`: the value embedding. What MUDD computes for each token comes in [B, T, H]: `value_gate`, `head_gate`,
        `composition`, `alpha` (also [H]), or [B, T, d]: `added` to v.
        """
        record, config, paired = self.record, self.config, i in self.record.paired
        weights = self.value_weights(i)
        q, k, v = (each.unflatten(-1, (config.num_heads, -1)) for each in self._projected(i, u, weights))
        v = norm(v) if record.value_norm else v
        if value is not None:
            value = value.unflatten(-1, (config.num_heads, -1))
        v = self._mixed_values(i, u, v, value, this, weights, value_gate)
        if added is not None:
            v = v + added.unflatten(-1, (config.num_heads, -1))
        if record.query_key_norm:
            q, k = self.norm(q), self.norm(k)
        q, k = (self._rotated(x, angles[paired], paired) for x in (q, k))
        window = self.window(i)
        if record.offset and not paired and record.long is not None and i in record.long:
            k = self._offset(i, k, this)
        values = pair(v) if paired else v
        queries, keys = (pair(x) if paired else x for x in (q, k))
        known_k, known_v, start = this.remember(i, keys.transpose(1, 2), values.transpose(1, 2), window, paired=paired)
        mask = this.mask(window, start, paired=paired)
        y = causal_attention(queries.transpose(1, 2), known_k, known_v, self.scale, mask).transpose(1, 2)
        if composition is not None:
            y = y + self._composed(queries, known_k, known_v, this, start, composition)
        y = y.reshape(v.shape)
        if alpha is not None:
            y = without_own_value(y, v, alpha)
        gate = self._head_gate(i, u) if head_gate is None else head_gate
        if gate is not None:
            y = y * gate.unsqueeze(-1)
        return self._output(i, y.flatten(2), weights)

    def value_weights(self, i: int) -> Tensor | None:
        """λ0, λ1 of block i's values [2]."""
        if "values" in self._scalars:
            return self.scalar("values")[2 * i : 2 * i + 2]
        return self.of_block(i, "attn.lambdas") if self.record.value_mix == "M2" else None

    def _attention_matrix(self, i: int) -> tuple[Tensor, Tensor] | None:
        """q, k, v [3d, d] and output [d, d] where block i has them in one tensor."""
        if self.has("attn_bank"):
            bank = self.weight("attn_bank")[self.attention_layers.index(i)]
        elif self.has(f"{self._prefix}.{i}.attn.qkvo_w"):
            bank = self.of_block(i, "attn.qkvo_w")
            bank = bank.view(4, len(bank), len(bank)) if bank.dim() == 2 and bank.shape[0] < bank.shape[1] else bank
            bank = bank.flatten(0, 1) if bank.dim() == 3 else bank
        else:
            return None
        width = bank.shape[1]
        return bank[: 3 * width], bank[3 * width :]

    def _projected(self, i: int, u: Tensor, weights: Tensor | None) -> tuple[Tensor, ...]:
        """q, k, v [B, T, d] each."""
        width = u.shape[-1]
        if (whole := self._attention_matrix(i)) is not None:
            qkv = F.linear(u, whole[0])
        elif self.has(f"{self._prefix}.{i}.attn.qkv_w"):
            qkv = F.linear(u, self.of_block(i, "attn.qkv_w").flatten(0, 1))
        elif self.has("qk_bank"):
            layer, layers = self.attention_layers.index(i), len(self.attention_layers)
            rows = self.weight("qk_bank").flatten(0, 1)[: layers * 2 * width].view(layers, 2 * width, width)[layer]
            qkv = torch.cat([F.linear(u, rows), F.linear(u, self.weight("vo_bank")[2 * layer])], -1)
        elif self.has(f"{self._prefix}.{i}.attn.c_attn.weight"):
            qkv = F.linear(u, self.of_block(i, "attn.c_attn.weight"))
        else:
            return tuple(F.linear(u, self.of_block(i, f"attn.c_{each}.weight")) for each in "qkv")
        if self.record.value_mix in ("M4", "M5") and weights is not None:
            qkv = qkv * weights[0]
        return qkv.split(width, -1)

    def _output(self, i: int, y: Tensor, weights: Tensor | None) -> Tensor:
        if (whole := self._attention_matrix(i)) is not None:
            y = F.linear(y, whole[1])
        elif self.has("vo_bank"):
            y = F.linear(y, self.weight("vo_bank")[2 * self.attention_layers.index(i) + 1])
        else:
            y = F.linear(y, self.of_block(i, "attn.c_proj.weight"))
        return y * weights[1] if self.record.value_mix in ("M4", "M5") and weights is not None else y

    def _mixed_values(
        self,
        i: int,
        u: Tensor,
        v: Tensor,
        value: Tensor | None,
        this: Pass,
        weights: Tensor | None,
        gate: Tensor | None,
    ) -> Tensor:
        """v with the value embedding, or with the first block's v."""
        mix = self.record.value_mix
        if mix in ("half", "lamb"):
            if value is None:
                value = this.first_values = v if i == 0 else this.first_values
            assert value is not None
            share = 0.5 if mix == "half" else self.of_block(i, "attn.lamb")
            return (1 - share) * v + share * value
        if mix == "M2":
            assert weights is not None
            return weights[0] * v if value is None else weights[0] * v + weights[1] * value
        if value is None:
            return v
        if mix == "M5":
            gate = self._value_gate(i, u, value) if gate is None else gate
            return v + gate.unsqueeze(-1) * value
        return v + value

    def _value_gate(self, i: int, u: Tensor, value: Tensor) -> Tensor:
        """2σ(G · what the gate reads) [B, T, H]."""
        if self.has("ve_gate_bank"):
            gate = self.weight("ve_gate_bank")[sorted(self.value_layers).index(i)]
        else:
            gate = self.of_block(i, "attn.value_embed_gate.weight")
        size, kind = gate.shape[-1], self.record.value_gate
        read = u[..., :size]
        if kind == "6+6" or (kind == "6+6 unpaired" and i not in self.record.paired):
            read = torch.cat([u[..., : size // 2], value.flatten(-2)[..., : size // 2]], -1)
        return 2 * torch.sigmoid(F.linear(read, gate))

    def _head_gate(self, i: int, u: Tensor) -> Tensor | None:
        """σ(G · the first numbers of u) [B, T, H]."""
        kind = self.record.gate
        if not kind or (kind == "bank" and not self.has("attn_gate_bank")):
            return None
        if kind == "bank":
            gate = self.weight("attn_gate_bank")[self.attention_layers.index(i)]
        else:
            gate = self.of_block(i, f"attn.{kind}.weight")
        return torch.sigmoid(F.linear(u[..., : gate.shape[-1]], gate))

    def _rotated(self, x: Tensor, angles: Rotation, paired: bool) -> Tensor:
        neighbours = self.record.rotary == "I"
        if not paired:
            return rotate(x, angles, neighbours=neighbours)
        return rotate(x.unflatten(2, (-1, 2)), angles, neighbours=neighbours).flatten(2, 3)

    def _offset(self, i: int, k: Tensor, this: Pass) -> Tensor:
        """O: some dimensions of k come from the token before; a row's first token keeps its own."""
        quarter = k.shape[-1] // 4
        parts = list(k.split(quarter, -1))
        others = this.previous(f"keys {i}", k, k).split(quarter, -1)
        for chosen in (1, 3) if self.record.offset == "O1" else (2, 3):
            parts[chosen] = others[chosen]
        return torch.cat(parts, -1)

    def _composed(
        self, q: Tensor, k: Tensor, v: Tensor, this: Pass, start: int, weights: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Dynamic composition [B, T, H, size]: w2_ih Σ_j A_ij v_jh, A_ij = Σ_h N(w1)_ih softmax_j(s q_ih · k_jh).

        j runs over the last 112 positions of the same document. q [B, T, H, size], k and v [B, H, N, size].
        """
        window = Window(size=DC_WINDOW - 1, blocks=False)
        mask = this.always(window, start)
        shares, heads = norm(weights[0].float(), 1e-6).to(q.dtype), weights[1]
        parts = []
        for first in range(0, q.shape[1], DC_WINDOW):
            last = min(first + DC_WINDOW, q.shape[1])
            low = max(0, k.shape[2] - q.shape[1] + first - DC_WINDOW)
            high = k.shape[2] - q.shape[1] + last
            scores = q[:, first:last].transpose(1, 2).float() @ k[:, :, low:high].float().mT * self.scale
            scores = scores.masked_fill(~mask(first, last)[..., low:high], float("-inf")).softmax(-1).to(v.dtype)
            joined = torch.einsum("bth,bhtj->btj", shares[:, first:last], scores)
            parts.append(torch.einsum("btj,bhjd->bthd", joined, v[:, :, low:high]))
        return heads.unsqueeze(-1) * torch.cat(parts, 1)


def without_own_value(y: Tensor, v: Tensor, alpha: Tensor) -> Tensor:
    """XSA: y - tanh(α)(y · v̂) v̂, v̂ = v / max(‖v‖, 1e-4); α [H] or [B, T, H]."""
    own = v / v.norm(dim=-1, keepdim=True).clamp_min(1e-4)
    return y - torch.tanh(alpha).unsqueeze(-1) * (y * own).sum(-1, keepdim=True) * own
