"""The parts of a modded-nanogpt checkpoint (spec/formats.md §3): blocks, names, shapes and scalars, from its header.

What a GPT must keep when it is converted: the function that its weights compute.
"""

import re
from collections.abc import Mapping

import torch

from runner.checkpoints.detect import open_checkpoint
from runner.checks.check import Outcome, failed, passed
from runner.checks.context import Bench
from runner.checks.headers import TensorHeader
from runner.checks.inputs import prompts
from runner.evaluation.forward import device_of
from runner.families.gpt import save as gpt_save
from runner.families.gpt.checkpoint import provenance
from runner.files.staging import staged

HEAD_SIZE = 128
WITHOUT_ATTENTION = 7
SMALLEST_DEPTH = 6
MEDIUM_DEPTH = 16
EMBEDDINGS = ("embed.weight", *(f"value_embeds.{i}.weight" for i in range(3)))
SCALARS = "scalars"
HEAD = {"gpt_small": "lm_head.weight", "gpt_medium": "lm_head_w"}
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


def _dialect(bench: Bench) -> str:
    return "gpt_medium" if bench.look.format == "gpt_medium" else "gpt_small"


def _tensors(bench: Bench) -> Mapping[str, TensorHeader]:
    return bench.weights.tensors


def _depth(tensors: Mapping[str, TensorHeader]) -> int:
    return 1 + max((int(match[1]) for match in map(_BLOCK.fullmatch, tensors) if match), default=-1)


def block_shapes(dialect: str, d: int) -> dict[str, tuple[int, ...]]:
    """Name → shape of a block's tensors in a model of width `d`; block 7 has only those of the MLP."""
    if dialect == "gpt_small":
        return {
            "attn.qkv_w": (3, d, d), "attn.c_proj.weight": (d, d),
            "mlp.c_fc.weight": (4 * d, d), "mlp.c_proj.weight": (d, 4 * d),
        }  # fmt: skip
    return {"attn.qkvo_w": (4, d, d), "mlp.fc_w": (4 * d, d), "mlp.proj_w": (d, 4 * d)}


def blocks(bench: Bench) -> Outcome:
    """An even number of blocks without a gap, and block 7 without attention."""
    tensors, dialect = _tensors(bench), _dialect(bench)
    found = {int(match[1]) for match in map(_BLOCK.fullmatch, tensors) if match}
    depth = _depth(tensors)
    absent = sorted(set(range(min(depth, 10_000))) - found)
    if absent:
        return failed(f"blocks {', '.join(map(str, absent[:8]))} are missing of {depth}", "copy the whole file again")
    if depth % 2 or depth < SMALLEST_DEPTH or (dialect == "gpt_medium" and depth != MEDIUM_DEPTH):
        wanted = str(MEDIUM_DEPTH) if dialect == "gpt_medium" else f"an even number, at least {SMALLEST_DEPTH}"
        return failed(f"has {depth} blocks; this architecture has {wanted}")
    if wrong := sorted(name for name in tensors if name.startswith(f"blocks.{WITHOUT_ATTENTION}.attn.")):
        return failed(
            f"block {WITHOUT_ATTENTION} of this architecture has no attention, but there is {', '.join(wrong)}"
        )
    return passed(f"{depth} blocks, {dialect.removeprefix('gpt_')}")


def keys(bench: Bench) -> Outcome:
    """Every tensor of the architecture, and nothing else."""
    tensors, dialect = _tensors(bench), _dialect(bench)
    wanted = {*EMBEDDINGS, HEAD[dialect], SCALARS} | {
        f"blocks.{i}.{name}"
        for i in range(_depth(tensors))
        for name in block_shapes(dialect, 0)
        if i != WITHOUT_ATTENTION or not name.startswith("attn.")
    }
    inside = [name.removeprefix("model.") for name in bench.weights.extras if name.startswith("model.")]
    missing, unknown = sorted(wanted - set(tensors)), sorted({*tensors, *inside} - wanted)
    if missing or unknown:
        return failed(f"missing keys {missing[:6]}, unexpected keys {unknown[:6]}", "save the state dict again")
    return passed(f"{len(tensors)} keys" + (f", prefix {bench.weights.prefix}" if bench.weights.prefix else ""))


def shapes(bench: Bench) -> Outcome:
    """Widths, heads and the MLP fit the embedding; the scalars are five to a block."""
    tensors, dialect = _tensors(bench), _dialect(bench)
    depth, embedding = _depth(tensors), tensors[EMBEDDINGS[0]].shape
    if len(embedding) != 2 or not all(embedding) or embedding[1] % HEAD_SIZE:
        return failed(f"embed.weight is {list(embedding)}, it must be [vocabulary, a multiple of {HEAD_SIZE}]")
    rows, d = embedding
    wanted = dict.fromkeys(EMBEDDINGS, embedding) | {
        f"blocks.{i}.{name}": shape for i in range(depth) for name, shape in block_shapes(dialect, d).items()
    }
    problems = [
        f"{name} is {list(tensors[name].shape)}, not {list(shape)}"
        for name, shape in wanted.items()
        if name in tensors and tensors[name].shape != shape
    ]
    head = tensors[HEAD[dialect]].shape
    padded = -(-rows // HEAD_SIZE) * HEAD_SIZE
    if head not in ((rows, d), (padded, d)):
        problems.append(f"{HEAD[dialect]} is {list(head)}, not [{rows}, {d}]")
    scalars = tensors[SCALARS].shape
    if len(scalars) != 1 or scalars[0] < 5 * depth or (dialect == "gpt_medium" and scalars[0] != 5 * depth):
        problems.append(f"scalars is {list(scalars)}, where {depth} blocks have {5 * depth}")
    problems += [f"{name} is {tensor.dtype}" for name, tensor in tensors.items() if not tensor.is_floating]
    if problems:
        return failed(f"shapes contradict embed.weight {list(embedding)}: {'; '.join(problems[:4])}")
    return passed(f"width {d}, {d // HEAD_SIZE} heads, vocabulary {rows}")


@torch.inference_mode()
def convert(bench: Bench) -> Outcome:
    """Written as safetensors, read, written as .pt and read again, it gives the same logits and the same provenance."""
    original = checkpoint = bench.checkpoint
    tensors = gpt_save.model_tensors(checkpoint, bench.model)
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
    copy = bench.own_family.build(checkpoint, None, bench.placement)
    for token_ids in prompts(bench):
        ids = token_ids.to(device_of(copy))[None]
        expected, found = bench.model(ids).logits, copy(ids).logits
        if not torch.equal(expected, found):
            largest = (expected - found).abs().max().item()
            return failed(f"converted there and back it gives other logits: by up to {largest:.3g}")
    return passed("to safetensors and back to .pt: bit-equal logits, the same provenance")
