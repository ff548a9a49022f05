"""Which record a state dict has the tensors of, and every size, from names and shapes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from runner.checkpoints.reading import Parts
from runner.families.gpt.records import RECORDS, Record, layers_with_values, undefined_depth
from runner.files.tensors import TensorInfo

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]

HEAD_SIZE = 128  # in every record's script, and in no tensor of most
VOCABULARY_MULTIPLE = 128
PROCESSES = (1, 2, 3, 4, 5, 6, 7, 8, 16, 32, 64)  # that scalars are padded for
ALIKE = 2 / 3  # the share of names that a damaged state dict has in common with its record

_SIZE = re.compile(r"(>?)(\d*)([Ln]?)(hd|V|W|d|H|P|R|S|T|m|)(?:/(\d+))?(?:\+(\d+))?")
_BLOCK = re.compile(r"(?:transformer\.h|blocks)\.(0|[1-9][0-9]{0,4})\..+", re.DOTALL)
_PLACE = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, kw_only=True)
class GptDetails:
    """Sizes of a state dict: `vocab_size` rows of each embedding (padding included), `head_rows` logits.

    `keys`: the names of all tensors. `num_scalars`: how many `scalars` are stored; the first of them are read, as
    `Record.scalars` says, and the rest is padding to a multiple of the number of training processes. `head_dim_from`:
    what says the size of a head: script, tensors, or nothing.

    What the tensors do not say: `found_by`, how the record was found; `yarn`, the windows that training went through;
    `before_split`: whether the head's rows are still the embedding; `end_of_text`: the token a document starts with,
    `end_is_known` unless it is taken for the last one of a vocabulary of its own.
    """

    record: Record
    vocab_size: int
    head_rows: int
    num_layers: int
    model_dim: int
    head_dim: int = HEAD_SIZE
    num_scalars: int = 0
    keys: tuple[str, ...]
    head_dim_from: str = "nothing"
    found_by: str = "keys"
    yarn: tuple[int, ...] = ()
    before_split: bool = False
    end_of_text: int | None = None
    end_is_known: bool = False

    @property
    def num_heads(self) -> int:
        """Heads of attention."""
        return self.model_dim // self.head_dim

    @property
    def used_scalars(self) -> int:
        """Those that are read."""
        return sum(self.scalar_counts().values())

    @property
    def smallest_vocab_size(self) -> int:
        """The fewest tokens that are padded to these rows; the tokenizer's own number is not in a checkpoint."""
        padding = 0 if self.vocab_size % VOCABULARY_MULTIPLE else VOCABULARY_MULTIPLE - 1
        return self.vocab_size - padding

    def scalar_counts(self) -> dict[str, int]:
        """What `scalars` holds, in order → how many."""
        return {what: _known(count, {"L": self.num_layers}) or 0 for what, count in self.record.scalars}


def padded(count: int) -> int:
    """`count` rounded up to the multiple to which these models pad their vocabulary."""
    return -(-count // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def component(name: str) -> str:
    """The part of the model that a tensor belongs to."""
    top, *rest = name.split(".")
    if top in ("blocks", "transformer") and len(rest) > 2:
        part = rest[2] if top == "transformer" else rest[1]
        return {"attn": "attention", "mlp": "mlp"}.get(part, "scalars")
    parts = {
        "value_embeds": "value_embeddings", "lm_head": "head", "lm_head_w": "head", "attn_bank": "attention",
        "qk_bank": "attention", "vo_bank": "attention", "mlp_bank": "mlp", "bigram_embed": "bigrams",
        "bigram_sign_table": "bigrams", "smear_gate": "gates", "skip_gate": "gates", "skip_gates": "gates",
        "attn_gate_bank": "gates", "ve_gate_bank": "gates", "xsa_alphas": "gates",
    }  # fmt: skip
    if top.startswith(("mudd", "dense", "_mudd")):
        return "mudd"
    if name.endswith("vte.weight"):
        return "value_embeddings"
    return parts.get(top, "embedding" if top.startswith(("embed", "transformer")) else "scalars")


def depth_of(names: Iterable[str], record: Record) -> int:
    """How many blocks the names show; the record's own number where none of its tensors has a block's number."""
    blocks = {int(match[1]) for name in names if (match := _BLOCK.fullmatch(name))}
    if not blocks:
        return record.depth or 0
    return min(1 + max(blocks), sum(1 for name in names if _BLOCK.fullmatch(name)))


def expanded(record: Record, depth: int) -> Mapping[str, str]:
    """Name → shape, in sizes, of every tensor of the record with `depth` blocks."""
    return _expanded(record.name, depth)


@lru_cache(maxsize=512)
def _expanded(name: str, depth: int) -> Mapping[str, str]:
    record = RECORDS[name]
    values = layers_with_values(record, depth)
    attention = [i for i in range(depth) if i not in record.no_attention]
    numbers: dict[str, Sequence[int]] = {
        "block": range(depth),
        "attention": attention,
        "mlp": [i for i in range(depth) if i not in record.no_mlp],
        "gated": sorted(values),
        "value": sorted(set(values.values())),
        "skip": range(3),
    }
    found = {}
    for key, shape in record.keys.items():
        place = _PLACE.search(key)
        if place is None:
            found[key] = shape
        else:
            found |= {key.replace(place[0], str(i)): shape for i in numbers[place[1]]}
    return found


def _known(size: str, sizes: Mapping[str, int]) -> int | None:
    """The number that a size of a shape stands for; None where it is not known."""
    match = _SIZE.fullmatch(size)
    assert match is not None, size
    _, factor, layers, symbol, divisor, more = match.groups()
    if symbol and symbol not in sizes:
        return None
    depth = {"": 1, "L": sizes.get("L", 0), "n": sizes.get("L", 0) // 2}[layers]
    known = int(factor or 1) * depth * (sizes[symbol] if symbol else 1) // int(divisor or 1)
    return known + int(more or 0)


def _solve(size: str, found: int, sizes: dict[str, int]) -> None:
    """Learn the size that `found` gives, where it can be one."""
    match = _SIZE.fullmatch(size)
    assert match is not None, size
    _, factor, layers, symbol, divisor, _ = match.groups()
    if symbol and symbol not in sizes and not layers:
        whole, rest = divmod(found * int(divisor or 1), int(factor or 1))
        if whole > 0 and not rest:
            sizes[symbol] = whole


def solved(record: Record, depth: int, shapes: Mapping[str, Sequence[int]], sizes: dict[str, int]) -> list[str]:
    """What contradicts the record's shapes; `sizes` receives what they say. All names are there."""
    names = expanded(record, depth)
    sizes["L"] = depth
    table = shapes[record.table]
    if len(table) != 2 or not all(table):
        return [f"{record.table} is {list(table)}, it must be [vocabulary, width]"]
    wrong = []
    ordered = sorted(names, key=lambda name: name != record.table)
    for name in ordered:
        found, dimensions = shapes[name], names[name].split() if names[name] != "[]" else []
        if len(found) == len(dimensions):
            for size, number in zip(dimensions, found, strict=True):
                _solve(size, number, sizes)
        known = [_known(size, sizes) for size in dimensions]
        if name == "scalars":
            least, exact = known[0] or 0, not dimensions[0].startswith(">")
            if len(found) != 1 or found[0] < least or (exact and found[0] != least):
                bound = "exactly" if exact else "at least"
                wrong.append(f"{name} is {list(found)}, where {depth} blocks have {bound} {least}")
        elif "W" in dimensions:
            wrong += _wrong_head(record, name, dimensions, found, sizes)
        elif list(found) != known:
            wrong.append(f"{name} is {list(found)}, not {shown(dimensions, sizes)}")
    return wrong + _wrong_heads(names, sizes)


def is_padding(record: Record, depth: int, count: int) -> bool:
    """Whether `count` scalars are those that the record reads, padded for some usual number of training processes."""
    used = sum(_known(size, {"L": depth}) or 0 for _, size in record.scalars)
    return count in {-(-used // processes) * processes for processes in PROCESSES}


def _wrong_head(
    record: Record, name: str, dimensions: Sequence[str], found: Sequence[int], sizes: Mapping[str, int]
) -> list[str]:
    """The head has a row for each of the embedding's, or for those padded."""
    rows = {sizes["V"], padded(sizes["V"])}
    rows = {"same": {sizes["V"]}, "padded": {padded(sizes["V"])}}.get(record.head_rows, rows)
    allowed = [[count if size == "W" else sizes["d"] for size in dimensions] for count in sorted(rows)]
    if list(found) in allowed:
        return []
    counts = " or ".join(map(str, sorted(rows)))
    return [
        f"{name} is {list(found)}, not [{', '.join(counts if size == 'W' else str(sizes['d']) for size in dimensions)}]"
    ]


def _wrong_heads(names: Mapping[str, str], sizes: dict[str, int]) -> list[str]:
    """Gates say the number of heads, some tensors their size: both fit the width."""
    if "H" in sizes and "hd" not in sizes:
        if sizes["d"] % sizes["H"]:
            return [f"a width of {sizes['d']} has no {sizes['H']} heads, which its gates have"]
        sizes["hd"] = sizes["d"] // sizes["H"]
    wrong = []
    if "hd" in sizes and sizes["d"] % sizes["hd"]:
        wrong.append(f"a width of {sizes['d']} has no heads of {sizes['hd']}")
    elif "hd" in sizes and "H" in sizes and sizes["hd"] * sizes["H"] != sizes["d"]:
        wrong.append(f"{sizes['H']} heads of {sizes['hd']} are no width of {sizes['d']}")
    # Banks are padded: they hold at least what is read.
    for key, symbol, needed in (("qk_bank", "P", "H"), ("vo_bank", "S", "")):
        if key in names and symbol in sizes and "hd" in sizes:
            heads = sizes["d"] // sizes["hd"] if needed else 2
            least = (sizes["L"] - 1) * heads
            if sizes[symbol] < least:
                wrong.append(f"{key} has {sizes[symbol]} matrices, where at least {least} are read")
    return wrong


def shown(dimensions: Sequence[str], sizes: Mapping[str, int]) -> str:
    """A shape for a message: numbers where they are known."""
    return f"[{', '.join(str(size if (n := _known(size, sizes)) is None else n) for size in dimensions)}]"


def expected_shapes(
    record: Record, depth: int, sizes: Mapping[str, int], given: Mapping[str, Sequence[int]]
) -> dict[str, list[int]]:
    """Name → shape of every tensor of a model with V, W, d, hd, H as `sizes`; what they do not fix is as `given`."""
    names, known = expanded(record, depth), {**sizes, "L": depth}
    found = {}
    for name, text in names.items():
        dimensions = text.split() if text != "[]" else []
        own = given.get(name, [])
        if len(own) == len(dimensions):
            for size, number in zip(dimensions, own, strict=True):
                _solve(size, number, known)
        shape = [_known(size, known) or 0 for size in dimensions]
        if text.startswith(">") and len(own) == 1 and own[0] >= shape[0]:
            shape = list(own)
        found[name] = shape
    return found


def shapes_of(
    record: Record, depth: int, *, vocabulary: int = 16, width: int = HEAD_SIZE, head_dim: int = HEAD_SIZE
) -> dict[str, Shape]:
    """Name → shape of every tensor of a model of these sizes, those that nothing fixes as small as they may be."""
    heads = width // head_dim
    sizes = {
        "V": vocabulary, "L": depth, "d": width, "hd": head_dim, "H": heads, "R": 8, "T": 4, "m": width // 2,
        "W": padded(vocabulary) if record.head_rows == "padded" else vocabulary,
        "P": (depth - 1) * heads, "S": 2 * (depth - 1),
    }  # fmt: skip
    return {
        name: () if shape == "[]" else tuple(_known(size, sizes) or 0 for size in shape.split())
        for name, shape in expanded(record, depth).items()
    }


def key_matches(names: Iterable[str]) -> list[Record]:
    """The records whose tensors have exactly these names."""
    names = set(names)
    found = [(each, depth_of(names, each)) for each in RECORDS.values()]
    return [each for each, depth in found if each.depth in (None, depth) and set(expanded(each, depth)) == names]


def nearest(names: Iterable[str]) -> tuple[Record, float]:
    """The record with whose names these have most in common, and the share of those in common."""
    names = set(names)

    def share(record: Record) -> float:
        expected = set(expanded(record, depth_of(names, record)))
        return len(expected & names) / len(expected | names) if expected else 0.0

    best = max(RECORDS.values(), key=share)
    return best, share(best)


def read_details(
    infos: Mapping[str, TensorInfo],
    record: Record,
    where: Path,
    parts: Parts,
    foreign: Iterable[str] = (),
    head_dim: int | None = None,
) -> GptDetails | None:
    """The sizes that names and shapes describe; `foreign` are entries of the state dict that are no tensors.

    Every name is used exactly once. None, and problems of `blocks`, `keys` and `shapes`, with all missing and
    unexpected names, or with all shapes that contradict each other or the architecture. `head_dim`: as the script says.
    """
    depth = depth_of(infos, record)
    expected = expanded(record, depth)
    missing, unexpected = sorted(set(expected) - set(infos)), sorted({*infos, *foreign} - set(expected))
    if missing or unexpected:
        parts.refuse("keys", f"{where}: missing keys {missing}, unexpected keys {unexpected}")
    _check_blocks(infos, depth, record, where, parts)
    if missing or unexpected:
        return None
    parts.is_sound("keys", f"{len(infos)} keys")
    not_floating = sorted(name for name in infos if not infos[name].is_floating)
    if not_floating:
        parts.refuse("shapes", f"{where}: {', '.join(not_floating)}: weights must be floating-point")
    table, multiple = infos[record.table].shape, head_dim or record.head_size
    sizes: dict[str, int] = {} if head_dim is None else {"hd": head_dim}
    wrong = solved(record, depth, {name: info.shape for name, info in infos.items()}, sizes)
    if len(table) != 2 or not all(table) or table[1] % sizes.get("hd", record.head_size):
        text = f"{record.table} is {list(table)}, it must be [vocabulary, a multiple of {sizes.get('hd', multiple)}]"
        parts.refuse("shapes", f"{where}: {text}")
        return None
    if wrong:
        parts.refuse("shapes", f"{where}: shapes contradict {record.table} {list(table)}: {'; '.join(wrong)}")
        return None
    heads = table[1] // sizes.get("hd", record.head_size)
    parts.is_sound("shapes", f"width {table[1]}, {heads} heads, vocabulary {table[0]}")
    head = next(
        infos[name].shape[0] if record.keys[name][0] in "WV" else infos[name].shape[1]
        for name in ("lm_head.weight", "lm_head_w")
        if name in infos
    )
    return GptDetails(
        record=record,
        vocab_size=table[0],
        head_rows=head,
        num_layers=depth,
        model_dim=table[1],
        head_dim=sizes.get("hd", record.head_size),
        num_scalars=infos["scalars"].shape[0] if "scalars" in infos else 0,
        keys=tuple(infos),
        head_dim_from="script" if head_dim is not None else "tensors" if "hd" in sizes else "nothing",
        yarn=record.yarn,
    )


def details_of(
    tensors: Mapping[str, torch.Tensor], record: Record, where: Path, head_dim: int | None = None
) -> GptDetails:
    """The sizes of tensors that are to be written to `where`. Raises CheckpointError as the reading of them would."""
    parts = Parts()
    infos = {name: TensorInfo.of(name, tensor) for name, tensor in tensors.items()}
    details = read_details(infos, record, where, parts, head_dim=head_dim)
    parts.raise_refused(where)
    assert details is not None
    return details


def _check_blocks(names: Iterable[str], depth: int, record: Record, where: Path, parts: Parts) -> None:
    """As many blocks as the record may have, without a gap, and none with attention that has none."""
    blocks = {int(match[1]) for name in names if (match := _BLOCK.fullmatch(name))}
    empty = set(record.no_attention) & set(record.no_mlp)
    if blocks and (absent := sorted(set(range(depth)) - blocks - empty)):
        parts.refuse("blocks", f"{where}: blocks {', '.join(map(str, absent[:8]))} are missing of {depth}")
    if undefined_depth(record, depth):
        wanted = record.depth or f"an even number, at least {record.least_depth}"
        parts.refuse("blocks", f"{where}: has {depth} blocks, but this architecture has {wanted}")
    for i in record.no_attention:
        if wrong := sorted(name for name in names if name.startswith(f"blocks.{i}.attn.")):
            text = f"block {i} of this architecture has no attention, but there is {', '.join(wrong)}"
            parts.refuse("blocks", f"{where}: {text}")
    parts.is_sound("blocks", f"{depth} blocks, {record.name}")
