"""A checkpoint's model beside its base and its reference: every measure that needs a forward pass."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from runner.forward import (
    compare_finals,
    continue_from,
    first_non_finite,
    in_other_precision,
    logits,
    trace,
)
from runner.measures import generation, layers
from runner.measures.fidelity import Comparison
from runner.models.npt_llama import NptLlamaForCausalLM
from runner.reference import Reference


@dataclass(frozen=True, kw_only=True)
class Subject:
    """`model` runs on `base`; `reference` is what it is compared with, by default the base itself.

    `shared_below`: the first layer where subject and reference differ (0 when they do not share the base).
    """

    model: NptLlamaForCausalLM
    base: Reference
    reference: Reference
    shared_below: int

    def compare(self, token_ids: torch.Tensor) -> Comparison:
        """Logits of the subject against the reference's on one sequence [T]."""
        known = self.reference.trace(token_ids, [self.shared_below])
        final = continue_from(self.model, known, self.shared_below) if self.shared_below else self._final(token_ids)
        return compare_finals(self.reference.model.lm_head, known.final, self.model.lm_head, final, token_ids)

    def compare_to_floor(self, token_ids: torch.Tensor) -> Comparison:
        """The reference in the other of float32 and bfloat16 against itself: what no subject can beat."""
        known = self.reference.trace(token_ids, [])
        head, final = in_other_precision(self.reference.model, token_ids)
        return compare_finals(self.reference.model.lm_head, known.final, head, final, token_ids)

    def control(self, token_ids: torch.Tensor) -> Comparison:
        """All layers standard, through the model's own forward pass, against the base: must be equal."""
        known = self.base.trace(token_ids, [])
        with self.model.npt_mode(set()), torch.inference_mode():
            output = self.model.model(token_ids.to(self.model.device).unsqueeze(0), use_cache=False)
        return compare_finals(
            self.base.model.lm_head, known.final, self.model.lm_head, output.last_hidden_state, token_ids
        )

    def layer_run(self, token_ids: torch.Tensor) -> tuple[torch.Tensor, layers.Run]:
        """The base's logits [T, V] and a function from active NPT layers to the subject's, for the per-layer tests.

        Layers below the first active one give the base's hidden states, so a run starts there.
        """
        known = self.base.trace(token_ids, self.model.npt_layers)

        def run(active: frozenset[int]) -> torch.Tensor:
            with self.model.npt_mode(set(active)):
                return logits(self.model, continue_from(self.model, known, min(active)))

        return logits(self.base.model, known.final), run

    def continuation(
        self, token_ids: torch.Tensor, count: int, *, temperature: float, seed: int, decode: Callable[[list[int]], str]
    ) -> dict[str, Any]:
        """Continuations of one prompt [T] by subject and reference from the same seed, and how far they agree."""
        settings: dict[str, Any] = {"temperature": temperature, "seed": seed}
        tokens = generation.generate(self.model, token_ids.to(self.model.device), count, **settings)
        theirs = self.reference.continuation(token_ids, count, **settings)
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
            elif place := first_non_finite(self.reference.model, token_ids):
                findings.append(f"{name}: the reference itself is not finite from {place[0]} on")
        return findings

    def _final(self, token_ids: torch.Tensor) -> torch.Tensor:
        return trace(self.model, token_ids, frozenset()).final
