"""What an injection is worth: against controls, on other prompts, by strength, by layer; and where a model modulates.

Every figure is of next-token probabilities at the last position; KL is KL(baseline ‖ injected) in nats.
"""

from collections.abc import Collection, Mapping, Sequence
from functools import partial

import torch

from runner.errors import ConfigError
from runner.families.npt.model import NptLlamaForCausalLM
from runner.families.npt.modulation import Modulation, delta_norm
from runner.families.npt.transfer import active_layers, check_ids, extract, overridden, permuted, update_of
from runner.families.npt.transfer_injection import How, Injection, inject
from runner.results import JsonObject

# The positions of a prompt whose ΔW are looked at one by one.
_LONGEST_MAP = 256


def controls(
    model: NptLlamaForCausalLM,
    ids: Sequence[int],
    m: Modulation,
    how: How,
    layers: Collection[int] | None,
    *,
    tracked: Mapping[str, int],
    others: Mapping[str, Sequence[int]],
    seed: int,
    position: int = -1,
) -> JsonObject:
    """What the same injection does with `m`'s entries permuted, and with the modulation of another prompt.

    `others`: prompts by their text. Those that neither begin as what `m` was taken from nor as what it is injected into
    are what should stay as it is: their mean KL is `locality`. The first of them gives the other modulation.
    """
    own = [source.ids for source in m.sources] + [tuple(ids)]
    unrelated = {text: each for text, each in others.items() if not any(_begins_alike(each, one) for one in own)}
    found: JsonObject = {"permuted": _effect(inject(model, ids, permuted(m, seed), how, position, layers), tracked)}
    if unrelated and m.count == 1:
        text, other = next(iter(unrelated.items()))
        mean = any(source.mean for source in m.sources)
        taken = extract(model, other, "mean" if mean else -1, layers)
        if _same_kind(taken, m, how):
            found["other_prompt"] = {
                "prompt": text,
                **_effect(inject(model, ids, taken, how, position, layers), tracked),
            }
    rows: list[JsonObject] = [
        {"prompt": text, "kl": inject(model, each, m, how, -1, layers).kl}
        for text, each in unrelated.items()
        if len(each) >= m.count
    ]
    if rows:
        found["locality"] = {"kl": sum(row["kl"] for row in rows) / len(rows), "prompts": rows}
    return found


def _begins_alike(one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether one of the two begins with the other; nothing is known of a text without ids."""
    count = min(len(one), len(other))
    return count > 0 and tuple(one[:count]) == tuple(other[:count])


def _same_kind(taken: Modulation, m: Modulation, how: How) -> bool:
    """Whether `taken` can stand in `m`'s place."""
    mixes_vectors: bool = how.space == "vectors" and how.mode != "replace"
    return not mixes_vectors or all(taken.ranks(i) == m.ranks(i) for i in m.layers if i in taken.layers)


def _effect(found: Injection, tracked: Mapping[str, int]) -> JsonObject:
    return {"kl": found.kl, "tracked": [{"text": text, **found.row(token)} for text, token in tracked.items()]}


def by_strength(
    model: NptLlamaForCausalLM,
    ids: Sequence[int],
    m: Modulation,
    strengths: Sequence[float],
    space: str,
    layers: Collection[int] | None,
    *,
    tracked: Mapping[str, int],
    seed: int,
) -> list[JsonObject]:
    """Add-injection at each strength: KL, and the tracked tokens' probabilities; `permuted_kl` is the control's."""
    rows = []
    control = permuted(m, seed)
    for strength in strengths:
        how = How(mode="add", strength=strength, space=space)
        found = inject(model, ids, m, how, -1, layers)
        rows.append(
            {
                "strength": strength,
                "kl": found.kl,
                "permuted_kl": inject(model, ids, control, how, -1, layers).kl,
                "probabilities": {text: found.probabilities(token)[1] for text, token in tracked.items()},
            }
        )
    return rows


def by_layer(
    model: NptLlamaForCausalLM,
    ids: Sequence[int],
    m: Modulation,
    how: How,
    layers: Collection[int] | None,
    *,
    tracked: Mapping[str, int],
) -> list[JsonObject]:
    """`m` injected in one layer alone, while all active ones modulate."""
    rows = []
    for layer in (each for each in active_layers(model, layers) if each in m.layers):
        found = inject(model, ids, m.only([layer]), how, -1, layers)
        rows.append({"layer": layer, "magnitude": m.magnitudes()[layer], **_effect(found, tracked)})
    return rows


@torch.inference_mode()
def delta_map(model: NptLlamaForCausalLM, ids: Sequence[int], layers: Collection[int] | None) -> list[JsonObject]:
    """‖ΔW‖ (Frobenius, mean over the projections) of each active layer at each position of a text."""
    if len(ids) > _LONGEST_MAP:
        raise ConfigError(f"{len(ids)} tokens: a map shows at most {_LONGEST_MAP}")
    active, token_ids = active_layers(model, layers), check_ids(model, ids)
    norms: dict[int, list[list[float]]] = {layer: [] for layer in active}

    def record(layer: int, name: str, attention: torch.Tensor, x: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
        own = update_of(model.npt_layers[layer], name)
        norms[layer].append([own.scale * delta_norm(own.vectors(each)) for each in attention[0]])
        return update

    with overridden(model, active, {layer: partial(record, layer) for layer in active}):
        model.model(token_ids)
    return [
        {"layer": layer, "norms": [sum(each) / len(each) for each in zip(*rows, strict=True)]}
        for layer, rows in norms.items()
    ]
