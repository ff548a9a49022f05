"""The reference's hidden states and continuations: computed once for each sequence, keyed by model and tokens."""

from collections import OrderedDict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from runner.evaluation.forward import Trace, chunk_size, device_of, logit_chunks, logit_count, trace
from runner.evaluation.llama import Llama
from runner.evaluation.tensor_cache import ModelCache, name_of, read, write

MODELS_CACHED = 2
TokenIds = tuple[int, ...]


@dataclass(frozen=True)
class _Computed:
    """What one model computed, by the token ids of the sequence (and, for a continuation, how it was drawn)."""

    traces: dict[TokenIds, Trace] = field(default_factory=dict)
    logits: dict[TokenIds, torch.Tensor] = field(default_factory=dict)
    continuations: dict[tuple[TokenIds, int, float, int], list[int]] = field(default_factory=dict)


class Reference:
    """A model and what it computed. What one model computed is shared by all who ask with the same `key`.

    `key` must change whenever the model's weights, dtype or device do. With a `cache` it is shared with other
    processes as well: what is read from there are the bits that this process would compute.
    """

    _computed: "OrderedDict[Hashable, _Computed]" = OrderedDict()  # noqa: RUF012 - one for the whole process

    def __init__(self, model: nn.Module, key: Hashable, cache: ModelCache | None = None) -> None:
        self.model = model
        self.key = key
        self._cache = cache
        self._known = self._computed.setdefault(key, _Computed())
        self._computed.move_to_end(key)
        while len(self._computed) > MODELS_CACHED:
            self._computed.popitem(last=False)

    def trace(self, token_ids: torch.Tensor, layers: Iterable[int]) -> Trace:
        """The trace of `token_ids` [T] with at least the inputs of `layers`, computed when it is not there yet."""
        wanted = frozenset(layers) if isinstance(self.model, Llama) else frozenset()
        ids = tuple(token_ids.tolist())
        known = self._known.traces.get(ids) or self._read_trace(ids)
        if known is None or not wanted <= known.inputs.keys():
            known = trace(self.model, token_ids, wanted | (frozenset() if known is None else known.inputs.keys()))
            inputs = {f"input.{i}": tensor for i, tensor in known.inputs.items()}
            self._write("trace", ids, tensors={"final": known.final, **inputs})
        self._known.traces[ids] = known
        return known

    def logit_chunks(self, token_ids: torch.Tensor) -> Iterable[torch.Tensor]:
        """The logits [t, V] of one sequence [T], a chunk of positions at a time; a single chunk is remembered."""
        final = self.trace(token_ids, []).final
        if len(token_ids) > chunk_size(logit_count(self.model)):
            return logit_chunks(self.model, final)
        ids = tuple(token_ids.tolist())
        if ids not in self._known.logits:
            found = self._read("logits", ids)
            self._known.logits[ids] = found["logits"] if found else next(iter(logit_chunks(self.model, final)))
            if not found:
                self._write("logits", ids, tensors={"logits": self._known.logits[ids]})
        return [self._known.logits[ids]]

    def continuation(self, token_ids: torch.Tensor, count: int, *, temperature: float, seed: int) -> list[int]:
        """`count` tokens that the model generates after `token_ids` [T], as `generate` does."""
        key = (tuple(token_ids.tolist()), count, temperature, seed)
        if key not in self._known.continuations:
            found = self._read("continuation", *key)
            tokens = found["tokens"].tolist() if found else self._generate(token_ids, count, temperature, seed)
            self._known.continuations[key] = tokens
            if not found:
                self._write("continuation", *key, tensors={"tokens": torch.tensor(tokens)})
        return self._known.continuations[key]

    def _generate(self, token_ids: torch.Tensor, count: int, temperature: float, seed: int) -> list[int]:
        from runner.evaluation.decoding import generate

        prompt = token_ids.to(device_of(self.model))
        return generate(self.model, prompt, count, temperature=temperature, seed=seed)

    def _read_trace(self, ids: TokenIds) -> Trace | None:
        found = self._read("trace", ids)
        if found is None:
            return None
        final = found.pop("final")
        return Trace(inputs={int(name.partition(".")[2]): tensor for name, tensor in found.items()}, final=final)

    def _read(self, *what: object) -> dict[str, torch.Tensor] | None:
        if self._cache is None:
            return None
        found = read(self._cache.store, name_of(self._cache.model, *what))
        device = device_of(self.model)
        return None if found is None else {name: tensor.to(device) for name, tensor in found.items()}

    def _write(self, *what: object, tensors: dict[str, torch.Tensor]) -> None:
        if self._cache is not None:
            write(self._cache.store, name_of(self._cache.model, *what), tensors)
