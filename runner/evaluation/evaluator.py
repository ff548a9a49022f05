"""A checkpoint's model beside what it is compared with: every measure that needs a forward pass."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import LlamaForCausalLM

from runner.evaluation.forward import (
    CHUNK_ENTRIES,
    compare_finals,
    continue_from,
    device_of,
    first_non_finite,
    has_cache,
    head_of,
    in_other_precision,
    logits,
    trace,
)
from runner.evaluation.reference import Reference
from runner.families.npt.model import NptLlamaForCausalLM
from runner.metrics import generation, layers
from runner.metrics.fidelity import Comparison


@dataclass(frozen=True, kw_only=True)
class Subject:
    """`model` is compared with `reference` (None: with nothing), over `vocab_size` logits.

    `plain`: an NPT model with all of its layers standard: its base for npt_delta, its own Llama for npt_full; None
    for models without NPT layers. `shared_below`: the layers below give the reference's hidden states (0: none do).
    """

    model: nn.Module
    reference: Reference | None
    plain: Reference | None
    shared_below: int
    vocab_size: int

    @property
    def npt(self) -> NptLlamaForCausalLM:
        """The model, where it has NPT layers."""
        assert isinstance(self.model, NptLlamaForCausalLM)
        return self.model

    @property
    def _reference(self) -> Reference:
        assert self.reference is not None
        return self.reference

    def compare(self, token_ids: torch.Tensor) -> Comparison:
        """Logits of the subject against the reference's on one sequence [T]."""
        known = self._reference.trace(token_ids, [self.shared_below])
        if self.shared_below:
            final = continue_from(self.npt, known, self.shared_below)
        else:
            final = trace(self.model, token_ids, frozenset()).final
        return self._compare(self._reference, self.model, final, token_ids)

    @torch.inference_mode()
    def next_logprobs(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Log-probabilities [T - 1] that the subject gives to the true next tokens of one sequence [T]."""
        final, head = trace(self.model, token_ids, frozenset()).final[0], head_of(self.model)
        size = max(1, CHUNK_ENTRIES // self.vocab_size)
        parts = []
        for start in range(0, len(token_ids) - 1, size):
            known = token_ids[start + 1 : start + 1 + size].to(final.device)
            logprobs = head(final[start : start + len(known)]).double().log_softmax(-1)
            parts.append(logprobs.gather(-1, known.unsqueeze(-1)).squeeze(-1).cpu())
        return torch.cat(parts)

    def has_floor(self) -> bool:
        """Whether the reference can be run in another precision here."""
        return self.reference is not None and isinstance(self.reference.model, LlamaForCausalLM)

    def compare_to_floor(self, token_ids: torch.Tensor) -> Comparison:
        """The reference in the other of float32 and bfloat16 against itself: what no subject can beat."""
        model = self._reference.model
        assert isinstance(model, LlamaForCausalLM)
        head, final = in_other_precision(model, token_ids)
        return compare_finals(self._reference.logit_chunks(token_ids), head, final, token_ids, self.vocab_size)

    def control(self, token_ids: torch.Tensor) -> Comparison:
        """All layers standard, through the model's own forward pass, against the plain model: must be equal."""
        assert self.plain is not None
        with self.npt.npt_mode(set()), torch.inference_mode():
            output = self.npt.model(token_ids.to(self.npt.device).unsqueeze(0), use_cache=False)
        return self._compare(self.plain, self.model, output.last_hidden_state, token_ids)

    def plain_against_reference(self, token_ids: torch.Tensor) -> Comparison:
        """The plain model against the reference: differs where a checkpoint brings base weights of its own."""
        assert self.plain is not None
        final = self.plain.trace(token_ids, []).final
        return self._compare(self._reference, self.plain.model, final, token_ids)

    def layer_run(self, token_ids: torch.Tensor) -> tuple[torch.Tensor, layers.Run]:
        """The reference's logits [T, V] and a function from active NPT layers to the subject's, for per-layer tests.

        Layers below the first active one give the plain model's hidden states, so a run starts there.
        """
        assert self.plain is not None
        known = self.plain.trace(token_ids, self.npt.npt_layers)

        def run(active: frozenset[int]) -> torch.Tensor:
            with self.npt.npt_mode(set(active)):
                return logits(self.model, continue_from(self.npt, known, min(active)))

        return logits(self._reference.model, self._reference.trace(token_ids, []).final), run

    def continuation(
        self, token_ids: torch.Tensor, count: int, *, temperature: float, seed: int, decode: Callable[[list[int]], str]
    ) -> dict[str, Any]:
        """Continuations of one prompt [T] by subject and reference from the same seed, and how far they agree."""
        settings: dict[str, Any] = {"temperature": temperature, "seed": seed}
        prompt = token_ids.to(device_of(self.model))
        tokens = generation.generate(self.model, prompt, count, cache=has_cache(self.model), **settings)
        theirs = self._reference.continuation(token_ids, count, **settings)
        return {
            **settings,
            "tokens": tokens,
            "reference_tokens": theirs,
            "text": decode(tokens),
            "reference_text": decode(theirs),
            **generation.agreement(tokens, theirs),
            "repetition": generation.repetition(tokens),
            "reference_repetition": generation.repetition(theirs),
        }

    def non_finite_findings(self, names: Sequence[str], sequences: Sequence[torch.Tensor]) -> list[str]:
        """One finding for each named sequence in which the subject's values stop being finite."""
        findings = []
        for name, token_ids in zip(names, sequences, strict=True):
            place = first_non_finite(self.model, token_ids)
            if place:
                findings.append(f"{name}: values are not finite from {place[0]} on, first at position {place[1]}")
            elif self.reference and (place := first_non_finite(self.reference.model, token_ids)):
                findings.append(f"{name}: the reference itself is not finite from {place[0]} on")
        return findings

    def _compare(
        self, reference: Reference, model: nn.Module, final: torch.Tensor, token_ids: torch.Tensor
    ) -> Comparison:
        return compare_finals(reference.logit_chunks(token_ids), head_of(model), final, token_ids, self.vocab_size)
