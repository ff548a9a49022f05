"""The tensors of modded-nanogpt's two dialects: their names, and sizes from their shapes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from runner.checkpoints.reading import Parts
from runner.files.tensors import TensorInfo

if TYPE_CHECKING:
    import torch

Dialect = Literal["small", "medium"]
Shape = tuple[int, ...]

HEAD_SIZE = 128
VOCABULARY_MULTIPLE = 128
BLOCK_WITHOUT_ATTENTION = 7
SMALLEST_DEPTH = 6  # three blocks at each end have value embeddings
MEDIUM_DEPTH = 16  # its skip connections are defined for this depth alone
MEDIUM_SKIPS = (2, 4, 6)
EMBEDDING = "embed.weight"
VALUE_EMBEDDINGS = tuple(f"value_embeds.{i}.weight" for i in range(3))
HEAD: Mapping[Dialect, str] = {"small": "lm_head.weight", "medium": "lm_head_w"}
SCALARS = "scalars"

_BLOCK = re.compile(r"blocks\.(0|[1-9][0-9]{0,4})\..+", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class GptDetails:
    """Sizes: `vocab_size` rows of each embedding (padding included), `head_rows` logits, `num_scalars` stored scalars
    of which the first `used_scalars` are read. `keys`: the names of all tensors."""

    dialect: Dialect
    vocab_size: int
    head_rows: int
    num_layers: int
    num_heads: int
    model_dim: int
    num_scalars: int
    keys: tuple[str, ...]

    @property
    def used_scalars(self) -> int:
        """Five to a block; the rest is padding to a multiple of the number of training processes."""
        return 5 * self.num_layers

    @property
    def smallest_vocab_size(self) -> int:
        """The fewest tokens that are padded to these rows; the tokenizer's own number is not in a checkpoint."""
        padding = 0 if self.vocab_size % VOCABULARY_MULTIPLE else VOCABULARY_MULTIPLE - 1
        return self.vocab_size - padding

    def scalar_groups(self) -> dict[str, list[int]]:
        """What the used scalars are → their indices: weights of skips, of x and x0, and of v and its embedding."""
        depth = self.num_layers
        return {
            "skip": list(MEDIUM_SKIPS if self.dialect == "medium" else range(depth // 2)),
            "lambda_x": list(range(depth, 3 * depth, 2)),
            "lambda_x0": list(range(depth + 1, 3 * depth, 2)),
            "lambda_v": list(range(3 * depth, 5 * depth, 2)),
            "lambda_ve": list(range(3 * depth + 1, 5 * depth, 2)),
        }


def padded(count: int) -> int:
    """`count` rounded up to the multiple to which these models pad their vocabulary."""
    return -(-count // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def component(name: str) -> str:
    """The part of the model that a tensor belongs to."""
    if name.startswith("blocks."):
        return {"attn": "attention", "mlp": "mlp"}[name.split(".")[2]]
    return {EMBEDDING: "embedding", SCALARS: "scalars"}.get(
        name, "value_embeddings" if name in VALUE_EMBEDDINGS else "head"
    )


def read_details(
    infos: Mapping[str, TensorInfo], dialect: Dialect, where: Path, parts: Parts, foreign: Iterable[str] = ()
) -> GptDetails | None:
    """The sizes that names and shapes describe; `foreign` are entries of the state dict that are no tensors.

    Every name is used exactly once. None, and problems of `blocks`, `keys` and `shapes`, with all missing and
    unexpected names, or with all shapes that contradict each other or the architecture.
    """
    blocks = {int(match[1]) for name in infos if (match := _BLOCK.fullmatch(name))}
    depth = min(1 + max(blocks), sum(map(bool, map(_BLOCK.fullmatch, infos)))) if blocks else 0
    expected = (*_shapes(dialect, depth, 0, 0), HEAD[dialect], SCALARS)
    missing, unexpected = sorted(set(expected) - set(infos)), sorted({*infos, *foreign} - set(expected))
    if missing or unexpected:
        parts.refuse("keys", f"{where}: missing keys {missing}, unexpected keys {unexpected}")
    _check_blocks(infos, blocks, depth, dialect, where, parts)
    if missing or unexpected:
        return None
    parts.is_sound("keys", f"{len(infos)} keys")
    if not_floating := sorted(name for name in infos if not infos[name].is_floating):
        parts.refuse("shapes", f"{where}: {', '.join(not_floating)}: weights must be floating-point")
    embedding = infos[EMBEDDING].shape
    if len(embedding) != 2 or not all(embedding) or embedding[1] % HEAD_SIZE:
        text = f"{EMBEDDING} is {list(embedding)}, it must be [vocabulary, a multiple of {HEAD_SIZE}]"
        parts.refuse("shapes", f"{where}: {text}")
        return None
    if wrong := _wrong_shapes(infos, dialect, depth):
        parts.refuse("shapes", f"{where}: shapes contradict {EMBEDDING} {list(embedding)}: {'; '.join(wrong)}")
        return None
    heads = embedding[1] // HEAD_SIZE
    parts.is_sound("shapes", f"width {embedding[1]}, {heads} heads, vocabulary {embedding[0]}")
    return GptDetails(
        dialect=dialect,
        vocab_size=embedding[0],
        head_rows=infos[HEAD[dialect]].shape[0],
        num_layers=depth,
        num_heads=heads,
        model_dim=embedding[1],
        num_scalars=infos[SCALARS].shape[0],
        keys=expected,
    )


def details_of(tensors: Mapping[str, torch.Tensor], dialect: Dialect, where: Path) -> GptDetails:
    """The sizes of tensors that are to be written to `where`. Raises CheckpointError as the reading of them would."""
    parts = Parts()
    details = read_details({name: TensorInfo.of(name, t) for name, t in tensors.items()}, dialect, where, parts)
    parts.raise_refused(where)
    assert details is not None
    return details


def _check_blocks(
    names: Iterable[str], blocks: set[int], depth: int, dialect: Dialect, where: Path, parts: Parts
) -> None:
    """An even number of blocks without a gap, and block 7 without attention."""
    if absent := sorted(set(range(depth)) - blocks):
        text = f"blocks {', '.join(map(str, absent[:8]))} are missing of {depth}"
        parts.refuse("blocks", f"{where}: {text}")
    if depth % 2 or depth < SMALLEST_DEPTH:
        text = f"has {depth} blocks, but this architecture has an even number, at least {SMALLEST_DEPTH}"
        parts.refuse("blocks", f"{where}: {text}")
    elif dialect == "medium" and depth != MEDIUM_DEPTH:
        parts.fail("blocks", f"has {depth} blocks; this architecture has {MEDIUM_DEPTH}")
    if wrong := sorted(name for name in names if name.startswith(f"blocks.{BLOCK_WITHOUT_ATTENTION}.attn.")):
        text = f"block {BLOCK_WITHOUT_ATTENTION} of this architecture has no attention, but there is {', '.join(wrong)}"
        parts.refuse("blocks", f"{where}: {text}")
    parts.is_sound("blocks", f"{depth} blocks, {dialect}")


def _shapes(dialect: Dialect, depth: int, vocabulary: int, d: int) -> dict[str, Shape]:
    """Name → shape of every tensor but the head and the scalars, whose sizes the others do not fix."""
    attention: dict[str, Shape]
    if dialect == "small":
        attention = {"attn.qkv_w": (3, d, d), "attn.c_proj.weight": (d, d)}
        mlp = {"mlp.c_fc.weight": (4 * d, d), "mlp.c_proj.weight": (d, 4 * d)}
    else:
        attention = {"attn.qkvo_w": (4, d, d)}
        mlp = {"mlp.fc_w": (4 * d, d), "mlp.proj_w": (d, 4 * d)}
    return dict.fromkeys((EMBEDDING, *VALUE_EMBEDDINGS), (vocabulary, d)) | {
        f"blocks.{i}.{name}": shape
        for i in range(depth)
        for name, shape in (mlp if i == BLOCK_WITHOUT_ATTENTION else attention | mlp).items()
    }


def all_shapes(dialect: Dialect, depth: int, *, vocabulary: int, d: int) -> dict[str, Shape]:
    """Name → shape of every tensor, the head and the scalars without padding."""
    return {**_shapes(dialect, depth, vocabulary, d), HEAD[dialect]: (vocabulary, d), SCALARS: (5 * depth,)}


def _wrong_shapes(infos: Mapping[str, TensorInfo], dialect: Dialect, depth: int) -> list[str]:
    vocabulary, width = infos[EMBEDDING].shape
    wrong = [
        f"{name} is {list(infos[name].shape)}, not {list(shape)}"
        for name, shape in _shapes(dialect, depth, vocabulary, width).items()
        if infos[name].shape != shape
    ]
    head, scalars = infos[HEAD[dialect]].shape, infos[SCALARS].shape
    rows = sorted({vocabulary, padded(vocabulary)})
    if head not in [(count, width) for count in rows]:
        wrong.append(f"{HEAD[dialect]} is {list(head)}, not [{' or '.join(map(str, rows))}, {width}]")
    needed = 5 * depth
    if len(scalars) != 1 or scalars[0] < needed or (dialect == "medium" and scalars[0] != needed):
        bound = "exactly" if dialect == "medium" else "at least"
        wrong.append(f"{SCALARS} is {list(scalars)}, where {depth} blocks have {bound} {needed}")
    return wrong
