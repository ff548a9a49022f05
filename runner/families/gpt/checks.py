"""The checks of modded-nanogpt checkpoints: blocks, names, shapes, and that a conversion keeps what they compute."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from runner.checkpoints.checkpoint import Checkpoint
from runner.checks.check import by_name, check, failed, part_check, passed
from runner.checks.context import CheckContext, Outcome, Traits
from runner.checks.environment import write_zeros
from runner.families.gpt.layouts import shapes_of
from runner.families.gpt.records import MEDIUM, RECORDS, SMALL

CHECKS = by_name(
    part_check("blocks", "as many as the record has, some without attention", "files"),
    part_check("keys", "every tensor, nothing else", "blocks", advice="save the state dict again"),
    part_check("shapes", "widths, heads and scalars fit", "keys"),
    check("convert", "converted there and back", "families.gpt.checks.convert", "roundtrip"),
)
STEP = 1


class GptTraits(Traits):
    """The logits stay within the soft cap of the dialect."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        from runner.families.gpt.pieces import CAPS

        self.logit_bounds = CAPS[checkpoint.details.record.cap][1]


def write_example(record: str, depth: int, root: Path) -> str:
    """The tiny layout of a record."""
    root.mkdir(parents=True)
    write_zeros(root / "model.safetensors", shapes_of(RECORDS[record], depth))
    return "model.safetensors"


EXAMPLES = {
    "gpt_small": partial(write_example, SMALL, 6),
    "gpt_medium": partial(write_example, MEDIUM, 16),
    "gpt_record": partial(write_example, "2026-03-06_SimplifyHC", 11),
}


def build_small(context: CheckContext) -> Path:
    """A small model with random weights, saved as the training script saves one."""
    import torch

    from runner.families.gpt import save as gpt_save
    from runner.families.gpt.checkpoint import Provenance
    from runner.families.gpt.layouts import details_of
    from runner.files.staging import staged

    record = RECORDS[SMALL]
    generator = torch.Generator().manual_seed(context.config.seed)
    shapes = shapes_of(record, 8, vocabulary=256)
    tensors = {name: torch.randn(shape, generator=generator) * shape[-1] ** -0.5 for name, shape in shapes.items()}
    tensors["scalars"] = torch.rand(shapes["scalars"], generator=generator) + 0.3
    target = context.scratch / "built" / f"checkpoint-{STEP}"
    details = details_of(tensors, record, target)
    with staged(target) as partial_directory:
        gpt_save.save(partial_directory, tensors, details, provenance=Provenance(step=STEP))
    return target


def convert(context: CheckContext) -> Outcome:
    """Written as safetensors, read, written as .pt and read again, it gives the same logits and the same provenance."""
    import torch

    from runner.checkpoints.detect import open_checkpoint
    from runner.evaluation.forward import device_of
    from runner.families.gpt import save as gpt_save
    from runner.families.gpt.checkpoint import provenance
    from runner.files.staging import staged

    original = checkpoint = context.checkpoint
    tensors = gpt_save.model_tensors(checkpoint, context.model)
    for number, weights_file in enumerate(reversed(gpt_save.WEIGHT_FILES)):
        target = context.scratch / f"converted-{number}"
        with staged(target) as partial:
            gpt_save.save(
                partial,
                tensors,
                checkpoint.details,
                provenance=provenance(checkpoint.weights),
                weights_file=weights_file,
            )
        checkpoint = open_checkpoint(target, original.format)
        tensors = {name: checkpoint.weights.read(name) for name in checkpoint.details.keys}
    if provenance(checkpoint.weights) != provenance(original.weights):
        return failed("step, loss or script of the checkpoint are lost when it is converted there and back")
    copy = context.own_family.build(checkpoint, None, context.placement)
    for token_ids in context.prompts():
        ids = token_ids.to(device_of(copy))[None]
        with torch.inference_mode():
            expected, found = context.model(ids).logits, copy(ids).logits
        if not torch.equal(expected, found):
            largest = (expected - found).abs().max().item()
            return failed(f"converted there and back it gives other logits: by up to {largest:.3g}")
    return passed("to safetensors and back to .pt: bit-equal logits, the same provenance")
