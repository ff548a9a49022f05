"""What NPT layers are trained on: their frozen base, computed with the model's own attention, rotation and mask.

Two losses. *Direct*: for the hidden states h that the base gives to a layer, a = attention of that layer, the NPT
layer's modulated MLP is to give a + MLP(post_attention_layernorm(h + a)), the base layer's output minus h; the mean
squared error is relative to the target's mean square, so that layers count alike. *Logits*: the mean squared
difference of the whole model's logits, all NPT layers active, from the base's.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.masking_utils import create_causal_mask

from runner.families.npt.model import NptDecoderLayer, NptLlamaForCausalLM

# How much of what the base computes is kept in memory instead of being computed again in every epoch.
KEPT_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True)
class LayerReference:
    """What one NPT layer is given by the base, and what it is to give, each [B, T, d]."""

    attention: torch.Tensor
    normed: torch.Tensor  # post_attention_layernorm(h)
    target: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The base on one batch. `hidden` [B, T, d]: the input of the lowest NPT layer; `final`: the input of the head;
    `arguments`: what every layer is called with."""

    hidden: torch.Tensor
    layers: Mapping[int, LayerReference]
    final: torch.Tensor
    arguments: Mapping[str, Any]

    @property
    def nbytes(self) -> int:
        """What keeping it costs, in bytes."""
        own = (tensor for layer in self.layers.values() for tensor in (layer.attention, layer.normed, layer.target))
        return sum(tensor.nbytes for tensor in (self.hidden, self.final, *own))


@torch.no_grad()
def reference(model: NptLlamaForCausalLM, ids: torch.Tensor) -> Reference:
    """What the base of `model` computes on token ids [B, T] without padding."""
    llama = model.model
    first = min(model.npt_layers)
    hidden = lowest = llama.embed_tokens(ids)
    arguments = _layer_arguments(model, hidden)
    layers = {}
    for i, layer in enumerate(llama.layers):
        if i == first:
            lowest = hidden
        if isinstance(layer, NptDecoderLayer):
            attention, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden), **arguments)
            target = attention + layer.mlp(layer.post_attention_layernorm(hidden + attention))
            normed = layer.post_attention_layernorm(hidden)
            layers[i] = LayerReference(attention=attention, normed=normed, target=target)
            hidden = hidden + target
        else:
            hidden = layer(hidden, **arguments)
    return Reference(hidden=lowest, layers=layers, final=llama.norm(hidden), arguments=arguments)


def losses(model: NptLlamaForCausalLM, base: Reference) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
    """The direct loss by NPT layer, and the loss of the logits: scalars with gradients."""
    direct = {}
    hidden = base.hidden
    first = min(base.layers)
    for i, layer in enumerate(model.model.layers):
        if i in base.layers:
            own = base.layers[i]
            output = layer.modulated_mlp(own.attention, own.normed)
            direct[i] = (output - own.target).square().mean() / own.target.square().mean()
            # The lowest NPT layer has the base's input in the whole model too.
            hidden = hidden + output if i == first else layer(hidden, **base.arguments)
        elif i > first:
            hidden = layer(hidden, **base.arguments)
    # The head is linear: the difference of the logits is the head of the difference.
    difference = model.lm_head(model.model.norm(hidden) - base.final)
    return direct, difference.square().mean()


def kept_references(model: NptLlamaForCausalLM, batches: Sequence[torch.Tensor]) -> Callable[[int], Reference]:
    """The base on the batch of an index. It never changes, so as many as fit are kept for the epochs to come."""
    kept: dict[int, Reference] = {}
    room = KEPT_BYTES

    def get(index: int) -> Reference:
        nonlocal room
        if index in kept:
            return kept[index]
        computed = reference(model, batches[index].to(model.device))
        if computed.nbytes <= room:
            kept[index] = computed
            room -= computed.nbytes
        return computed

    return get


def _layer_arguments(model: NptLlamaForCausalLM, hidden_states: torch.Tensor) -> dict[str, Any]:
    """What `LlamaModel.forward` hands to each layer, for unpadded `hidden_states` [B, T, d]."""
    positions = torch.arange(hidden_states.shape[1], device=hidden_states.device).unsqueeze(0)
    mask = create_causal_mask(
        config=model.config,
        inputs_embeds=hidden_states,
        attention_mask=None,
        past_key_values=None,
        position_ids=positions,
    )
    return {
        "attention_mask": mask,
        "position_embeddings": model.model.rotary_emb(hidden_states, position_ids=positions),
        "position_ids": positions,
        "past_key_values": None,
        "use_cache": False,
    }
