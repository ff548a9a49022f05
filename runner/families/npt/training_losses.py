"""What NPT layers are trained by: two passes over the same tokens, and how far the second is from the first.

The *teacher* is the base, all layers standard: at an NPT layer i it has t_i, the layer's input, a_i, its attention, and
m_i, its MLP at post_attention_layernorm(t_i + a_i). The *student* runs with its NPT layers, of whose inputs a share is
its own stream h and the rest the teacher's t_i, as the stage says (curriculum.py):

    a = SelfAttention(input_layernorm((1−ρ) t_i + ρ h)),   x = post_attention_layernorm((1−ρ') t_i + ρ' h)
    o_i = modulated MLP at x, fed by a
    h ← h + o_i
    direct_i = MSE(o_i, a_i + m_i),   logits = MSE(z, z_T),   R_i = Σ over projections of mean(v_a²) + mean(v_b²)

Without a curriculum direct_i is taken on t_i, and the logits in a pass whose layers run on the student's stream alone.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional

from runner.evaluation.forward import layer_arguments
from runner.families.npt.model import NptDecoderLayer, NptLlamaForCausalLM, RankKUpdate
from runner.training.precision import exact
from runner.training.sources import TokenBatch

# How much of what the base computes is kept in memory instead of being computed again in every epoch.
CACHE_BYTES = 256 << 20
Ratios = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class LayerOutputs:
    """What one NPT layer is given by the base, and what it is to give, each [B, T, d]; `hidden`: its input, where the
    student's is mixed with it."""

    attention: torch.Tensor
    normed: torch.Tensor  # post_attention_layernorm(h)
    target: torch.Tensor
    gate: torch.Tensor  # gate_proj and up_proj of `normed` [B, T, f]: they never change, either
    up: torch.Tensor
    size: torch.Tensor  # the mean square of `target`
    hidden: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class BaseOutputs:
    """The base on one batch. `hidden` [B, T, d]: the input of the lowest NPT layer; `final`: the input of the head;
    `arguments`: what every layer is called with."""

    hidden: torch.Tensor
    layers: Mapping[int, LayerOutputs]
    final: torch.Tensor
    arguments: Mapping[str, object]

    @property
    def nbytes(self) -> int:
        """What keeping it costs, in bytes."""
        own = [each for x in self.layers.values() for each in (x.attention, x.normed, x.target, x.gate, x.up, x.hidden)]
        return sum(tensor.nbytes for tensor in (self.hidden, self.final, *own) if tensor is not None)


@dataclass(frozen=True, kw_only=True)
class Found:
    """The losses of one batch, scalars with gradients, by layer where there is one a layer; and figures without."""

    direct: dict[int, torch.Tensor]
    logits: torch.Tensor
    regularization: dict[int, torch.Tensor] = field(default_factory=dict)
    figures: dict[str, torch.Tensor] = field(default_factory=dict)


@torch.no_grad()
def base_outputs(model: NptLlamaForCausalLM, ids: torch.Tensor, *, inputs: bool = False) -> BaseOutputs:
    """What the base of `model` computes on token ids [B, T] without padding; `inputs`: of each NPT layer as well."""
    llama = model.model
    first = min(model.npt_layers)
    hidden = lowest = llama.embed_tokens(ids)
    arguments = layer_arguments(model, hidden)
    layers = {}
    for i, layer in enumerate(llama.layers):
        if i == first:
            lowest = hidden
        if isinstance(layer, NptDecoderLayer):
            attention = layer.self_attn(layer.input_layernorm(hidden), **arguments)
            target = attention + layer.mlp(layer.post_attention_layernorm(hidden + attention))
            normed = layer.post_attention_layernorm(hidden)
            layers[i] = LayerOutputs(
                attention=attention,
                normed=normed,
                target=target,
                gate=layer.mlp.gate_proj(normed),
                up=layer.mlp.up_proj(normed),
                size=target.float().square().mean(),
                hidden=hidden if inputs else None,
            )
            hidden = hidden + target
        else:
            hidden = layer(hidden, **arguments)
    return BaseOutputs(hidden=lowest, layers=layers, final=llama.norm(hidden), arguments=arguments)


class LogitLoss:
    """The mean squared difference of logits, from the head's inputs: δᵀ(WᵀW)δ / V, so that no logits are computed.

    The head W [V, d] is linear and never changes: WᵀW [d, d] is computed once, in float32.
    """

    def __init__(self, head: torch.nn.Module) -> None:
        weight = head.weight
        assert isinstance(weight, torch.Tensor)
        assert getattr(head, "bias", None) is None, "a Llama's head has none"
        self._vocabulary = weight.shape[0]
        self._gram = sum((part.float().T @ part.float() for part in weight.detach().split(16384)), torch.zeros(()))

    def __call__(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Of the head's inputs [B, T, d]."""
        with exact(one):
            difference = one.float() - other.float()
            total = ((difference @ self._gram.to(one.device)) * difference).sum()
        return total / (difference.shape[:-1].numel() * self._vocabulary)


def losses(
    model: NptLlamaForCausalLM,
    base: BaseOutputs,
    of_logits: LogitLoss | None = None,
    *,
    ratios: Ratios | None = None,
    trained: Collection[int] | None = None,
    relative: bool = True,
    regularized: bool = False,
    figures: bool = False,
) -> Found:
    """The losses on what `base` holds.

    `ratios`: the student's share of the inputs of attention and MLP; None: the stage without a curriculum. `trained`:
    the layers that are; other NPT layers run as they are. `relative`: direct losses over their targets' mean squares.
    `regularized`, `figures`: compute R_i, and the norms of v_a and v_b.
    """
    found = Found(direct={}, logits=torch.zeros(()))
    hidden, first = base.hidden, min(base.layers)
    for i, layer in enumerate(model.model.layers):
        if i < first:
            continue
        own = base.layers.get(i)
        if own is None or (trained is not None and i not in trained):
            hidden = layer(hidden, **base.arguments)
            continue
        assert isinstance(layer, NptDecoderLayer)
        # The lowest NPT layer has the base's input in every pass.
        if ratios is None:
            s, output, after = _by_itself(layer, own, hidden, base.arguments, alone=i == first)
        else:
            share = (0.0, 0.0) if i == first else ratios
            attention, x = _stage_inputs(layer, own, hidden, base.arguments, share)
            known = (own.gate, own.up) if x is own.normed else None
            output, s = modulated_mlp(layer, Joined.of(layer), attention, x, known)
            after = hidden + output
        with exact(output):
            direct = functional.mse_loss(output.float(), own.target.float())
            found.direct[i] = direct / own.size if relative else direct
            if regularized or figures:
                _add_gates(found, i, layer, s, own, regularized=regularized, figures=figures)
        hidden = after
    final = model.model.norm(hidden)
    logits = (of_logits or LogitLoss(model.lm_head))(final, base.final)
    return Found(direct=found.direct, logits=logits, regularization=found.regularization, figures=found.figures)


def _by_itself(
    layer: NptDecoderLayer, own: LayerOutputs, hidden: torch.Tensor, arguments: Mapping[str, object], *, alone: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The layer on the base's inputs, and on the student's stream: attention W_down and the output there, the stream
    after."""
    joined = Joined.of(layer)
    output, s = modulated_mlp(layer, joined, own.attention, own.normed, (own.gate, own.up))
    if alone:
        return s, output, hidden + output
    attention = layer.self_attn(layer.input_layernorm(hidden), **arguments)
    streamed, _ = modulated_mlp(layer, joined, attention, layer.post_attention_layernorm(hidden))
    return s, output, hidden + streamed


@dataclass(frozen=True)
class Joined:
    """The matrices of a layer's updates side by side, so that a pass is fewer products: W_down [d, n·k·r] of all n of
    them, W_a_up [n'·k·r, d] of gate and up."""

    w_down: torch.Tensor
    w_a_up: torch.Tensor

    @classmethod
    def of(cls, layer: NptDecoderLayer) -> "Joined":
        """Of the updates of `layer`, in their order."""
        updates = _updates(layer)
        w_down = torch.cat([update.w_down for update in updates.values()], dim=1)
        return cls(w_down, torch.cat([update.w_a_up for name, update in updates.items() if name != "down"]))


def _updates(layer: NptDecoderLayer) -> dict[str, RankKUpdate]:
    return {name: update for name, update in layer.updates.items() if isinstance(update, RankKUpdate)}


def modulated_mlp(
    layer: NptDecoderLayer,
    joined: Joined,
    attention: torch.Tensor,
    x: torch.Tensor,
    projected: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`layer.modulated_mlp(attention, x)` [B, T, d], and `attention` W_down [B·T, n·k·r].

    `projected`: gate_proj and up_proj of `x`, where they are known.
    """
    updates = _updates(layer)
    k, r = updates["gate"].num_ranks, updates["gate"].np_rank
    shape = x.shape
    attention, x = attention.flatten(0, -2), x.flatten(0, -2)  # products of two matrices are the fastest
    gate, up = (
        (layer.mlp.gate_proj(x), layer.mlp.up_proj(x))
        if projected is None
        else (each.flatten(0, -2) for each in projected)
    )
    s = attention @ joined.w_down
    of_x, of_product = s.tensor_split([joined.w_a_up.shape[0]], -1)
    of_gate, of_up = _terms(of_x, x @ joined.w_a_up.T, r).tensor_split([k * r], -1)
    gate = torch.addmm(gate, of_gate, updates["gate"].w_b_up)
    if "up" in updates:
        up = torch.addmm(up, of_up, updates["up"].w_b_up)
    product = layer.mlp.act_fn(gate) * up
    output = layer.mlp.down_proj(product)
    if "down" in updates:
        down = updates["down"]
        output = torch.addmm(output, _terms(of_product, product @ down.w_a_up.T, r), down.w_b_up)
    return output.view(shape), s


def _terms(s: torch.Tensor, products: torch.Tensor, rank: int) -> torch.Tensor:
    """s_i (s_i · p_i) for each of the terms that lie side by side, each `rank` wide."""
    each = s.unflatten(-1, (-1, rank))
    dots = (each * products.unflatten(-1, (-1, rank))).sum(-1, keepdim=True)
    return (dots * each).flatten(-2)


def _stage_inputs(
    layer: NptDecoderLayer, own: LayerOutputs, hidden: torch.Tensor, arguments: Mapping[str, object], ratios: Ratios
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and MLP input [B, T, d] of the student, `ratios` of their inputs being its own stream."""

    def mixed(ratio: float) -> torch.Tensor:
        if ratio == 1:
            return hidden
        assert own.hidden is not None, "kept for a curriculum that mixes"
        return torch.lerp(own.hidden, hidden, ratio)

    of_attention, of_mlp = ratios
    attention, x = own.attention, own.normed
    if of_attention:
        attention = layer.self_attn(layer.input_layernorm(mixed(of_attention)), **arguments)
    if of_mlp:
        x = layer.post_attention_layernorm(mixed(of_mlp))
    return attention, x


def _add_gates(
    found: Found,
    index: int,
    layer: NptDecoderLayer,
    s: torch.Tensor,
    own: LayerOutputs,
    *,
    regularized: bool,
    figures: bool,
) -> None:
    """R_i, the norms of the first projection's v_a and v_b, and how alike v_a and the base's attention are (for one
    term), added to what was `found`; `s` [B·T, n·k·r]: the student's attention W_down of all projections."""
    total: torch.Tensor | None = None
    updates = _updates(layer)
    for (name, update), part in zip(updates.items(), s.float().chunk(len(updates), -1), strict=True):
        if not regularized and name != "gate":
            continue
        v_a, v_b = squared_sums(update, part)
        count = part.shape[:-1].numel() * update.num_ranks
        mean = v_a / (count * update.w_a_up.shape[1]) + v_b / (count * update.w_b_up.shape[1])
        total = mean if total is None else total + mean
        if figures and name == "gate":
            found.figures[f"v_a_norm/layer_{index}"] = v_a.detach().sqrt()
            found.figures[f"v_b_norm/layer_{index}"] = v_b.detach().sqrt()
            if update.num_ranks == 1:
                with torch.no_grad():
                    states = own.attention.float().flatten(0, -2)
                    cosines = functional.cosine_similarity(part @ update.w_a_up, states, dim=-1)
                found.figures[f"v_a_attention_similarity/layer_{index}"] = cosines.mean()
    if regularized and total is not None:
        found.regularization[index] = total


def squared_sums(update: RankKUpdate, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The sums of the squares of v_a and of v_b over all tokens and rank-1 terms, for s = attention W_down [N, k·r].

    v_i = s_i W_i, so Σ v_i² = ⟨W_i W_iᵀ, Σ s_iᵀ s_i⟩ over the tokens: the v, which are wide, are never computed.
    """
    terms, rank = update.num_ranks, update.np_rank
    each = s.unflatten(1, (terms, rank))
    of_tokens = torch.einsum("tkr,tkq->krq", each, each)

    def total(weight: torch.Tensor) -> torch.Tensor:
        matrices = weight.unflatten(0, (terms, rank))
        return (matrices @ matrices.mT * of_tokens).sum()

    return total(update.w_a_up), total(update.w_b_up)


def cached_base_outputs(
    model: NptLlamaForCausalLM, batches: Sequence[torch.Tensor] = (), *, inputs: bool = False
) -> Callable[[TokenBatch | int], BaseOutputs]:
    """The base on a batch, or on that of an index. It never changes, so of batches that come again as many as fit stay
    in memory for the epochs to come."""
    cached: dict[int, BaseOutputs] = {}
    room = CACHE_BYTES

    def get(batch: TokenBatch | int) -> BaseOutputs:
        nonlocal room
        if isinstance(batch, int):
            batch = TokenBatch(ids=batches[batch], number=batch)
        if batch.number in cached:
            return cached[batch.number]
        computed = base_outputs(model, batch.ids.to(model.device), **({"inputs": True} if inputs else {}))
        if batch.number is not None and computed.nbytes <= room:
            cached[batch.number] = computed
            room -= computed.nbytes
        return computed

    return get
