"""`gpt_small` and `gpt_medium`: modded-nanogpt training checkpoints.

One file {'step', 'code', 'model': state dict, 'optimizers', 'val_loss'}, or a bare state dict, or our own safetensors
of the same names. The dialect, and every size, is read from names and shapes; step, loss, script and optimizers are
kept as what the checkpoint says of its training, and none of it runs.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from runner.checkpoints.checkpoint import Checkpoint, CheckpointFormat, Listing, components
from runner.checkpoints.reading import Parts, Reading, weight_names
from runner.checkpoints.runs import step_in_name
from runner.errors import CheckpointError
from runner.families.gpt.layouts import MEDIUM_DEPTH, SCALARS, Dialect, GptDetails, component, read_details
from runner.files.file_type import Kind, kind_of
from runner.files.strict_json import parse_object
from runner.files.tensors import TensorSource, is_tensor, open_weights, read_number

STATE = "model"
TOP_LEVEL = ("step", "code", "optimizers", "val_loss")
# One entry of the metadata of our safetensors, since several would come in an order that changes from file to file.
METADATA = "training"
LARGEST = 1 << 53  # beyond it a step or a loss is no number that anything here can use
_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """`step` and `val_loss` as the checkpoint's own state gives them, `code` the text of the training script."""

    step: int | None = None
    val_loss: float | None = None
    code: str | None = None

    def describe(self) -> dict[str, Any]:
        """Fields of the result contract; of the code its SHA-256 and its length in characters."""
        found: dict[str, Any] = {"step": self.step, "val_loss": self.val_loss}
        if self.code is not None:
            text = self.code.encode("utf-8", "surrogatepass")
            found |= {"code_sha256": hashlib.sha256(text).hexdigest(), "code_length": len(self.code)}
        return {name: value for name, value in found.items() if value is not None}


def provenance(source: TensorSource) -> Provenance:
    """That of an opened file, a .pt or our safetensors; what it does not hold is None. Raises CheckpointError."""
    entries = source.extras
    if METADATA in entries and kind_of(source.path) is Kind.SAFETENSORS:
        entries = parse_object(entries[METADATA].encode(), source.path, f"metadata entry {METADATA!r}")
    step, loss, code = (_value(source, entries, name) for name in ("step", "val_loss", "code"))
    return Provenance(
        step=step if isinstance(step, int) and _is_number(step) else None,
        val_loss=float(loss) if _is_number(loss) else None,
        code=code if isinstance(code, str) else None,
    )


def metadata(origin: Provenance) -> dict[str, str]:
    """What `provenance` reads back from a safetensors file that has this as its metadata."""
    return {METADATA: json.dumps(asdict(origin), sort_keys=True)}


def _value(source: TensorSource, entries: Mapping[str, Any], name: str) -> Any:
    """An entry beside the weights; a tensor of one element as the number that it holds."""
    value: Any = entries.get(name)
    if is_tensor(value) and value.numel() == 1:
        return read_number(source.path, name)
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LARGEST


def optimizer_summaries(optimizers: Any) -> list[dict[str, Any]]:
    """Of each optimizer: tensors, elements and bytes of its state, and its parameter groups without their tensors."""
    if not isinstance(optimizers, (list, tuple)):
        return []
    return [_summary(each) for each in optimizers if isinstance(each, Mapping)]


def _summary(optimizer: Mapping[Any, Any]) -> dict[str, Any]:
    state, groups = optimizer.get("state"), optimizer.get("param_groups")
    entries = [entry for entry in state.values() if isinstance(entry, Mapping)] if isinstance(state, Mapping) else []
    tensors = [value for entry in entries for value in entry.values() if is_tensor(value)]
    return {
        "parameters": len(entries),
        "tensors": len(tensors),
        "elements": sum(tensor.numel() for tensor in tensors),
        "bytes": sum(tensor.nbytes for tensor in tensors),
        "groups": [_group(group) for group in groups if isinstance(group, Mapping)] if isinstance(groups, list) else [],
    }


def _group(group: Mapping[Any, Any]) -> dict[str, Any]:
    parameters = group.get("params")
    settings = {str(name): value for name, value in group.items() if name != "params" and _is_plain(value)}
    return {**settings, "params": len(parameters) if isinstance(parameters, (list, tuple)) else 0}


def _is_plain(value: Any) -> bool:
    return isinstance(value, _PLAIN) or (
        isinstance(value, (list, tuple)) and all(isinstance(item, _PLAIN) for item in value)
    )


FAMILY = "gpt"
# What no other architecture calls its attention, with the wrapper prefixes that a file may have.
_MARKS: Mapping[Dialect, re.Pattern[str]] = {
    "small": re.compile(r"(?:_orig_mod\.|module\.)*blocks\.[0-9]+\.attn\.qkv_w"),
    "medium": re.compile(r"(?:_orig_mod\.|module\.)*blocks\.[0-9]+\.attn\.qkvo_w"),
}


def _matches(dialect: Dialect, listing: Listing) -> str | None:
    """Evidence: the dialect's attention tensors. Raises CheckpointError where a file named itself cannot be opened."""
    found = _recognised(dialect, listing)[0]
    return "; ".join(f"{name}: {dialect} attention in {count} blocks" for name, count in found.items()) or None


def _recognised(dialect: Dialect, listing: Listing) -> tuple[dict[str, int], list[str]]:
    """Of the dialect's files the number of attention blocks, and why other files could not be opened."""
    if not listing.path.is_dir():
        count = _count_marks(dialect, listing, listing.path.name)
        return ({listing.path.name: count} if count else {}), []
    found, unreadable = {}, []
    for name in weight_names(listing):
        try:
            count = _count_marks(dialect, listing, name)
        except CheckpointError as error:
            unreadable.append(str(error))
            continue
        if count:
            found[name] = count
    return found, unreadable


def _count_marks(dialect: Dialect, listing: Listing, name: str) -> int:
    nested = _nested(listing, name)
    names: Iterable[Any] = listing.weights(name).infos if nested is None else nested
    return sum(isinstance(key, str) and _MARKS[dialect].fullmatch(key) is not None for key in names)


def _nested(listing: Listing, name: str) -> Mapping[Any, Any] | None:
    """The state dict inside a training script's dict; None for a file whose tensors stand at its top."""
    state = listing.weights(name).extras.get(STATE)
    return state if isinstance(state, Mapping) else None


def _resembles(listing: Listing) -> int:
    """1 where a file is named as these training scripts name theirs."""
    named = (step_in_name(name) is not None and not listing.file(name).is_dir() for name in listing.entries)
    return 1 if any(named) else 0


def _read(dialect: Dialect, listing: Listing) -> Reading:
    """The checkpoint, part by part: files, blocks, keys, shapes."""
    parts, weights, nested = Parts(), None, False
    files = tuple(map(listing.file, weight_names(listing)))
    with parts.within("files"):
        name = _file(dialect, listing)
        files = (listing.file(name),)
        nested = _nested(listing, name) is not None
        weights = open_weights(files[0], state_dict_key=STATE if nested else None)
        parts.sources.append(weights)
    if weights is None:
        return parts.reading(listing.path, files, None)
    foreign, findings = _other_entries(weights, nested)
    details = read_details(weights.infos, dialect, weights.path, parts, foreign)
    if details is None:
        return parts.reading(listing.path, files, None)
    if dialect == "medium" and details.num_layers != MEDIUM_DEPTH:
        findings.append(f"its skip connections are only defined for {MEDIUM_DEPTH} blocks: it cannot be run")
    origin = Provenance()
    with parts.within("files"):
        origin = provenance(weights)
    checkpoint = Checkpoint(
        path=listing.path,
        format=f"gpt_{dialect}",
        family=FAMILY,
        evidence=_matches(dialect, listing) or f"format=gpt_{dialect}",
        weights=weights,
        details=details,
        step=origin.step,
        training={**origin.describe(), "optimizers": optimizer_summaries(weights.extras.get("optimizers"))},
        findings=tuple(findings),
    )
    return parts.reading(listing.path, files, checkpoint)


def _file(dialect: Dialect, listing: Listing) -> str:
    """The name of the one file that is meant."""
    found, unreadable = _recognised(dialect, listing)
    if len(found) > 1:
        raise CheckpointError(f"{listing.path}: several files could be meant: {', '.join(found)}; name one as ckpt=")
    if found:
        return next(iter(found))
    other: Dialect = "medium" if dialect == "small" else "small"
    if theirs := _recognised(other, listing)[0]:
        raise CheckpointError(f"{listing.path}: {', '.join(theirs)}: its keys are those of format=gpt_{other}")
    if listing.path.is_dir():
        reasons = "".join(f"; {reason}" for reason in unreadable)
        raise CheckpointError(f"{listing.path}: no file in it has the keys of format=gpt_{dialect}{reasons}")
    return listing.path.name


def _other_entries(weights: TensorSource, nested: bool) -> tuple[list[str], list[str]]:
    """Entries of the state dict that are no tensors, and findings about what stands beside it."""
    if not nested and kind_of(weights.path) is not Kind.SAFETENSORS:
        return list(weights.extras), []
    inside = f"{STATE}."
    foreign = [name.removeprefix(inside) for name in weights.extras if name.startswith(inside)]
    unread = sorted(
        set(weights.extras) - set(TOP_LEVEL if nested else (METADATA, "format")) - {inside + name for name in foreign}
    )
    return foreign, [f"beside the weights it holds {', '.join(unread)}, which nothing reads"] if unread else []


def _describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Sizes, tensors by component, scalars by what they are, and where the checkpoint comes from."""
    details: GptDetails = checkpoint.details
    return {
        "dialect": details.dialect,
        "vocab_size": details.vocab_size,
        "padded_vocab_size": details.head_rows,
        "smallest_vocab_size": details.smallest_vocab_size,
        "num_layers": details.num_layers,
        "num_heads": details.num_heads,
        "model_dim": details.model_dim,
        "components": components(checkpoint, component),
        "scalars": _scalars(checkpoint),
        **checkpoint.training,
    }


def _scalars(checkpoint: Checkpoint) -> dict[str, Any]:
    details: GptDetails = checkpoint.details
    values = checkpoint.weights.numbers(SCALARS)
    groups = {name: [values[i] for i in indices] for name, indices in details.scalar_groups().items()}
    return {
        "count": details.num_scalars,
        "used": details.used_scalars,
        "padding": details.num_scalars - details.used_scalars,
        "values": {
            name: {"min": min(group), "mean": sum(group) / len(group), "max": max(group)}
            for name, group in groups.items()
        },
    }


def _format(dialect: Dialect) -> CheckpointFormat:
    return CheckpointFormat(
        name=f"gpt_{dialect}",
        family=FAMILY,
        matches=partial(_matches, dialect),
        read=partial(_read, dialect),
        resembles=_resembles if dialect == "small" else None,
        describe=_describe,
    )


FORMATS: tuple[CheckpointFormat, ...] = (_format("small"), _format("medium"))
