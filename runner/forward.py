"""Hidden states and logits of a Llama, plain or NPT, from any layer on and in chunks of positions."""

import copy
from dataclasses import dataclass

import torch
from torch import nn
from transformers import LlamaForCausalLM

from runner.measures.fidelity import Comparison, compare
from runner.models.npt_llama import run_layers

# Entries of one chunk of logits: 16 MiB in float32, and a few times that in float64 while they are compared.
CHUNK_ENTRIES = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Trace:
    """One sequence [T] through a model: `inputs[i]` is the input of layer i [1, T, d], `final` that of the head."""

    inputs: dict[int, torch.Tensor]
    final: torch.Tensor


@torch.inference_mode()
def trace(model: LlamaForCausalLM, token_ids: torch.Tensor, keep: frozenset[int] | None = None) -> Trace:
    """Run `model` on `token_ids` [T] and keep the inputs of the layers in `keep` (of all layers for None)."""
    record: list[torch.Tensor] = []
    embedded = model.model.embed_tokens(token_ids.to(model.device).unsqueeze(0))
    final = run_layers(model, embedded, record=record)
    return Trace(inputs={i: h for i, h in enumerate(record) if keep is None or i in keep}, final=final)


@torch.inference_mode()
def continue_from(model: LlamaForCausalLM, start: Trace, layer: int) -> torch.Tensor:
    """The input of the head [1, T, d] when `model` takes over at `layer`."""
    return run_layers(model, start.inputs[layer], start=layer)


@torch.inference_mode()
def logits(model: LlamaForCausalLM, final: torch.Tensor) -> torch.Tensor:
    """All logits [T, V] of one sequence: for short ones."""
    return model.lm_head(final[0])


@torch.inference_mode()
def compare_finals(
    reference_head: nn.Linear,
    reference_final: torch.Tensor,
    subject_head: nn.Linear,
    subject_final: torch.Tensor,
    token_ids: torch.Tensor,
) -> Comparison:
    """Compare the logits that two heads give to two inputs [1, T, d], chunk by chunk of positions."""
    size = max(1, CHUNK_ENTRIES // reference_head.out_features)
    pairs = zip(reference_final[0].split(size), subject_final[0].split(size), strict=True)
    return compare(((reference_head(a), subject_head(b)) for a, b in pairs), token_ids)


@torch.inference_mode()
def first_non_finite(model: LlamaForCausalLM, token_ids: torch.Tensor) -> tuple[str, int] | None:
    """Where a value first stops being finite: ("layer i" or "head", position), None where all are finite.

    "layer i" is the layer that made it.
    """
    seen = trace(model, token_ids)
    states = [*(seen.inputs[i] for i in sorted(seen.inputs)), seen.final]
    for index, state in enumerate(states):
        bad = ~torch.isfinite(state[0]).all(-1)
        if bad.any():
            return ("embedding" if index == 0 else f"layer {index - 1}", int(bad.nonzero()[0, 0]))
    bad = ~torch.isfinite(logits(model, seen.final)).all(-1)
    return ("head", int(bad.nonzero()[0, 0])) if bad.any() else None


@torch.inference_mode()
def in_other_precision(model: LlamaForCausalLM, token_ids: torch.Tensor) -> tuple[nn.Linear, torch.Tensor]:
    """The head and its input [1, T, d] when a float32 model runs in bfloat16, or another one in float32."""
    other = torch.bfloat16 if model.dtype == torch.float32 else torch.float32
    embedded = model.model.embed_tokens(token_ids.to(model.device).unsqueeze(0))
    return copy.deepcopy(model.lm_head).to(other), run_layers(model, embedded, dtype=other)
