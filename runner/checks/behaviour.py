"""What every model must do: be built from all of its keys, give finite logits, and not mind company or padding."""

from typing import Any

import torch
from torch import nn

from runner.checks.check import failed, passed
from runner.checks.context import PADDING, CheckContext, Outcome
from runner.evaluation.forward import device_of, first_non_finite, limits, logit_chunks, logit_count, trace

BATCH_SIZES = (1, 4, 16)
# Products of other shapes add up in another order, and a random model amplifies that: to 3e-4 of the logits' size at
# most, and 2e-6 on average, in the golden checkpoints. A mask that is off by one moves the logits by about their
# own size.
MEAN_TOLERANCE = 1e-4
LARGEST_TOLERANCE = 2e-2
# In bfloat16 and float16 a rounding is 2^16 and 2^13 times coarser.
COARSE = {torch.bfloat16: 300.0, torch.float16: 40.0}


def build(context: CheckContext) -> Outcome:
    """The model is built, strictly: every key is used, and nothing of it is left without weights."""
    model = context.model
    empty = sorted(name for name, tensor in model.state_dict(keep_vars=True).items() if tensor.is_meta)
    if empty:
        return failed(f"{len(empty)} parameters have no weights: {', '.join(empty[:5])}")
    count = sum(parameter.numel() for parameter in model.parameters())
    return passed(f"{type(model).__name__} with {count:,} parameters, {str(next(model.parameters()).dtype)[6:]}")


def forward(context: CheckContext) -> Outcome:
    """Logits of the prompts and of a long sequence: one row a token, every value finite (and within a soft cap)."""
    model, sequences = context.model, [*context.prompts(), context.long_ids()]
    expected = logit_count(model)
    extremes = []
    for token_ids in sequences:
        rows, low, high = _logits(model, token_ids)
        if rows != (len(token_ids), expected):
            return failed(f"logits are {list(rows)} for {len(token_ids)} tokens and {expected} entries")
        if not (torch.isfinite(low) and torch.isfinite(high)):
            where = first_non_finite(model, token_ids)
            place = f"from {where[0]} on, first at position {where[1]}" if where else "in the last product"
            return failed(f"logits of {len(token_ids)} tokens are not finite: {place}", "Look at the weights there.")
        extremes += [low.item(), high.item()]
    bounds = context.own_family.traits(context.checkpoint).logit_bounds
    if bounds is not None and not bounds[0] <= min(extremes) <= max(extremes) <= bounds[1]:
        return failed(f"logits from {min(extremes):.4g} to {max(extremes):.4g} leave the soft cap {bounds}")
    longest = max(map(len, sequences))
    return passed(f"{len(sequences)} sequences of up to {longest} tokens: finite logits of {expected} entries")


@torch.inference_mode()
def _logits(model: nn.Module, token_ids: torch.Tensor) -> tuple[tuple[int, int], torch.Tensor, torch.Tensor]:
    """Shape and extremes of the logits of one sequence [T], without holding those of a long one all at once."""
    count, width, lows, highs = 0, 0, [], []
    for part in logit_chunks(model, trace(model, token_ids, frozenset()).final):
        low, high = part.float().aminmax()
        lows.append(low)
        highs.append(high)
        count, width = count + part.shape[0], part.shape[1]
    return (count, width), torch.stack(lows).amin(), torch.stack(highs).amax()


def batch(context: CheckContext) -> Outcome:
    """Batches of 1, 4 and 16 sequences, padded on the right, give each sequence the logits that it has alone."""
    model, traits = context.model, context.own_family.traits(context.checkpoint)
    sequences = context.ragged(max(BATCH_SIZES))
    alone = [_run(model, ids[None]) for ids in sequences]
    coarse = COARSE.get(next(model.parameters()).dtype, 1.0)
    worst, ties = 0.0, 0
    means: list[float] = []
    for size in BATCH_SIZES:
        chosen = range(0, len(sequences), len(sequences) // size)
        rows = [sequences[i] for i in chosen]
        together = _run(model, *right_padded(rows, filler=limits(model)[0] - 1))
        for row, (ids, own) in enumerate(zip(rows, (alone[i] for i in chosen), strict=True)):
            length = traits.comparable(model, own, together, row, len(ids))
            ties += length < len(ids)
            largest, mean = _relative_difference(own.logits[0, :length], together.logits[row, :length])
            if not (largest <= LARGEST_TOLERANCE * coarse and mean <= MEAN_TOLERANCE * coarse):
                return failed(
                    f"in a padded batch of {size}, a sequence of {len(ids)} tokens has other logits than alone: "
                    f"mean difference {mean:.3g}, largest {largest:.3g} of their size",
                    "Look at the attention mask and the positions of padded batches.",
                )
            worst = max(worst, largest)
            means.append(mean)
    average = sum(means) / len(means)
    said = f"; in {ties} a token stands between experts: compared up to there" if ties else ""
    return passed(
        f"sizes {', '.join(map(str, BATCH_SIZES))}: mean difference {average:.2g} of the logits' size, "
        f"largest {worst:.2g}{said}",
        mean_relative_difference=average,
        max_relative_difference=worst,
    )


@torch.inference_mode()
def _run(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None = None) -> Any:
    where = device_of(model)
    return model(ids.to(where), attention_mask=None if mask is None else mask.to(where))


def _relative_difference(expected: torch.Tensor, found: torch.Tensor) -> tuple[float, float]:
    """The largest and the mean difference of logits [t, V], in units of their root mean square; 0 for no logits."""
    if not len(expected):
        return 0.0, 0.0
    # A head that is still zero gives logits of no size.
    size = expected.float().square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    difference = (found.float() - expected.float()).abs() / size
    return difference.max().item(), difference.mean().item()


def right_padded(sequences: list[torch.Tensor], filler: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask [B, T] of sequences [t], with positions of the token `filler` after each, the longest too."""
    width = max(map(len, sequences)) + PADDING
    ids = torch.full((len(sequences), width), filler)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = sequence
        mask[row, : len(sequence)] = 1
    return ids, mask
