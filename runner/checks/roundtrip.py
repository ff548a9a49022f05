"""A checkpoint that is loaded, saved again and loaded once more must be the same model."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from runner.checkpoints.checkpoint import Checkpoint
from runner.checkpoints.detect import open_checkpoint
from runner.checks.check import failed, passed, skipped
from runner.checks.context import WARNING, CheckContext, Outcome
from runner.evaluation.forward import device_of

# The largest difference of a logit that counts as the same; nothing but equal bits is expected.
TOLERANCE = 1e-5


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
    if not largest <= TOLERANCE:
        return failed(
            f"the reloaded model gives other logits: {said}, allowed {TOLERANCE:g}",
            "Compare the tensors of the copy with the original's: task=diff.",
            **figures,
        )
    if not figures["bit_equal"]:
        return Outcome(status=WARNING, details=f"{said}: within {TOLERANCE:g}, but not bit-equal", data=figures)
    return passed(f"{len(sequences)} sequences: bit-equal logits", **figures)


@torch.inference_mode()
def _compare(model: nn.Module, reloaded: nn.Module, token_ids: torch.Tensor) -> dict[str, Any]:
    """The largest and the mean difference of the logits of one sequence [T]; inf where a logit is not finite."""
    ids = token_ids.to(device_of(model))[None]
    ours, theirs = model(ids).logits, reloaded(ids).logits
    difference = (ours.float() - theirs.float()).abs().nan_to_num(nan=float("inf"))
    return {"max": difference.max().item(), "mean": difference.mean().item(), "equal": torch.equal(ours, theirs)}
