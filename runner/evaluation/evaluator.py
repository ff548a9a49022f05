"""A checkpoint's model beside what it is compared with: every measure that needs a forward pass."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import nn

from runner.evaluation.forward import (
    CHUNK_ENTRIES,
    compare_finals,
    continue_from,
    device_of,
    first_non_finite,
    head_of,
    in_other_precision,
    limits,
    logit_count,
    logits,
    trace,
)
from runner.evaluation.llama import Llama
from runner.evaluation.reference import Reference
from runner.evaluation.tokenizers import TextTokenizer, encode, seeded_ids
from runner.metrics.fidelity import LogitComparison

if TYPE_CHECKING:
    from runner.metrics import layers

# Tokens that stand for a prompt where there is no tokenizer.
SEEDED_LENGTH = 64


@runtime_checkable
class SwitchableLayers(Protocol):
    """A model some of whose layers can be switched to what they are in its base."""

    @property
    def npt_layers(self) -> Mapping[int, nn.Module]:
        """Those layers by depth, lowest first."""

    def npt_mode(self, active: set[int]) -> AbstractContextManager[None]:
        """Within the block exactly the layers in `active` are on."""

    def plain(self) -> nn.Module:
        """A model over the same tensors with all of them off."""


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """`model` beside `reference`, which it is compared with (None: with nothing).

    `plain`: a model with switchable layers, all of them off: its base, or its own Llama; None for other models.
    `tokenizer`: None where seeded token ids stand for a text. The models stay in memory as long as this does.
    """

    model: nn.Module
    reference: Reference | None = None
    plain: Reference | None = None
    tokenizer: TextTokenizer | None = None
    seed: int = 0

    @property
    def switchable(self) -> SwitchableLayers:
        """The model, where its layers can be switched."""
        assert isinstance(self.model, SwitchableLayers)
        return self.model

    @property
    def vocab_size(self) -> int:
        """How many tokens the model's embedding knows."""
        return limits(self.model)[0]

    @property
    def max_length(self) -> int | None:
        """How many positions the model has; None for any number."""
        return limits(self.model)[1]

    @property
    def computed_by(self) -> dict[str, str]:
        """The packages that the model and the tokenizer come from."""
        theirs = getattr(getattr(self.model, "config", None), "theirs", None)
        package = type(self.model).__module__.partition(".")[0]
        found = {"model": package if theirs is None else f"{package}, with the rotation and activation of transformers"}
        return found if self.tokenizer is None else {**found, "tokenizer": self.tokenizer.by}

    @property
    def _reference(self) -> Reference:
        assert self.reference is not None
        return self.reference

    @cached_property
    def _shared_below(self) -> int:
        """The layers below give the reference's hidden states: a comparison starts there. 0: none do."""
        if self.plain is None or self.reference is None:
            return 0
        first, other, base = min(self.switchable.npt_layers), self.reference.model, self.plain.model
        if other is base:
            return first
        if isinstance(other, SwitchableLayers) and _head_weight(other) is _head_weight(base):
            return min(first, *other.npt_layers)
        return 0

    def notes(self, length: int) -> tuple[str, ...]:
        """What should be known of figures of sequences of `length` tokens, where the model says so (`notes`)."""
        notes = getattr(self.model, "notes", None)
        return tuple(notes(length)) if callable(notes) else ()

    def encode(self, text: str) -> torch.Tensor:
        """Token ids [T] of a text, or what stands for it where there is no tokenizer. Raises ModelError."""
        if self.tokenizer is None:
            return seeded_ids(text, self.vocab_size, self._seeded_length, self.seed)
        return encode(self.tokenizer, text, self.vocab_size)

    def shown(self, text: str) -> str:
        """What a row calls the prompt `text`: random ids, where those were measured in its place."""
        return text if self.tokenizer else f"{self._seeded_length} random ids, not the text {text!r}"

    @property
    def _seeded_length(self) -> int:
        return min(SEEDED_LENGTH, self.max_length or SEEDED_LENGTH)

    def decode(self, token_ids: list[int]) -> str:
        """The text of token ids."""
        return " ".join(map(str, token_ids)) if self.tokenizer is None else self.tokenizer.decode(token_ids)

    def compare(self, token_ids: torch.Tensor) -> LogitComparison:
        """The model's logits against the reference's on one sequence [T]."""
        known = self._reference.trace(token_ids, [self._shared_below])
        if self._shared_below:
            final = continue_from(self._llama, known, self._shared_below)
        else:
            final = trace(self.model, token_ids, frozenset()).final
        return self._compare(self._reference, self.model, final, token_ids)

    @torch.inference_mode()
    def next_logprobs(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Log-probabilities [T - 1] that the model gives to the true next tokens of one sequence [T]."""
        final, head = trace(self.model, token_ids, frozenset()).final[0], head_of(self.model)
        size = max(1, CHUNK_ENTRIES // logit_count(self.model))
        parts = []
        for start in range(0, len(token_ids) - 1, size):
            known = token_ids[start + 1 : start + 1 + size].to(final.device)
            logprobs = head(final[start : start + len(known)]).double().log_softmax(-1)
            parts.append(logprobs.gather(-1, known.unsqueeze(-1)).squeeze(-1).cpu())
        return torch.cat(parts)

    def has_floor(self) -> bool:
        """Whether the reference can be run in another precision here."""
        return self.reference is not None and isinstance(self.reference.model, Llama)

    def compare_to_floor(self, token_ids: torch.Tensor) -> LogitComparison:
        """The reference in the other of float32 and bfloat16 against itself: what no model can beat."""
        model = self._reference.model
        assert isinstance(model, Llama)
        head, final = in_other_precision(model, token_ids)
        return compare_finals(self._reference.logit_chunks(token_ids), head, final, token_ids, logit_count(self.model))

    def control(self, token_ids: torch.Tensor) -> LogitComparison:
        """All layers off, through the model's own forward pass, against the plain model: must be equal."""
        assert self.plain is not None
        llama = self._llama
        with self.switchable.npt_mode(set()), torch.inference_mode():
            output = llama.model(token_ids.to(llama.device).unsqueeze(0))
        return self._compare(self.plain, self.model, output.last_hidden_state, token_ids)

    def plain_against_reference(self, token_ids: torch.Tensor) -> LogitComparison:
        """The plain model against the reference: differs where a checkpoint brings base weights of its own."""
        assert self.plain is not None
        final = self.plain.trace(token_ids, []).final
        return self._compare(self._reference, self.plain.model, final, token_ids)

    def layer_run(self, token_ids: torch.Tensor) -> "tuple[torch.Tensor, layers.Run]":
        """The reference's logits [T, V] and a function from the layers that are on to the model's, for per-layer tests.

        Layers below the first that is on give the plain model's hidden states, so a run starts there.
        """
        assert self.plain is not None
        known = self.plain.trace(token_ids, self.switchable.npt_layers)

        def run(active: frozenset[int]) -> torch.Tensor:
            with self.switchable.npt_mode(set(active)):
                return logits(self.model, continue_from(self._llama, known, min(active)))

        return logits(self._reference.model, self._reference.trace(token_ids, []).final), run

    def continuation(self, token_ids: torch.Tensor, count: int, *, temperature: float) -> dict[str, Any]:
        """Continuations of one prompt [T] by model and reference from the same seed, and how far they agree.

        All `count` tokens are there; what is said of them, and the texts, go up to the first token that ends a text.
        """
        from runner.evaluation.decoding import eos_ids, generate
        from runner.metrics import generation

        settings: dict[str, Any] = {"temperature": temperature, "seed": self.seed}
        prompt = token_ids.to(device_of(self.model))
        tokens = generate(self.model, prompt, count, **settings)
        theirs = self._reference.continuation(token_ids, count, **settings)
        ends = eos_ids(self.model, self.tokenizer)
        own, other = generation.until_end(tokens, ends), generation.until_end(theirs, ends)
        return {
            **settings,
            "tokens": tokens,
            "reference_tokens": theirs,
            "text": self.decode(own),
            "reference_text": self.decode(other),
            **generation.agreement(own, other),
            "repetition": generation.repetition(own),
            "reference_repetition": generation.repetition(other),
        }

    def non_finite_findings(self, names: Sequence[str], sequences: Sequence[torch.Tensor]) -> list[str]:
        """One finding for each named sequence in which the model's values stop being finite."""
        findings = []
        for name, token_ids in zip(names, sequences, strict=True):
            place = first_non_finite(self.model, token_ids)
            if place:
                findings.append(f"{name}: values are not finite from {place[0]} on, first at position {place[1]}")
            elif self.reference and (place := first_non_finite(self.reference.model, token_ids)):
                findings.append(f"{name}: the reference itself is not finite from {place[0]} on")
        return findings

    @property
    def _llama(self) -> Llama:
        """The model with switchable layers: today's are Llamas, which can be run from any layer on."""
        assert isinstance(self.model, Llama)
        return self.model

    def _compare(
        self, reference: Reference, model: nn.Module, final: torch.Tensor, token_ids: torch.Tensor
    ) -> LogitComparison:
        return compare_finals(
            reference.logit_chunks(token_ids), head_of(model), final, token_ids, logit_count(self.model)
        )


def _head_weight(model: object) -> torch.Tensor | None:
    return model.lm_head.weight if isinstance(model, Llama) else None


def plain_reference(model: nn.Module, base: Reference | None) -> Reference | None:
    """What `Evaluator.plain` is for a model on `base` (None: complete by itself)."""
    if not isinstance(model, SwitchableLayers):
        return None
    return base or Reference(model.plain(), object())  # a key of its own: no other model may answer
