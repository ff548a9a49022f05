"""What a GPT must keep when it is converted: the function that its weights compute."""

import torch

from runner.checkpoints.detect import open_checkpoint
from runner.checkpoints.gpt_provenance import provenance
from runner.checks.check import Outcome, failed, passed
from runner.checks.context import Bench
from runner.checks.inputs import prompts
from runner.checks.saving import gpt_tensors
from runner.evaluation.build import build
from runner.evaluation.forward import device_of
from runner.families.gpt import save as gpt_save
from runner.files.staging import staged


@torch.inference_mode()
def convert(bench: Bench) -> Outcome:
    """Written as safetensors, read, written as .pt and read again, it gives the same logits and the same provenance."""
    original = checkpoint = bench.checkpoint
    tensors = gpt_tensors(checkpoint, bench.model)
    for number, weights_file in enumerate(reversed(gpt_save.WEIGHT_FILES)):
        target = bench.scratch / f"converted-{number}"
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
    copy = build(checkpoint, None, **bench.options)
    for token_ids in prompts(bench):
        ids = token_ids.to(device_of(copy))[None]
        expected, found = bench.model(ids).logits, copy(ids).logits
        if not torch.equal(expected, found):
            largest = (expected - found).abs().max().item()
            return failed(f"converted there and back it gives other logits: by up to {largest:.3g}")
    return passed("to safetensors and back to .pt: bit-equal logits, the same provenance")
