"""Knowledge transfer: the modulation (v_a, v_b) that one prompt produces, used while another one is read.

    extract   v_a_i = s_i W_a_up[i], v_b_i = s_i W_b_up[i], s_i = a W_down[i], a = the attention output at a position
    combine   add, subtract, average, scale, negate
              space=vectors: on each v_a and each v_b; space=weights: on ΔW = Σ_i v_b_i v_a_iᵀ, ranks side by side

How one is injected is in transfer_injection.py, how it is written into the weights in transfer_permanent.py.
What is set on a model for a pass is gone after it, however it ends.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from runner.errors import ConfigError, ModelError, RunnerError, did_you_mean
from runner.families.npt.model import NptDecoderLayer, NptLlamaForCausalLM, Origin, Override, RankKUpdate

Pair = tuple[torch.Tensor, torch.Tensor]
Position = int | slice | Literal["mean"]
SPACES = ("weights", "vectors")
OPERATIONS = ("add", "subtract", "average", "scale", "negate")
KINDS = ("single", "dual", "triple")


@dataclass(frozen=True, kw_only=True)
class Source:
    """What one extraction read: `position` -1 and `mean` for the mean over all positions, else the first taken."""

    text: str | None
    ids: tuple[int, ...]
    position: int
    count: int = 1  # positions from there on
    mean: bool = False
    special_tokens: bool = False


@dataclass(frozen=True, kw_only=True)
class Modulation:
    """`m[layer][projection]` is (v_a [k, d_in], v_b [k, d_out]) on the CPU; [n, k, …] where it is of n positions.

    `active`: the NPT layers that were on when it was taken. `space`: in which it was combined; one that was extracted
    is the same in both. `expression`: how it was made, in names. `origin`: the model that it was taken from, or what a
    file says of that. `taken`: when, in ISO 8601.
    """

    vectors: Mapping[int, Mapping[str, Pair]]
    active: tuple[int, ...]
    space: str = "vectors"
    expression: str
    sources: tuple[Source, ...] = ()
    origin: Origin | Mapping[str, str] | None = None
    taken: str = ""

    def __getitem__(self, layer: int) -> Mapping[str, Pair]:
        return self.vectors[layer]

    @property
    def layers(self) -> list[int]:
        """The layers that it has, lowest first."""
        return list(self.vectors)

    @property
    def count(self) -> int:
        """For how many positions it is."""
        first = next(iter(next(iter(self.vectors.values())).values()))[0]
        return first.shape[0] if first.ndim == 3 else 1

    def kind(self, layer: int) -> str:
        """single, dual or triple."""
        return KINDS[len(self.vectors[layer]) - 1]

    def ranks(self, layer: int) -> int:
        """k."""
        return next(iter(self.vectors[layer].values()))[0].shape[-2]

    def magnitudes(self) -> dict[int, float]:
        """By layer: the mean Frobenius norm of its v_a's and v_b's; of one made in weight space that of its ΔW's."""
        measure = delta_norm if self.space == "weights" else _vector_norm
        return {
            layer: sum(measure(pair) for pair in pairs.values()) / len(pairs) for layer, pairs in self.vectors.items()
        }

    def delta_norms(self) -> dict[int, dict[str, float]]:
        """‖ΔW‖ (Frobenius) of each layer's projections."""
        return {layer: {name: delta_norm(p) for name, p in pairs.items()} for layer, pairs in self.vectors.items()}

    def mapped(self, change: Callable[[int, str, Pair], Pair], **fields: Any) -> "Modulation":
        """The same layers and projections with other vectors, and other `fields`."""
        vectors = {
            layer: {name: change(layer, name, pair) for name, pair in pairs.items()}
            for layer, pairs in self.vectors.items()
        }
        return Modulation(**{**vars(self), "vectors": vectors, **fields})

    def only(self, layers: Collection[int]) -> "Modulation":
        """Without its other layers."""
        return Modulation(**{**vars(self), "vectors": {i: pairs for i, pairs in self.vectors.items() if i in layers}})

    def require_finite(self) -> "Modulation":
        """Itself. Raises RunnerError that names the layer where it holds NaN or Inf."""
        for layer, pairs in self.vectors.items():
            for name, pair in pairs.items():
                for which, tensor in zip(("v_a", "v_b"), pair, strict=True):
                    if not bool(torch.isfinite(tensor).all()):
                        raise RunnerError(f"layer {layer}: {which} of {name} is not finite")
        return self

    def save(self, path: object) -> None:
        """Write it as one safetensors file. Raises CheckpointError or RunnerError."""
        from runner.families.npt.transfer_files import save_modulation

        save_modulation(self, path)


def delta_norm(pair: Pair) -> float:
    """‖Σ_i v_b_i v_a_iᵀ‖ from the Gram matrices of v_a [k, d_in] and v_b [k, d_out]; of several positions the mean."""
    v_a, v_b = (tensor.double() for tensor in pair)
    squares = ((v_a @ v_a.mT) * (v_b @ v_b.mT)).sum((-2, -1)).clamp_min(0)
    return float(squares.sqrt().mean())


def _vector_norm(pair: Pair) -> float:
    return sum(float(tensor.float().norm(dim=(-2, -1)).mean()) for tensor in pair) / 2


def npt_model(model: nn.Module) -> NptLlamaForCausalLM:
    """`model`, where it has NPT layers. Raises ModelError."""
    if isinstance(model, NptLlamaForCausalLM) and model.npt_layers:
        return model
    raise ModelError("No NPT layers found: knowledge is transferred between the prompts of an NPT model only")


def active_layers(model: NptLlamaForCausalLM, layers: Collection[int] | None) -> tuple[int, ...]:
    """`layers` in order, by default those that are on. Raises ConfigError for none, or one that is no NPT layer."""
    if layers is None:
        layers = [index for index, layer in model.npt_layers.items() if layer.npt_mode]
    known = model.npt_layers
    if wrong := sorted(set(layers) - set(known)):
        raise ConfigError(f"layer {wrong[0]} is no NPT layer; the NPT layers are {', '.join(map(str, known))}")
    if not layers:
        raise ConfigError(f"no NPT layer is active; choose among {', '.join(map(str, known))}")
    return tuple(sorted(set(layers)))


def span(position: Position, length: int) -> range:
    """The positions that `position` means in a sequence of `length`. Raises ConfigError outside -length … length-1."""
    if position == "mean":
        return range(length)
    if isinstance(position, slice):
        found = range(length)[position]
        if position.step not in (None, 1) or not found:
            raise ConfigError(f"position {position.start}:{position.stop}: no positions of a text of {length} tokens")
        return found
    if isinstance(position, bool) or not isinstance(position, int) or not -length <= position < length:
        raise ConfigError(f"position {position} is outside the text: it has {length} tokens, {-length} to {length - 1}")
    return range(position % length, position % length + 1)


@contextmanager
def overridden(model: NptLlamaForCausalLM, active: Sequence[int], overrides: Mapping[int, Override]) -> Iterator[None]:
    """Within the block the layers `active` modulate, and those of `overrides` let it decide about their updates."""
    layers = model.npt_layers
    with model.npt_mode(set(active)):
        try:
            for index, override in overrides.items():
                layers[index].override = override
            yield
        finally:
            for layer in layers.values():
                layer.override = None


def check_ids(model: NptLlamaForCausalLM, ids: Sequence[int], more: int = 0) -> torch.Tensor:
    """`ids` [1, T] on the model's device. Raises ConfigError for none, unknown ones, and more than it has positions."""
    if not ids:
        raise ConfigError("an empty text has no tokens")
    if not 0 <= min(ids) <= max(ids) < model.config.vocab_size:
        raise ConfigError(f"a token id is not in the vocabulary of {model.config.vocab_size}: {max(ids)}")
    limit = model.config.max_position_embeddings
    if more and len(ids) + more > limit:
        raise ConfigError(f"{len(ids)} tokens and {more} new ones are more than the model's {limit} positions")
    return torch.tensor([list(ids)], dtype=torch.long, device=model.device)


@torch.inference_mode()
def extract(
    model: NptLlamaForCausalLM,
    ids: Sequence[int],
    position: Position = -1,
    layers: Collection[int] | None = None,
    *,
    text: str | None = None,
    special_tokens: bool = False,
    expression: str | None = None,
) -> Modulation:
    """The modulation of `ids` at `position`: one, several (a slice), or the mean over all of them.

    Raises ConfigError for a position or layer that there is not, RunnerError for one that is not finite.
    """
    active, token_ids, wanted = active_layers(model, layers), check_ids(model, ids), span(position, len(ids))
    found: dict[int, dict[str, Pair]] = {index: {} for index in active}

    def record(index: int, name: str, attention: torch.Tensor, x: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
        at = attention[0, wanted.start : wanted.stop]
        # The vectors are linear in a: those of the mean are the mean of those.
        v_a, v_b = update_of(model.npt_layers[index], name).vectors(
            at.mean(0, keepdim=True) if position == "mean" else at
        )
        found[index][name] = (v_a.cpu(), v_b.cpu()) if isinstance(position, slice) else (v_a[0].cpu(), v_b[0].cpu())
        return update

    with overridden(model, active, {index: partial(record, index) for index in active}):
        model.model(token_ids)
    source = Source(
        text=text,
        ids=tuple(ids),
        position=-1 if position == "mean" else wanted.start,
        count=len(wanted) if isinstance(position, slice) else 1,
        mean=position == "mean",
        special_tokens=special_tokens,
    )
    named = f"extract{'-seq' if source.mean else ''}({text if text is not None else list(ids)!r})"
    return Modulation(
        vectors=found, active=active, expression=expression or named, sources=(source,), origin=model.origin
    ).require_finite()


def update_of(layer: NptDecoderLayer, name: str) -> RankKUpdate:
    """The update of one projection."""
    update = layer.updates[name]
    assert isinstance(update, RankKUpdate)
    return update


def combine(operation: str, *arguments: Modulation | float, space: str = "weights") -> Modulation:
    """`operation` on modulations, and a number for scale. Raises ConfigError where they do not go together."""
    if operation not in OPERATIONS:
        raise ConfigError(f"operation {operation!r} is unknown{did_you_mean(operation, OPERATIONS)}")
    if space not in SPACES:
        raise ConfigError(f"space {space!r} is unknown{did_you_mean(space, SPACES)}")
    numbers = [float(each) for each in arguments if not isinstance(each, Modulation)]
    modulations = [each for each in arguments if isinstance(each, Modulation)]
    wanted = {"add": 2, "subtract": 2, "scale": 1, "negate": 1}.get(operation)
    if len(numbers) != (operation == "scale") or (wanted or max(2, len(modulations))) != len(modulations):
        takes = {"average": "at least two modulations", "scale": "a modulation and a number", "negate": "a modulation"}
        raise ConfigError(f"{operation} takes {takes.get(operation, 'two modulations')}")
    _check_alike(modulations, space)
    first, factor = modulations[0], numbers[0] if numbers else -1.0
    if not math.isfinite(factor):
        raise ConfigError(f"scale by {factor}: give a finite number")
    signs = {"subtract": [1.0, -1.0], "average": [1 / len(modulations)] * len(modulations)}.get(
        operation, [factor] if operation in ("scale", "negate") else [1.0, 1.0]
    )

    def change(layer: int, name: str, _: Pair) -> Pair:
        pairs = [each[layer][name] for each in modulations]
        if space == "vectors":
            v_a, v_b = (
                torch.stack([sign * pair[side] for sign, pair in zip(signs, pairs, strict=True)]).sum(0)
                for side in (0, 1)
            )
            return v_a, v_b
        scaled = [sign * v_b for sign, (_, v_b) in zip(signs, pairs, strict=True)]
        return torch.cat([v_a for v_a, _ in pairs], dim=-2), torch.cat(scaled, dim=-2)

    names = [each.expression for each in modulations]
    said = {"add": " + ".join, "subtract": " - ".join, "average": lambda n: f"mean({', '.join(n)})"}
    expression = said[operation](names) if operation in said else f"{factor:g} * ({names[0]})"
    sources = tuple(dict.fromkeys(source for each in modulations for source in each.sources))
    return first.mapped(change, space=space, expression=expression, sources=sources).require_finite()


def _check_alike(modulations: Sequence[Modulation], space: str) -> None:
    """All must have the same layers, kinds, positions and widths, on vectors the same k, too."""
    first = modulations[0]
    one = first.expression
    for other in modulations[1:]:
        two = other.expression
        if first.layers != other.layers:
            raise ConfigError(f"{one} has the layers {first.layers}, {two} {other.layers}")
        if first.count != other.count:
            raise ConfigError(f"{one} is of {first.count} positions, {two} of {other.count}")
        for layer in first.layers:
            if first.kind(layer) != other.kind(layer):
                raise ConfigError(f"layer {layer}: {one} is {first.kind(layer)}, {two} {other.kind(layer)}")
            if space == "vectors" and first.ranks(layer) != other.ranks(layer):
                raise ConfigError(
                    f"layer {layer}: {one} has k {first.ranks(layer)}, {two} {other.ranks(layer)}; vectors cannot be "
                    "combined; in space=weights they can"
                )
            for name, pair in first[layer].items():
                for which, mine, theirs in zip(("v_a", "v_b"), pair, other[layer][name], strict=True):
                    if mine.shape[-1] != theirs.shape[-1]:
                        raise ConfigError(
                            f"layer {layer}: {which} of {name} is {mine.shape[-1]} wide in {one}, {theirs.shape[-1]} "
                            f"in {two}"
                        )


def permuted(m: Modulation, seed: int) -> Modulation:
    """A control: each vector's entries in another order, so norms and inner products of ΔW's terms stay."""
    generator = torch.Generator().manual_seed(seed)

    def change(layer: int, name: str, pair: Pair) -> Pair:
        v_a, v_b = (tensor[..., torch.randperm(tensor.shape[-1], generator=generator)] for tensor in pair)
        return v_a, v_b

    return m.mapped(change, expression=f"permuted({m.expression})")
