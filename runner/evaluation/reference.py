"""The reference's hidden states and continuations: computed once for each sequence, kept, keyed by model and tokens."""

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import LlamaForCausalLM

from runner.evaluation.forward import Trace, chunk_size, device_of, has_cache, logit_chunks, logit_count, trace
from runner.evaluation.tensor_cache import Shelf, name_of, read, write
from runner.metrics.generation import generate

MODELS_KEPT = 2


class Reference:
    """A model and what it computed. What one model computed is shared by all who ask with the same `key`.

    `key` must change whenever the model's weights, dtype or device do. With a `shelf` it is shared with other
    processes as well: what is read from there are the bits that this process would compute.
    """

    _kept: ClassVar[OrderedDict[Any, tuple[dict[Any, Trace], dict[Any, list[int]], dict[Any, torch.Tensor]]]] = (
        OrderedDict()
    )

    def __init__(self, model: nn.Module, key: Any, shelf: Shelf | None = None) -> None:
        self.model = model
        self.key = key
        self._shelf = shelf
        self._traces, self._continuations, self._logits = self._kept.setdefault(key, ({}, {}, {}))
        self._kept.move_to_end(key)
        while len(self._kept) > MODELS_KEPT:
            self._kept.popitem(last=False)

    def trace(self, token_ids: torch.Tensor, layers: Iterable[int]) -> Trace:
        """The trace of `token_ids` [T] with at least the inputs of `layers`, computed when it is not there yet."""
        wanted = frozenset(layers) if isinstance(self.model, LlamaForCausalLM) else frozenset()
        key = tuple(token_ids.tolist())
        known = self._traces.get(key) or self._read_trace(key)
        if known is None or not wanted <= known.inputs.keys():
            kept = wanted | (frozenset() if known is None else known.inputs.keys())
            known = trace(self.model, token_ids, kept)
            inputs = {f"input.{i}": tensor for i, tensor in known.inputs.items()}
            self._write("trace", key, tensors={"final": known.final, **inputs})
        self._traces[key] = known
        return known

    def logit_chunks(self, token_ids: torch.Tensor) -> Iterable[torch.Tensor]:
        """The logits [t, V] of one sequence [T], a chunk of positions at a time; those of a single chunk are kept."""
        final = self.trace(token_ids, []).final
        if len(token_ids) > chunk_size(logit_count(self.model)):
            return logit_chunks(self.model, final)
        key = tuple(token_ids.tolist())
        if key not in self._logits:
            kept = self._read("logits", key)
            self._logits[key] = kept["logits"] if kept else next(iter(logit_chunks(self.model, final)))
            if not kept:
                self._write("logits", key, tensors={"logits": self._logits[key]})
        return [self._logits[key]]

    def continuation(self, token_ids: torch.Tensor, count: int, *, temperature: float, seed: int) -> list[int]:
        """`count` tokens that the model generates after `token_ids` [T], as `generate` does."""
        key = (tuple(token_ids.tolist()), count, temperature, seed)
        if key not in self._continuations:
            kept = self._read("continuation", *key)
            self._continuations[key] = kept["tokens"].tolist() if kept else self._generate(token_ids, *key[1:])
            if not kept:
                self._write("continuation", *key, tensors={"tokens": torch.tensor(self._continuations[key])})
        return self._continuations[key]

    def _generate(self, token_ids: torch.Tensor, count: int, temperature: float, seed: int) -> list[int]:
        prompt, cache = token_ids.to(device_of(self.model)), has_cache(self.model)
        return generate(self.model, prompt, count, temperature=temperature, seed=seed, cache=cache)

    def _read_trace(self, key: tuple[int, ...]) -> Trace | None:
        kept = self._read("trace", key)
        if kept is None:
            return None
        final = kept.pop("final")
        return Trace(inputs={int(name.partition(".")[2]): tensor for name, tensor in kept.items()}, final=final)

    def _read(self, *what: object) -> dict[str, torch.Tensor] | None:
        if self._shelf is None:
            return None
        kept = read(self._shelf.store, name_of(self._shelf.model, *what))
        device = device_of(self.model)
        return None if kept is None else {name: tensor.to(device) for name, tensor in kept.items()}

    def _write(self, *what: object, tensors: dict[str, torch.Tensor]) -> None:
        if self._shelf is not None:
            write(self._shelf.store, name_of(self._shelf.model, *what), tensors)
