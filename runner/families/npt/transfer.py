"""Knowledge transfer: the modulation (v_a, v_b) that one prompt produces, used while another one is read.

    extract   v_a_i = s_i W_a_up[i], v_b_i = s_i W_b_up[i], s_i = a W_down[i], a = the attention output at a position
    combine   add, subtract, average, scale, negate
              space=vectors: on each v_a and each v_b; space=weights: on ΔW = Σ_i v_b_i v_a_iᵀ, ranks side by side

How one is injected is in transfer_injection.py, how it is written into the weights in transfer_permanent.py.
What is set on a model for a pass is gone after it, however it ends.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Literal

import torch
from torch import nn

from runner.errors import ConfigError, ModelError, did_you_mean
from runner.families.npt.model import NptDecoderLayer, NptLlamaForCausalLM, Override, RankKUpdate
from runner.families.npt.modulation import SPACES, Modulation, Pair, Source

Position = int | slice | Literal["mean"]
OPERATIONS = ("add", "subtract", "average", "scale", "negate")


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
