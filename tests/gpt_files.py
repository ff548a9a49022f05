"""Tiny random GPTs of both dialects, named and shaped as the training scripts save them."""

from pathlib import Path
from typing import Any

import torch

from runner.checkpoints.checkpoint import Checkpoint, Listing
from runner.families.gpt import model as gpt
from runner.families.gpt.checkpoint import FORMATS
from runner.families.gpt.layouts import shapes_of
from runner.families.gpt.pieces import COEFFICIENT, GptConfig
from runner.families.gpt.records import LARGE, MEDIUM, RECORDS, SMALL

RECORD_OF = {"small": RECORDS[SMALL], "medium": RECORDS[MEDIUM]}
# What a script says of its heads: in these, 128 is the size of one.
CODE = "model = GPT(head_dim=128)\n"
DEPTHS = {"small": 8, "medium": 16}
HEAD_SIZES = {"gated": 4}
BY_NAME = {each.name: each for each in FORMATS}


def random_state(
    dialect: str, *, layers: int | None = None, width: int = 128, vocab: int = 24, head_rows: int | None = None,
    scalar_padding: int = 0, seed: int = 0,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """A state dict whose every part moves the logits."""
    generator = torch.Generator().manual_seed(seed)
    layers = layers or DEPTHS[dialect]

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    small = dialect == "small"
    state = {"embed.weight": weight(vocab, width) * width**0.5}
    state |= {f"value_embeds.{i}.weight": weight(vocab, width) * width**0.5 for i in range(3)}
    for i in range(layers):
        if i != 7:
            state[f"blocks.{i}.attn." + ("qkv_w" if small else "qkvo_w")] = weight(3 if small else 4, width, width)
            if small:
                state[f"blocks.{i}.attn.c_proj.weight"] = weight(width, width)
        state[f"blocks.{i}.mlp." + ("c_fc.weight" if small else "fc_w")] = weight(4 * width, width)
        state[f"blocks.{i}.mlp." + ("c_proj.weight" if small else "proj_w")] = weight(width, 4 * width)
    scale = 20.0 if small else 8.0
    state["lm_head.weight" if small else "lm_head_w"] = weight(head_rows or vocab, width) * scale
    state["scalars"] = torch.rand(5 * layers + scalar_padding, generator=generator) + 0.3
    return state


def script_file(path: Path, state: dict[str, torch.Tensor], *, prefix: str = "_orig_mod.", **entries: Any) -> Path:
    """`state` as the training script saves it."""
    content = {"step": 300, "code": CODE, "model": {prefix + name: t for name, t in state.items()}}
    torch.save(content | {"optimizers": [], "val_loss": 3.25} | entries, path)
    return path


def opened(path: Path, dialect: str) -> Checkpoint:
    return BY_NAME[f"gpt_{dialect}"].open(Listing.of(path))


def built(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> gpt.GptForCausalLM:
    details = checkpoint.details
    names = ("record", "vocab_size", "head_rows", "num_layers", "model_dim", "head_dim")
    config = GptConfig(**{name: getattr(details, name) for name in names})
    return gpt.build(config, {name: checkpoint.weights.read(name) for name in details.keys}, dtype)


def model(
    dialect: str, state: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32, head_dim: int = 128
) -> gpt.GptForCausalLM:
    """The model of a state dict, without a file between."""
    head = state["lm_head.weight" if dialect == "small" else "lm_head_w"]
    config = GptConfig(
        record=RECORD_OF[dialect],
        vocab_size=len(state["embed.weight"]),
        head_rows=len(head),
        num_layers=1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
        model_dim=head.shape[1],
        head_dim=head_dim,
    )
    return gpt.build(config, state, dtype)


def record_state(name: str, *, seed: int = 0, vocab: int = 40, heads: int | None = None) -> dict[str, torch.Tensor]:
    """Random tensors of a record, small, each of which moves the logits; heads of 8 (of 4 where there must be six)."""
    record, generator = RECORDS[name], torch.Generator().manual_seed(seed)
    count = heads or {"gated": 6, "dampen": 8}.get(record.mudd or record.gate, 4)
    depth = record.depth or (12 if record.track == "small" else 24 if name == LARGE else 16)
    size = HEAD_SIZES.get(record.mudd, 8)
    shapes = shapes_of(record, depth, vocabulary=vocab, width=count * size, head_dim=size)
    state = {}
    for key, shape in shapes.items():
        tensor = torch.randn(shape, generator=generator) / (shape[-1] if len(shape) > 1 else 4) ** 0.5
        if "embed" in key or "wte" in key or "vte" in key:
            tensor = tensor * 4
        elif "sign_table" in key:
            tensor = tensor.sign()
        elif "inv_freq" in key:
            tensor = 10000.0 ** -(torch.arange(0, size, 2) / size)
        elif COEFFICIENT.search(key):
            tensor = tensor.abs() + 0.3
        elif key.startswith("lm_head"):
            tensor = tensor * 4
        state[key] = tensor
    if record.tied:
        state["lm_head.weight"] = state["transformer.wte.weight"]
    return state


def record_file(
    path: Path, name: str, state: dict[str, torch.Tensor], code: str | None = None, step: int = 5000
) -> Path:
    """`state` as the record's script saves it; its text is left out, as in the goldens."""
    record = RECORDS[name]
    stand_in = f"modded-nanogpt record={name} sha256={'0' * 64} head_dim={HEAD_SIZES.get(record.mudd, 8)} eot=3"
    return script_file(path, state, code=stand_in if code is None else code, step=step)
