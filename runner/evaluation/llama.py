"""A Llama: what transformers' `LlamaForCausalLM` computes, bit for bit in float32 on a CPU, and with its names.

h = embed(ids)
h = h + o_proj(softmax(rotate(q) · rotate(k) / √head_dim, causal) v)    in each layer; q, k, v of RMSNorm(h)
h = h + down_proj(act(gate_proj(x)) * up_proj(x)),  x = RMSNorm(h)
logits = lm_head(RMSNorm(h))
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional

from runner.evaluation.attention import KeyValueCache, Rotary, Rotation, attend, causal_mask, rotate
from runner.evaluation.llama_config import LlamaConfig


class Linear(nn.Linear):
    """A product whose weights are given, never drawn; without memory until then."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__(inputs, outputs, bias, device="meta")

    def reset_parameters(self) -> None:
        """Nothing."""


class RmsNorm(nn.Module):
    """x / √(mean(x²) + eps) in float32, times the weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, device="meta"))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., d] → [..., d]."""
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class LlamaAttention(nn.Module):
    """Self-attention of one layer; `layer_idx` is its place in a cache."""

    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx, self.head_dim, self.dropout = layer_idx, config.head_dim, config.attention_dropout
        d, bias = config.hidden_size, config.attention_bias
        inner, grouped = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj, self.o_proj = Linear(d, inner, bias), Linear(inner, d, bias)
        self.k_proj, self.v_proj = Linear(d, grouped, bias), Linear(d, grouped, bias)

    def forward(
        self, x: torch.Tensor, rotation: Rotation, mask: torch.Tensor | None = None, cache: Any = None
    ) -> torch.Tensor:
        """`x` [B, T, d] → [B, T, d]."""
        shape = (*x.shape[:2], -1, self.head_dim)
        queries, keys, values = (
            each(x).view(shape).transpose(1, 2) for each in (self.q_proj, self.k_proj, self.v_proj)
        )
        queries, keys = rotate(queries, *rotation), rotate(keys, *rotation)
        if cache is not None:
            keys, values = cache.update(keys, values, self.layer_idx)
        return self.o_proj(attend(queries, keys, values, mask, self.dropout if self.training else 0.0))


class LlamaMlp(nn.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        d, f, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj, self.up_proj, self.down_proj = Linear(d, f, bias), Linear(d, f, bias), Linear(f, d, bias)
        self.act_fn: Callable[[torch.Tensor], torch.Tensor] = functional.silu
        if config.hidden_act != "silu":
            from transformers.activations import ACT2FN

            self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., d] → [..., d]."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class LlamaLayer(nn.Module):
    """Attention and MLP, each added to what it is given."""

    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn, self.mlp = LlamaAttention(config, layer_idx), LlamaMlp(config)
        self.input_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, hidden: torch.Tensor, rotation: Rotation, mask: torch.Tensor | None = None, cache: Any = None
    ) -> torch.Tensor:
        """`hidden` [B, T, d] → [B, T, d]."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), rotation, mask, cache)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


@dataclass(frozen=True, kw_only=True)
class LlamaHidden:
    """`last_hidden_state` [B, T, d]: the input of the head; `hidden_states`: that of each layer too, if asked for."""

    last_hidden_state: torch.Tensor
    past_key_values: Any = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class LlamaOutput(LlamaHidden):
    """`logits` [B, T, V], and what they are made of."""

    logits: torch.Tensor


class LlamaModel(nn.Module):
    """Everything but the head."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        count, d = config.vocab_size, config.hidden_size
        self.embed_tokens = nn.Embedding(count, d, _weight=torch.empty(count, d, device="meta"))
        self.layers = nn.ModuleList(LlamaLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = Rotary(config)
        self.gradient_checkpointing = False

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        output_hidden_states: bool = False,
    ) -> LlamaHidden:
        """`input_ids` [B, t]; `attention_mask` [B, T] covers the cached positions too, and is 0 at padding."""
        cache = KeyValueCache() if use_cache and past_key_values is None else past_key_values
        start = 0 if cache is None else cache.get_seq_length()
        if position_ids is None:
            position_ids = torch.arange(start, start + input_ids.shape[1], device=input_ids.device)[None]
        hidden = self.embed_tokens(input_ids)
        mask = causal_mask(start, input_ids, attention_mask)
        rotation = self.rotary_emb(hidden, position_ids)
        states = [hidden]
        for layer in self.layers:
            hidden = self._run(layer)(hidden, rotation, mask, cache)
            if output_hidden_states:
                states.append(hidden)
        hidden = self.norm(hidden)
        found = (*states[:-1], hidden) if output_hidden_states else None
        return LlamaHidden(last_hidden_state=hidden, past_key_values=cache, hidden_states=found)

    def _run(self, layer: nn.Module) -> Callable[..., torch.Tensor]:
        if not (self.gradient_checkpointing and self.training):
            return layer
        from torch.utils.checkpoint import checkpoint

        return partial(checkpoint, layer, use_reentrant=False)


class Llama(nn.Module):
    """A causal language model of a config, without weights until `assign`."""

    _no_split_modules: ClassVar[tuple[str, ...]] = ("LlamaLayer",)

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = LlamaModel(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)

    def assign(self, tensors: Mapping[str, torch.Tensor]) -> "Llama":
        """Take `tensors`, all of them by name, as the weights; a tied head needs none. Returns itself."""
        tied = {"lm_head.weight": tensors["model.embed_tokens.weight"]} if self.config.tie_word_embeddings else {}
        self.load_state_dict({**tensors, **tied}, strict=True, assign=True)
        if tied:
            self.lm_head.weight = self.model.embed_tokens.weight
        return self

    @property
    def base_model(self) -> LlamaModel:
        """`model`, as transformers calls it in every architecture."""
        return self.model

    @property
    def device(self) -> torch.device:
        """Where the embeddings lie."""
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.model.embed_tokens.weight.dtype

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        output_hidden_states: bool = False,
    ) -> LlamaOutput:
        """As `LlamaModel.forward`, with the logits of all positions."""
        found = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        return LlamaOutput(logits=self.lm_head(found.last_hidden_state), **vars(found))

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None) -> None:
        """In training keep only what each layer is given, and run it again for its gradients; there are no options."""
        self.model.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep everything again."""
        self.model.gradient_checkpointing = False

    def new_cache(self, padding: torch.Tensor, length: int) -> KeyValueCache:
        """Room for `length` positions of rows of which `padding` [B] positions on the left are padding."""
        return KeyValueCache(padding, length)

    @torch.inference_mode()
    def advance(self, token_ids: torch.Tensor, cache: KeyValueCache) -> torch.Tensor:
        """Feed `token_ids` [B, t] → float32 logits [B, V] of the last position; padding counts from its end."""
        seen, positions = None, None
        if cache.padding is not None:
            start = cache.get_seq_length()
            every = torch.arange(start + token_ids.shape[1], device=token_ids.device) - cache.padding[:, None]
            seen, positions = every >= 0, every[:, start:].clamp_min(0)
        final = self.model(token_ids, seen, positions, cache).last_hidden_state
        return self.lm_head(final[:, -1]).float()
