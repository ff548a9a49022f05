"""A modulation at work: injected at a position of another prompt, for one pass or at each step of a continuation.

At that position, in every active layer that the modulation has:

    replace  src          blend  (1-α) own + α src          add  own + strength src

space=vectors: v_a and v_b, each by itself; space=weights: ΔW = Σ_i v_b_i v_a_iᵀ. `own` is what the layer computes there
from a hidden state that the layers below, injected too, have changed. All other positions keep their own.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from runner.errors import ConfigError, ModelError, did_you_mean
from runner.evaluation.attention import KeyValueCache
from runner.families.npt.model import NptDecoderLayer, NptLlamaForCausalLM, Override
from runner.families.npt.modulation import SPACES, Modulation
from runner.families.npt.transfer import active_layers, check_ids, overridden, span, update_of
from runner.metrics.generation import Sampling, choose, penalised

MODES = ("replace", "blend", "add")
_TINY = 1e-10  # as today's programs have it: no probability is 0


@dataclass(frozen=True, kw_only=True)
class How:
    """How a modulation acts. Raises ConfigError for an unknown mode or space, blend without its `alpha`, and others."""

    mode: str = "replace"
    alpha: float | None = None
    strength: float = 1.0
    space: str = "weights"

    def __post_init__(self) -> None:
        for name, value, known in (("mode", self.mode, MODES), ("space", self.space, SPACES)):
            if value not in known:
                raise ConfigError(f"{name} {value!r} is unknown{did_you_mean(str(value), known)}")
        if self.mode == "blend" and self.alpha is None:
            raise ConfigError("blend needs alpha, a number from 0 (its own) to 1 (the modulation's)")
        for name, number in (("alpha", self.alpha), ("strength", self.strength)):
            if number is not None and (isinstance(number, bool) or not math.isfinite(number)):
                raise ConfigError(f"{name} {number} is no finite number")
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ConfigError(f"alpha {self.alpha} is outside 0 … 1")

    def mixed(self, own: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        """`own` and `source` put together: vectors, or what two ΔW give."""
        if self.mode == "replace":
            return source
        if self.mode == "blend":
            assert self.alpha is not None
            return (1 - self.alpha) * own + self.alpha * source
        return own + self.strength * source


def check_fit(model: NptLlamaForCausalLM, m: Modulation, how: How, active: Sequence[int]) -> list[str]:
    """What is to be said of the layers. Raises ModelError where a kind, a width or k does not fit, ConfigError where no
    layer is left.
    """
    for index in m.layers:
        if index in active:
            _check_layer(index, m, model.npt_layers[index], how)
    used = [index for index in m.layers if index in active]
    if not used:
        raise ConfigError(f"the modulation has the layers {m.layers}, active are {list(active)}: nothing would change")
    skipped = [index for index in m.layers if index not in active]
    own = [index for index in active if index not in m.layers]
    notes = [f"layers {skipped} of the modulation are not active: skipped"] if skipped else []
    return notes + ([f"layers {own} are active and not in the modulation: they keep their own"] if own else [])


def _check_layer(index: int, m: Modulation, layer: NptDecoderLayer, how: How) -> None:
    if (theirs := m.kind(index)) != layer.modulation:
        raise ModelError(f"layer {index}: the modulation is {theirs}, the layer {layer.modulation}")
    for name, pair in m[index].items():
        update = update_of(layer, name)
        for which, tensor, weight in zip(("v_a", "v_b"), pair, (update.w_a_up, update.w_b_up), strict=True):
            if tensor.shape[-1] != weight.shape[1]:
                raise ModelError(
                    f"layer {index}: {which} of {name} is {tensor.shape[-1]} wide, the layer needs {weight.shape[1]}"
                )
        if how.space == "vectors" and how.mode != "replace" and pair[0].shape[-2] != update.num_ranks:
            raise ModelError(
                f"layer {index}: the modulation has k {pair[0].shape[-2]}, the layer {update.num_ranks}: its vectors "
                f"cannot be mixed (mode {how.mode}); take space=weights"
            )


def _overrides(model: NptLlamaForCausalLM, m: Modulation, how: How, active: Sequence[int]) -> dict[int, Override]:
    """What injects `m` at the first positions of what a pass reads, in each layer that is active and in it."""
    found: dict[int, Override] = {}
    for index in m.layers:
        if index not in active:
            continue
        layer = model.npt_layers[index]
        weight = next(layer.updates.parameters())
        pairs = {
            name: tuple((t if t.ndim == 3 else t[None]).to(device=weight.device, dtype=weight.dtype) for t in pair)
            for name, pair in m[index].items()
        }
        found[index] = partial(_injected, layer, pairs, how)
    return found


def _injected(
    layer: NptDecoderLayer,
    pairs: Mapping[str, tuple[torch.Tensor, ...]],
    how: How,
    name: str,
    attention: torch.Tensor,
    x: torch.Tensor,
    update: torch.Tensor,
) -> torch.Tensor:
    """`update` [1, T, d_out] with the modulation `pairs` of n positions at the first n."""
    own, (v_a, v_b) = update_of(layer, name), pairs[name]
    count = len(v_a)
    if how.space == "vectors" and how.mode != "replace":
        own_a, own_b = own.vectors(attention[0, :count])
        v_a, v_b = how.mixed(own_a, v_a), how.mixed(own_b, v_b)
    made = ((v_a @ x[0, :count, :, None]) * v_b).sum(-2) * own.scale
    if how.space == "weights":
        made = how.mixed(update[0, :count], made)
    return torch.cat((made[None], update[:, count:]), dim=1) if count < update.shape[1] else made[None]


class Reader:
    """A sequence as the model reads it without injection, and its next token with and without one.

    `cached`: keys and values are kept of what every position gives *without* injection, so the last positions are run
    twice, once injected (its keys and values are dropped) and once plain. Else both passes read everything.
    """

    def __init__(
        self,
        model: NptLlamaForCausalLM,
        m: Modulation | None,
        how: How,
        active: Sequence[int],
        *,
        cached: bool,
        room: int = 0,
    ) -> None:
        self._model, self._active, self._count = model, active, 1 if m is None else m.count
        self._overrides = {} if m is None else _overrides(model, m, how, active)
        self._cache: KeyValueCache | None = None
        if cached:
            self._cache = model.new_cache(torch.zeros(1, dtype=torch.long), room)

    @torch.inference_mode()
    def plain(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits [V] after `ids` [1, T] without injection."""
        with overridden(self._model, self._active, {}):
            return self._logits(ids, ids.shape[1] - 1)[-1]

    @torch.inference_mode()
    def both(self, ids: torch.Tensor, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [T - position, V] from `position` on, injected from there, and without injection."""
        if self._cache is None:
            with overridden(self._model, self._active, self.overrides_at(position)):
                injected = self._logits(ids, position)
            with overridden(self._model, self._active, {}):
                return injected, self._logits(ids, position)
        known = self._cache.get_seq_length()
        if known + 1 < position:
            # A new text: all of it in one pass. What came from `position` on is read again where it is needed.
            with overridden(self._model, self._active, {}):
                baseline = self._logits(ids[:, known:], position - known)
            self._cache.crop(position)
            return self._injected(ids, position), baseline
        with overridden(self._model, self._active, {}):
            if known < position:
                self._model.model(ids[:, known:position], past_key_values=self._cache)
        injected = self._injected(ids, position)
        with overridden(self._model, self._active, {}):
            return injected, self._logits(ids[:, position:], 0)

    def _injected(self, ids: torch.Tensor, position: int) -> torch.Tensor:
        """Logits from `position` on with the injection there, of which nothing stays in the cache."""
        assert self._cache is not None
        try:
            with overridden(self._model, self._active, self._overrides):
                return self._logits(ids[:, position:], 0)
        finally:
            self._cache.crop(position)

    def _logits(self, ids: torch.Tensor, start: int) -> torch.Tensor:
        """Those of `ids` from `start` on: the head is not run over the rest."""
        hidden = self._model.model(ids, past_key_values=self._cache).last_hidden_state[0, start:]
        logits: torch.Tensor = self._model.lm_head(hidden).float()
        return logits

    def overrides_at(self, position: int) -> dict[int, Override]:
        """The overrides where a pass reads what comes before `position`, too."""

        def shifted(
            override: Override, name: str, attention: torch.Tensor, x: torch.Tensor, update: torch.Tensor
        ) -> torch.Tensor:
            made = override(name, attention[:, position:], x[:, position:], update[:, position:])
            return torch.cat((update[:, :position], made), dim=1)

        return {index: partial(shifted, override) for index, override in self._overrides.items()}


@dataclass(frozen=True, kw_only=True)
class Injection:
    """Next-token logits [V] at the last position, injected and without; `kl`: KL(baseline ‖ injected), nats.

    `notes`: what is to be said of layers that were skipped or keep their own. `all_logits` [n, V]: from the first
    injected position on.
    """

    logits: torch.Tensor
    baseline: torch.Tensor
    kl: float
    notes: tuple[str, ...] = ()
    all_logits: torch.Tensor

    def probabilities(self, token: int) -> tuple[float, float]:
        """Of one token: without the injection and with it."""
        return float(self.baseline.double().softmax(-1)[token]), float(self.logits.double().softmax(-1)[token])

    def top(self, n: int = 10) -> list[dict[str, float | int]]:
        """The n most probable tokens with the injection: `token`, `baseline`, `injected`, `change`, `percent`."""
        chosen = self.logits.double().softmax(-1).topk(min(n, len(self.logits))).indices.tolist()
        return [self.row(token) for token in chosen]

    def row(self, token: int) -> dict[str, float | int]:
        """One token's probabilities; `percent` is relative to that without injection."""
        before, after = self.probabilities(token)
        change = after - before
        return {
            "token": token,
            "baseline": before,
            "injected": after,
            "change": change,
            "percent": 100 * change / (before + _TINY),
        }


def kl_divergence(baseline: torch.Tensor, injected: torch.Tensor) -> float:
    """Σ b (ln b − ln(p + 1e-10)) of two logits [V], in nats; at least 0, below which the 1e-10 may lead."""
    log_b, p = baseline.double().log_softmax(-1), injected.double().softmax(-1)
    return max(0.0, float((log_b.exp() * (log_b - (p + _TINY).log())).sum()))


def inject(
    model: NptLlamaForCausalLM,
    ids: Sequence[int],
    m: Modulation,
    how: How,
    position: int = -1,
    layers: Collection[int] | None = None,
    *,
    cached: bool = True,
) -> Injection:
    """Read `ids` with `m` at `position`; one of several positions ends there. Raises as `check_fit` and `span`."""
    active, token_ids = active_layers(model, layers), check_ids(model, ids)
    notes = check_fit(model, m.require_finite(), how, active)
    start = span(position, len(ids)).start - m.count + 1
    if start < 0:
        raise ConfigError(f"the modulation is of {m.count} positions; up to {position} the text has {start + m.count}")
    reader = Reader(model, m, how, active, cached=cached, room=len(ids))
    injected, baseline = reader.both(token_ids, start)
    return Injection(
        logits=injected[-1],
        baseline=baseline[-1],
        kl=kl_divergence(baseline[-1], injected[-1]),
        notes=tuple(notes),
        all_logits=injected,
    )


@torch.inference_mode()
def continued(
    model: NptLlamaForCausalLM,
    ids: Sequence[int],
    m: Modulation,
    how: How,
    count: int,
    layers: Collection[int] | None = None,
    *,
    sampling: Sampling | None = None,
    seed: int = 0,
    eos: Collection[int] = (),
    cached: bool = True,
) -> Iterator[tuple[int, Injection]]:
    """At most `count` further tokens, each with what it was drawn from: `m` acts at the last position of each step.

    A token is appended as its id; earlier positions, those of new tokens too, keep their own. Ends after one of `eos`.
    Greedy without `sampling`. Raises ConfigError where the model has not so many positions.
    """
    if count < 1:
        raise ConfigError(f"tokens {count}: give a whole number, at least 1")
    if m.count != 1:
        raise ConfigError(f"a modulation of {m.count} positions cannot act at each last one; take one position")
    active, token_ids = active_layers(model, layers), check_ids(model, ids, count)
    notes = tuple(check_fit(model, m.require_finite(), how, active))
    sampling = sampling or Sampling()
    draws = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    reader = Reader(model, m, how, active, cached=cached, room=len(ids) + count)
    for step in range(count):
        injected, baseline = reader.both(token_ids, token_ids.shape[1] - 1)
        scores = injected[-1:]
        if sampling.repetition_penalty != 1:
            seen = torch.zeros_like(scores, dtype=torch.bool).index_fill_(1, token_ids[0], True)
            scores = penalised(scores, seen, sampling.repetition_penalty)
        token = choose(scores, sampling, draws[step : step + 1].to(scores.device))
        yield (
            int(token),
            Injection(
                logits=injected[-1],
                baseline=baseline[-1],
                kl=kl_divergence(baseline[-1], injected[-1]),
                notes=notes,
                all_logits=injected,
            ),
        )
        if int(token) in eos:
            return
        token_ids = torch.cat((token_ids, token[None]), dim=1)
