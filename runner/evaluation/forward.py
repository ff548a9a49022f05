"""Hidden states and logits of any model here: of a Llama from any layer on, of all in chunks of positions."""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from runner.evaluation.llama import Llama, Rotation
from runner.metrics.fidelity import LogitComparison, compare

# Entries of one chunk of logits: 16 MiB in float32, and a few times that in float64 while they are compared.
CHUNK_ENTRIES = 1 << 22
Head = Callable[[torch.Tensor], torch.Tensor]
LogitChunks = Iterable[torch.Tensor]


def run_layers(
    model: Llama,
    hidden_states: torch.Tensor,
    start: int = 0,
    record: list[torch.Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The layers from `start` on and the final norm, as `LlamaModel.forward` runs them on unpadded sequences.

    `hidden_states` [B, T, d] is the input of layer `start` (the embeddings for 0); → [B, T, d], the input of the
    head. `record` receives the input of each layer that runs. Starting at a later layer gives the same bits as
    running from the embeddings. `dtype` casts the weights for this pass, one layer at a time.
    """

    def cast(module: nn.Module) -> nn.Module:
        return module if dtype in (None, model.dtype) else copy.deepcopy(module).to(dtype)

    llama = model.model
    hidden_states = hidden_states.to(dtype or hidden_states.dtype)
    arguments = layer_arguments(model, hidden_states)
    for layer in llama.layers[start:]:
        if record is not None:
            record.append(hidden_states)
        hidden_states = cast(layer)(hidden_states, **arguments)
    return cast(llama.norm)(hidden_states)


def layer_arguments(model: Llama, hidden_states: torch.Tensor) -> dict[str, Rotation]:
    """What `LlamaModel.forward` hands to each layer, for unpadded `hidden_states` [B, T, d]."""
    positions = torch.arange(hidden_states.shape[1], device=hidden_states.device)[None]
    return {"rotation": model.model.rotary_emb(hidden_states, positions)}


@dataclass(frozen=True, kw_only=True)
class Trace:
    """One sequence [T] through a model: `inputs[i]` is the input of layer i [1, T, d], `final` that of the head."""

    inputs: dict[int, torch.Tensor]
    final: torch.Tensor


@torch.inference_mode()
def trace(model: nn.Module, token_ids: torch.Tensor, keep: frozenset[int] | None = None) -> Trace:
    """Run `model` on `token_ids` [T] and keep the inputs of the layers in `keep` (of all layers for None).

    A model that is no Llama gives no layer inputs; one without a head of its own (`head`) gives its logits as `final`.
    """
    ids = token_ids.to(device_of(model)).unsqueeze(0)
    if isinstance(model, Llama):
        record: list[torch.Tensor] = []
        final = run_layers(model, model.model.embed_tokens(ids), record=record)
        return Trace(inputs={i: h for i, h in enumerate(record) if keep is None or i in keep}, final=final)
    hidden = getattr(model, "hidden", None)
    return Trace(inputs={}, final=hidden(ids) if callable(hidden) else model(ids).logits)


def final_states(model: nn.Module, token_ids: torch.Tensor) -> torch.Tensor:
    """The last hidden state [B, T, d], after the model's final norm, of ids [B, T] whose padding is on the right.

    With gradients where the caller has them on. Attention is causal: no real token sees what is padded.
    """
    own: Any = getattr(model, "final_states", None)
    if callable(own):
        states: torch.Tensor = own(token_ids)
        return states
    inner: Any = getattr(model, "base_model", None)
    if inner is not None:
        return inner(input_ids=token_ids, use_cache=False).last_hidden_state
    found: Any = model
    return found.hidden(token_ids)


@torch.inference_mode()
def continue_from(model: Llama, start: Trace, layer: int) -> torch.Tensor:
    """The input of the head [1, T, d] when `model` takes over at `layer`."""
    return run_layers(model, start.inputs[layer], start=layer)


def head_of(model: nn.Module) -> Head:
    """What turns a trace's `final` into logits."""
    if isinstance(model, Llama):
        return model.lm_head
    head = getattr(model, "head", None)
    return head if callable(head) else nn.Identity()


def logit_count(model: nn.Module) -> int:
    """How many logits the model gives for a position."""
    config: Any = model.config
    return getattr(config, "head_rows", config.vocab_size)


def limits(model: nn.Module) -> tuple[int, int | None]:
    """How many tokens the embedding knows, and how many positions the model has (None: any number)."""
    config: Any = model.config
    return config.vocab_size, getattr(config, "max_position_embeddings", None)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter lies."""
    return next(model.parameters()).device


@torch.inference_mode()
def logits(model: nn.Module, final: torch.Tensor) -> torch.Tensor:
    """All logits [T, V] of one sequence: for short ones."""
    found: torch.Tensor = head_of(model)(final[0])
    return found


@torch.inference_mode()
def compare_finals(
    reference: LogitChunks, head: Head, final: torch.Tensor, token_ids: torch.Tensor, vocab_size: int
) -> LogitComparison:
    """Compare a reference's logits, in chunks of positions, with those that a head gives to its input [1, T, d]."""
    parts = final[0].split(chunk_size(vocab_size))
    return compare(((theirs, head(ours)) for theirs, ours in zip(reference, parts, strict=True)), token_ids)


@torch.inference_mode()
def logit_chunks(model: nn.Module, final: torch.Tensor) -> Iterator[torch.Tensor]:
    """The logits [t, V] of `final` [1, T, d], a chunk of positions at a time."""
    head = head_of(model)
    for part in final[0].split(chunk_size(logit_count(model))):
        yield head(part)


def chunk_size(vocab_size: int) -> int:
    """How many positions make one chunk of logits."""
    return max(1, CHUNK_ENTRIES // vocab_size)


@torch.inference_mode()
def first_non_finite(model: nn.Module, token_ids: torch.Tensor) -> tuple[str, int] | None:
    """Where a value first stops being finite: ("layer i", "embedding" or "head", position), None where all are finite.

    "layer i" is the layer that made it; a model whose layers are not seen answers "logits".
    """
    seen = trace(model, token_ids)
    states = [(i, seen.inputs[i]) for i in sorted(seen.inputs)]
    states += [(len(states), seen.final)] if states else []
    for index, state in states:
        bad = ~torch.isfinite(state[0]).all(-1)
        if bad.any():
            return ("embedding" if index == 0 else f"layer {index - 1}", int(bad.nonzero()[0, 0]))
    bad = ~torch.isfinite(logits(model, seen.final)).all(-1)
    return ("head" if states else "logits", int(bad.nonzero()[0, 0])) if bad.any() else None


@torch.inference_mode()
def in_other_precision(model: Llama, token_ids: torch.Tensor) -> tuple[Head, torch.Tensor]:
    """The head and its input [1, T, d] when a float32 model runs in bfloat16, or another one in float32."""
    other = torch.bfloat16 if model.dtype == torch.float32 else torch.float32
    embedded = model.model.embed_tokens(token_ids.to(model.device).unsqueeze(0))
    return copy.deepcopy(model.lm_head).to(other), run_layers(model, embedded, dtype=other)
