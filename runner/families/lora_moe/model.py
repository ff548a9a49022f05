"""A causal language model with LoRA adapters, and one whose router mixes them token by token.

features = hidden states of the last layer (after the final norm), all experts on and unweighted
router logits = gate(features)
every LoRA layer: y = W x + Σ_e w_e · scaling_e · B_e A_e x, with w for each token
evaluation: the top k of the router's logits, softmax over those, 0 for the others
training: w = softmax(logits / temperature), and a balance loss, the MSE between the mean w and 1/E
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from runner.checkpoints.checkpoint import Checkpoint
from runner.errors import ConfigError
from runner.evaluation.attention import KeyValueCache
from runner.evaluation.base_models import Base
from runner.evaluation.decoding import CachedModel, PassCache, cached
from runner.evaluation.llama import Llama
from runner.families.lora.checkpoint import check_fit, read_factors
from runner.families.lora_moe.checkpoint import check_base, read_experts, read_router


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


ROUTER_FEATURES = ("all_experts", "base", "expert_0")
# One adapter by module: A [r, in], B [out, r], and the scaling of B A x.
Adapter = Mapping[str, tuple[torch.Tensor, torch.Tensor, float]]


@dataclass(frozen=True, kw_only=True)
class MoeCache:
    """What both passes remember: the experts change it, and each pass has its own experts, or none (`experts_on`)."""

    features: PassCache
    routed: Any
    experts_on: bool


@dataclass(frozen=True, kw_only=True)
class LoraOutput:
    """`logits` [B, T, V]. With a router: `router_logits` and `expert_weights` [B, T, E]; `balance_loss` in training."""

    logits: torch.Tensor
    router_logits: torch.Tensor | None = None
    expert_weights: torch.Tensor | None = None
    balance_loss: torch.Tensor | None = None


class LoraForCausalLM(nn.Module):
    """A causal language model with LoRA adapters, all on and unweighted.

    It shares every weight with `base`, which stays usable by itself. `adapters` in the order of their names
    expert_0, expert_1, …; `dropout` is that of the adapters in training.
    """

    def __init__(self, base: nn.Module, adapters: Sequence[Adapter], *, dropout: float = 0.0) -> None:
        super().__init__()
        from runner.families.lora.model import add_adapters  # imports peft

        self.lm = _sharing_copy(base)
        self.names = tuple(f"expert_{i}" for i in range(len(adapters)))
        self.dropout = dropout
        self.routing = add_adapters(self.lm, dict(zip(self.names, adapters, strict=True)), dropout)
        self.experts_on = True
        self.train(base.training)

    @property
    def config(self) -> Any:
        """The base's config."""
        return self.lm.config

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.lm.device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.lm.dtype

    @property
    def head(self) -> nn.Module:
        """What makes logits of `hidden`."""
        return self.lm.lm_head if isinstance(self.lm, Llama) else nn.Identity()

    @contextmanager
    def experts(self, on: bool) -> Iterator[None]:
        """Within the block the experts are on or off; off is the base, bit for bit."""
        before = self.experts_on
        self.experts_on = on
        try:
            yield
        finally:
            self.experts_on = before

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        position_ids: torch.Tensor | None = None,
    ) -> LoraOutput:
        """`input_ids`, `attention_mask`, `position_ids` [B, T] → logits [B, T, V], and what a router that is on did."""
        arguments = _unseen(attention_mask, position_ids)
        routed = self._route(input_ids, arguments)
        logits = self.lm(input_ids, **arguments).logits
        if routed is None:
            return LoraOutput(logits=logits)
        router_logits, weights = routed
        return LoraOutput(
            logits=logits,
            router_logits=router_logits,
            expert_weights=weights,
            balance_loss=balance_loss(weights, attention_mask) if self.training else None,
        )

    def new_cache(self, padding: torch.Tensor, length: int) -> Any:
        """As `CachedModel.new_cache`: that of the language model."""
        return self._cached.new_cache(padding, length)

    def advance(self, token_ids: torch.Tensor, cache: Any) -> torch.Tensor:
        """As `CachedModel.advance`."""
        self._route(token_ids, {})
        return self._cached.advance(token_ids, cache)

    @cached_property
    def _cached(self) -> CachedModel:
        return cached(self.lm)

    def hidden(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """The input of `head`: [B, T, d], or the logits [B, T, V] of an architecture that does more than that."""
        self._route(input_ids, _unseen(attention_mask, None))
        if isinstance(self.lm, Llama):
            return self.lm.model(input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        return self.lm(input_ids, attention_mask=attention_mask, use_cache=False).logits

    def final_states(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The last hidden state [B, T, d], after the final norm, of ids padded on the right; of the routed pass."""
        self._route(input_ids, _unseen(None, None))
        return self.lm.base_model(input_ids, use_cache=False).last_hidden_state

    def adapters(self) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor, float]], ...]:
        """The adapters as they are now, in the form in which they were given."""
        from runner.families.lora.model import RoutedLinear

        layers = [(name, layer) for name, layer in self.lm.named_modules() if isinstance(layer, RoutedLinear)]
        return tuple(
            {name: layer.factors(adapter) for name, layer in layers if adapter in layer.lora_A}
            for adapter in self.names
        )

    def _route(self, input_ids: torch.Tensor, arguments: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Set what the LoRA layers apply; router logits and weights [B, T, E] where a router decides.

        `arguments`: what the language model takes beside the ids. The setting stays after the pass, so that gradient
        checkpointing, which runs layers again, finds it.
        """
        self.routing.active = tuple((name, None) for name in self.names) if self.experts_on else ()
        return None


class LoraMoeForCausalLM(LoraForCausalLM):
    """LoRA experts and a router that weights them token by token, in two passes.

    `router`: weight [E, d] and bias [E]. The first pass, which makes the router's features, has all experts on, none
    (`base`), or the first (`expert_0`), and no gradient: the router and the experts learn through the second.
    """

    passes = 2

    def __init__(
        self,
        base: nn.Module,
        adapters: Sequence[Adapter],
        router: tuple[torch.Tensor, torch.Tensor],
        *,
        top_k: int = 1,
        temperature: float = 2.0,
        router_features: str = "all_experts",
        dropout: float = 0.0,
    ) -> None:
        if not 1 <= top_k <= len(adapters):
            raise ConfigError(f"top_k={top_k}: with {len(adapters)} experts it is a number from 1 to {len(adapters)}")
        if router_features not in ROUTER_FEATURES:
            raise ConfigError(f"router_features={router_features} is unknown; choose {', '.join(ROUTER_FEATURES)}")
        super().__init__(base, adapters, dropout=dropout)
        with torch.device("meta"):
            self.router = nn.Linear(router[0].shape[1], router[0].shape[0])
        self.router.weight = nn.Parameter(router[0], requires_grad=False)
        self.router.bias = nn.Parameter(router[1], requires_grad=False)
        self.top_k, self.temperature, self.router_features = top_k, temperature, router_features

    def new_cache(self, padding: torch.Tensor, length: int) -> MoeCache:
        """As `CachedModel.new_cache`, for both passes."""
        return MoeCache(
            features=PassCache(_empty_cache(self.lm, length), padding, self.config),
            routed=self._cached.new_cache(padding, length),
            experts_on=self.experts_on,
        )

    def advance(self, token_ids: torch.Tensor, cache: MoeCache) -> torch.Tensor:
        """As `CachedModel.advance`; the router sees each token once.

        Raises ValueError for a cache that was made with the experts on where they are off now, or the other way round.
        """
        if cache.experts_on != self.experts_on:
            raise ValueError("the cache must be one that this model made with the experts as now")
        self._route(token_ids, cache.features.arguments(token_ids.shape[1]) if self.experts_on else {})
        return self._cached.advance(token_ids, cache.routed)

    def _route(self, input_ids: torch.Tensor, arguments: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The first pass, which decides what the LoRA layers apply in the second."""
        if not self.experts_on:
            self.routing.active = ()
            return None
        first = {"all_experts": self.names, "base": (), "expert_0": self.names[:1]}[self.router_features]
        self.routing.active = tuple((name, None) for name in first)
        with torch.no_grad():
            features = self.lm.base_model(input_ids, **arguments).last_hidden_state
        logits = self.router(features)
        if self.training:
            weights = dense_weights(logits, self.temperature)
            used = [True] * len(self.names)
        else:
            weights = top_k_weights(logits, self.top_k)
            used = weights.flatten(0, -2).any(0).tolist()  # an expert without a token adds nothing
        parts = zip(self.names, weights.split(1, dim=-1), used, strict=True)
        self.routing.active = tuple((name, weight) for name, weight, is_used in parts if is_used)
        return logits, weights


def _unseen(attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None) -> dict[str, Any]:
    """What a language model takes beside ids of which nothing is to be remembered."""
    return {"attention_mask": attention_mask, "position_ids": position_ids, "use_cache": False}


def _empty_cache(lm: Any, length: int) -> Any:
    if isinstance(lm, Llama):
        return KeyValueCache(length=length)
    from transformers import DynamicCache

    return DynamicCache(config=lm.config)


def _sharing_copy(base: Any) -> Any:
    """Modules of its own over the base's tensors: layers are replaced in the copy only."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    shared |= {id(each): each for each in (base.config, getattr(base, "generation_config", None)) if each is not None}
    model = copy.deepcopy(base, shared)
    for module in model.modules():
        module._forward_hooks.clear()
        vars(module).pop("_output_capturing_hooks_installed", None)
    return model


def build_moe(checkpoint: Checkpoint, base: Base, **options: Any) -> LoraMoeForCausalLM:
    """The experts and the router of `checkpoint` over `base`, in evaluation mode.

    `options`: those of `LoraMoeForCausalLM`, in the place of the checkpoint's own. Raises ModelError where the two do
    not fit, CheckpointError for missing or unknown keys and for NaN or Inf.
    """
    from runner.families.lora.model import linear_shapes

    model, details = base.model, checkpoint.details
    check_base(checkpoint, linear_shapes(model), model.config.hidden_size, base.path)
    own = {"top_k": details.top_k, "temperature": details.temperature}
    experts = read_experts(checkpoint, dtype=model.dtype, device=model.device)
    router = read_router(checkpoint, dtype=model.dtype, device=model.device)
    return LoraMoeForCausalLM(model, experts, router, **{**own, **options}).eval().requires_grad_(False)


def build_adapter(checkpoint: Checkpoint, base: Base) -> LoraForCausalLM:
    """The one adapter of a peft checkpoint over `base`, in evaluation mode. Raises as `build_moe`."""
    from runner.families.lora.model import linear_shapes

    checkpoint.require_complete()
    model, details = base.model, checkpoint.details
    check_fit(details, linear_shapes(model), base.path)
    factors = read_factors(details, dtype=model.dtype, device=model.device)
    return LoraForCausalLM(model, [factors]).eval().requires_grad_(False)
