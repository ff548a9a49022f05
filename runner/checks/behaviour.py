"""What every model must do: be built from all of its keys, give finite logits, not mind company or padding, and be the
same after it was saved and loaded again; and what training must reach and leave alone: gradients and one step."""

import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from runner.checkpoints.checkpoint import Checkpoint
from runner.checkpoints.detect import open_checkpoint
from runner.checkpoints.reading import some
from runner.checks.check import failed, passed, skipped
from runner.checks.context import MODEL, PADDING, WARNING, CheckContext, Outcome
from runner.evaluation.forward import device_of, first_non_finite, limits, logit_chunks, logit_count, trace
from runner.files.tensors import is_finite

BATCH_SIZES = (1, 4, 16)
# Products of other shapes add up in another order, and a random model amplifies that: to 3e-4 of the logits' size at
# most, and 2e-6 on average, in the golden checkpoints. A mask that is off by one moves the logits by about their
# own size.
MEAN_TOLERANCE = 1e-4
LARGEST_TOLERANCE = 2e-2
# In bfloat16 and float16 a rounding is 2^16 and 2^13 times coarser.
COARSE = {torch.bfloat16: 300.0, torch.float16: 40.0}
# The largest difference of a logit that counts as the same after a reload; nothing but equal bits is expected.
ROUNDTRIP_TOLERANCE = 1e-5
# By how much of its largest value a step moves a parameter: visible in every precision, whatever the gradient's scale.
STEP_SIZE = 1e-2


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
    ids = pad(pad_sequence(sequences, batch_first=True, padding_value=filler), (0, PADDING), value=filler)
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).to(ids.dtype)


def save(context: CheckContext) -> Outcome:
    """The loaded model is saved again; the copy has the same format, layers, names and shapes."""
    checkpoint = context.checkpoint
    if not context.own_family.can_save(checkpoint):
        return skipped(f"{checkpoint.format} checkpoints are read, never written")
    copy = open_checkpoint(context.saved, checkpoint.format, context.config.format.module)
    if difference := _difference(checkpoint, copy):
        return failed(f"what was saved is not what was loaded: {difference}", "Look at the writer of this format.")
    files = [file for file in context.saved.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    return passed(f"{len(copy.weights.infos)} tensors in {len(files)} files, {size:,} bytes", bytes=size)


def _difference(original: Checkpoint, copy: Checkpoint) -> str | None:
    """How the names and shapes of two checkpoints differ; None where they say the same."""
    if missing := sorted((*copy.missing, *copy.unknown)):
        return f"missing or unknown keys {missing}"
    ours, theirs = _shapes(original), _shapes(copy)
    wrong = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if not wrong:
        return None
    shown = ", ".join(
        f"{name} {list(ours.get(name, ())) or 'absent'} became {list(theirs.get(name, ())) or 'absent'}"
        for name in wrong[:4]
    )
    return f"{shown}{', …' if len(wrong) > 4 else ''}"


def _shapes(checkpoint: Checkpoint) -> Mapping[str, tuple[int, ...]]:
    """The shape of each tensor; those of NPT layers by what they are, since they have two spellings."""
    infos = checkpoint.weights.infos
    spelled = {
        name: f"layer {layer.layer} {projection} {matrix} {rank}"
        for layer in checkpoint.layers
        for projection, matrices in layer.keys.items()
        for matrix, names in matrices.items()
        for rank, name in enumerate(names)
    }
    return {spelled.get(name, name): info.shape for name, info in infos.items()}


def roundtrip(context: CheckContext) -> Outcome:
    """The saved copy in a model of its own gives the same logits: equal bits, at most 1e-5 apart."""
    sequences = [*context.prompts(), context.ragged(1)[0]]
    compared = [_compare(context.model, context.reloaded, ids) for ids in sequences]
    if context.own is None:
        context.free("reloaded")  # complete by itself, so as large as the model
    largest = max(each["max"] for each in compared)
    figures: dict[str, Any] = {
        "max_difference": largest,
        "mean_difference": sum(each["mean"] for each in compared) / len(compared),
        "bit_equal": all(each["equal"] for each in compared),
    }
    said = f"{len(sequences)} sequences: largest difference {largest:.3g}, mean {figures['mean_difference']:.3g}"
    if not largest <= ROUNDTRIP_TOLERANCE:
        return failed(
            f"the reloaded model gives other logits: {said}, allowed {ROUNDTRIP_TOLERANCE:g}",
            "Compare the tensors of the copy with the original's: task=diff.",
            **figures,
        )
    if not figures["bit_equal"]:
        return Outcome(
            status=WARNING, details=f"{said}: within {ROUNDTRIP_TOLERANCE:g}, but not bit-equal", data=figures
        )
    return passed(f"{len(sequences)} sequences: bit-equal logits", **figures)


def _compare(model: nn.Module, reloaded: nn.Module, token_ids: torch.Tensor) -> dict[str, Any]:
    """The largest and the mean difference of the logits of one sequence [T]; inf where a logit is not finite."""
    ours, theirs = (_run(each, token_ids[None]).logits for each in (model, reloaded))
    difference = (ours.float() - theirs.float()).abs().nan_to_num(nan=float("inf"))
    return {"max": difference.max().item(), "mean": difference.mean().item(), "equal": torch.equal(ours, theirs)}


def trained(context: CheckContext) -> dict[str, nn.Parameter]:
    """The parameters of the model that training changes."""
    traits = context.own_family.traits(context.checkpoint)
    return {name: parameter for name, parameter in context.model.named_parameters() if traits.is_trained(name)}


def gradients(context: CheckContext) -> Outcome:
    """A fine-tuning loss has a finite gradient for every parameter that should train, and for no other."""
    context.free("reloaded")
    model = context.model
    wanted = trained(context)
    with _training(model, wanted):
        _loss(context, model).backward()
        reached = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        missing = sorted(wanted.keys() - reached.keys())
        stray = sorted(reached.keys() - wanted.keys())
        broken = sorted(name for name, gradient in reached.items() if not is_finite(gradient))
        zero = [name for name in wanted if name in reached and not bool(reached[name].any())]
    traits = context.own_family.traits(context.checkpoint)
    unexplained = sorted(name for name in zero if not traits.may_be_zero(name, wanted))
    problems = [
        f"{what}: {some(names, 4, ', ')}"
        for what, names in (
            ("no gradient reaches", missing),
            ("a gradient reaches what should not train", stray),
            ("the gradient is not finite", broken),
            ("the gradient is zero everywhere", unexplained),
        )
        if names
    ]
    if problems:
        return failed("; ".join(problems), "Look at requires_grad, detach and no_grad in the model.")
    said = f" ({len(zero)} zero for now: what they are multiplied with is zero)" if zero else ""
    others = sum(1 for _ in model.parameters()) - len(wanted)
    return passed(f"{len(wanted)} parameters have a gradient{said}, {others} others none")


def optimizer_step(context: CheckContext) -> Outcome:
    """One optimizer step changes every parameter that has a gradient, and not a bit of anything else."""
    model = context.model
    wanted = trained(context)
    before = _digests(model)
    kept: list[tuple[nn.Parameter, torch.Tensor]] = []
    try:
        with _training(model, wanted):
            _loss(context, model).backward()
            moving = {name for name, p in wanted.items() if p.grad is not None and bool(p.grad.any())}
            stepped = [p for p in model.parameters() if p.grad is not None]
            kept += [(p, p.detach().clone()) for p in stepped] if context.own else []
            for parameter in stepped:
                _scale(parameter)
            # Plain SGD: moments would take twice the memory of the weights.
            torch.optim.SGD(stepped, lr=STEP_SIZE, foreach=False).step()
        changed = {name for name, digest in _digests(model).items() if before[name] != digest}
    finally:
        # The base is shared with whoever comes next, and what was stepped may lie in its memory.
        with torch.no_grad():
            for parameter, values in kept:
                parameter.copy_(values)
        if not context.own:
            context.free(*MODEL)  # a model may lie in the mapped file, and a step in its private copy
    if stray := sorted(changed - wanted.keys()):
        return failed(f"a step also changes {', '.join(stray[:4])}", "Look for tensors that share memory.")
    if not moving:
        return failed(
            "every gradient is zero, so no step can change anything: the factors that multiply each other are all zero",
            "start the training again: one factor of each product must begin with other values than zero",
        )
    if moving - changed:
        return failed(f"a step leaves {', '.join(sorted(moving - changed)[:4])} as it was")
    return passed(f"changes {len(changed)} parameters; {len(before) - len(changed)} other tensors keep every bit")


@contextmanager
def _training(model: nn.Module, wanted: dict[str, nn.Parameter]) -> Iterator[None]:
    """Within the block the model is in training mode and `wanted` require gradients; afterwards all is as before."""
    was_training, required = model.training, {name: p.requires_grad for name, p in wanted.items()}
    model.train()
    for parameter in wanted.values():
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        model.train(was_training)
        for parameter in model.parameters():
            parameter.grad = None
        for name, parameter in wanted.items():
            parameter.requires_grad_(required[name])


def _scale(parameter: nn.Parameter) -> None:
    """Make the gradient's largest value that of the parameter; zero stays zero.

    In place of a learning rate each: an optimizer looks through all of its groups for each one that is added.
    """
    assert parameter.grad is not None
    largest, slope = (each.detach().abs().max().item() for each in (parameter, parameter.grad))
    if slope:
        parameter.grad.div_(slope).mul_(max(largest, 1e-3))


def _loss(context: CheckContext, model: nn.Module) -> torch.Tensor:
    """The loss of a padded batch."""
    sequences = [*context.prompts(), context.ragged(1)[0]]
    ids, mask = (each.to(device_of(model)) for each in right_padded(sequences, filler=0))
    return context.own_family.traits(context.checkpoint).loss(model(ids, attention_mask=mask), ids, mask)


def _digests(model: nn.Module) -> dict[str, int]:
    """A checksum of the bytes of every parameter and buffer."""
    return {name: _crc32(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def _crc32(tensor: torch.Tensor) -> int:
    values: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return zlib.crc32(values)
