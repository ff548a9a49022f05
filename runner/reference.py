"""The reference's hidden states and continuations: computed once for each sequence, kept, keyed by model and tokens."""

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import LlamaForCausalLM

from runner.forward import Trace, chunk_size, device_of, has_cache, logit_chunks, logit_count, trace
from runner.measures.generation import generate

MODELS_KEPT = 2


class Reference:
    """A model and what it computed. What one model computed is shared by all who ask with the same `key`.

    `key` must change whenever the model's weights, dtype or device do.
    """

    _kept: ClassVar[OrderedDict[Any, tuple[dict[Any, Trace], dict[Any, list[int]], dict[Any, torch.Tensor]]]] = (
        OrderedDict()
    )

    def __init__(self, model: nn.Module, key: Any) -> None:
        self.model = model
        self.key = key
        self._traces, self._continuations, self._logits = self._kept.setdefault(key, ({}, {}, {}))
        self._kept.move_to_end(key)
        while len(self._kept) > MODELS_KEPT:
            self._kept.popitem(last=False)

    def trace(self, token_ids: torch.Tensor, layers: Iterable[int]) -> Trace:
        """The trace of `token_ids` [T] with at least the inputs of `layers`, computed when it is not there yet."""
        wanted = frozenset(layers) if isinstance(self.model, LlamaForCausalLM) else frozenset()
        key = tuple(token_ids.tolist())
        known = self._traces.get(key)
        if known is None or not wanted <= known.inputs.keys():
            kept = wanted | (frozenset() if known is None else known.inputs.keys())
            known = self._traces[key] = trace(self.model, token_ids, kept)
        return known

    def logit_chunks(self, token_ids: torch.Tensor) -> Iterable[torch.Tensor]:
        """The logits [t, V] of one sequence [T], a chunk of positions at a time; those of a single chunk are kept."""
        final = self.trace(token_ids, []).final
        if len(token_ids) > chunk_size(logit_count(self.model)):
            return logit_chunks(self.model, final)
        key = tuple(token_ids.tolist())
        if key not in self._logits:
            self._logits[key] = next(iter(logit_chunks(self.model, final)))
        return [self._logits[key]]

    def continuation(self, token_ids: torch.Tensor, count: int, *, temperature: float, seed: int) -> list[int]:
        """`count` tokens that the model generates after `token_ids` [T], as `generate` does."""
        key = (tuple(token_ids.tolist()), count, temperature, seed)
        if key not in self._continuations:
            prompt = token_ids.to(device_of(self.model))
            self._continuations[key] = generate(
                self.model, prompt, count, temperature=temperature, seed=seed, cache=has_cache(self.model)
            )
        return self._continuations[key]
