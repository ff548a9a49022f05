"""Checkpoints of modded-nanogpt's records: `gpt_small` and `gpt_medium`, two of them, and `gpt_record`, all others.

One file {'step', 'code', 'model': state dict, 'optimizers' or 'optimizer', 'val_loss'}, or a bare state dict, or our
own safetensors of the same names. The record is found as identify.py says, and every size read from names and shapes;
step, loss, script and optimizers are kept as what the checkpoint says of its training, and none of it runs.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from runner.checkpoints.checkpoint import Checkpoint, CheckpointFormat, Listing, components
from runner.checkpoints.reading import Parts, Reading, weight_names
from runner.checkpoints.runs import step_in_name
from runner.errors import CheckpointError
from runner.families.gpt.identify import Decision, identify
from runner.families.gpt.layouts import ALIKE, GptDetails, component, nearest, read_details
from runner.families.gpt.records import LARGE, MEDIUM, RECORDS, SMALL, Record, skip_connections
from runner.families.gpt.script import Script
from runner.families.gpt.script import read as read_script
from runner.files.file_type import Kind, kind_of
from runner.files.strict_json import parse_object
from runner.files.tensors import TensorInfo, TensorSource, is_tensor, open_weights, read_number

STATE = "model"
TOP_LEVEL = ("step", "code", "optimizers", "optimizer", "val_loss", "record")
# One entry of the metadata of our safetensors, since several would come in an order that changes from file to file.
METADATA = "training"
LARGEST = 1 << 53  # beyond it a step or a loss is no number that anything here can use
_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """`step` and `val_loss` as the checkpoint's own state gives them, `code` the text of the training script.

    `record`: whose arithmetic it is, as we noted it in a file of ours.
    """

    step: int | None = None
    val_loss: float | None = None
    code: str | None = None
    record: str | None = field(default=None, compare=False)

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
    step, loss, code, record = (_value(source, entries, name) for name in ("step", "val_loss", "code", "record"))
    return Provenance(
        step=step if isinstance(step, int) and _is_number(step) else None,
        val_loss=float(loss) if _is_number(loss) else None,
        code=code if isinstance(code, str) else None,
        record=record if isinstance(record, str) else None,
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
    if isinstance(optimizers, Mapping):
        optimizers = [optimizers]
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
NAMES = {SMALL: "gpt_small", MEDIUM: "gpt_medium"}
RECORD = "gpt_record"
GPT2_END = 50256
_PREFIX = re.compile(r"(?:_orig_mod\.|module\.)*")
# What no other architecture calls its attention.
_MARK = re.compile(
    r"blocks\.[0-9]+\.attn\.(?:qkvo?_w|c_q\.weight)|transformer\.h\.[0-9]+\.attn\.c_(?:q|attn)\.weight|attn_bank|qk_bank"
)
_ATTENTION = re.compile(r"(?:blocks|transformer\.h)\.[0-9]+\.attn\.(?:qkvo?_w|c_q\.weight|c_attn\.weight)")
_HEADS = "the size of a head is not said by its script or tensors: taken as {size}, as in the record's script{other}"


@dataclass(frozen=True)
class _File:
    """One weights file that could be meant: its tensors, and the record that they show."""

    name: str
    infos: Mapping[str, TensorInfo]
    nested: bool
    record: Record
    text: str  # what shows it


def _candidates(listing: Listing, told: Record | None) -> tuple[list[_File], list[str]]:
    """The files with a record's tensors, and why others could not be opened.

    Raises CheckpointError where a file named itself cannot be.
    """
    if not listing.path.is_dir():
        found = _look(listing, listing.path.name, told)
        return [found] if found else [], []
    files, unreadable = [], []
    for name in weight_names(listing):
        try:
            found = _look(listing, name, told)
        except CheckpointError as error:
            unreadable.append(str(error))
            continue
        if found is not None:
            files.append(found)
    return files, unreadable


def _look(listing: Listing, name: str, told: Record | None) -> _File | None:
    """The file, where its names are a record's, or much like one's."""
    source = listing.weights(name)
    state = source.extras.get(STATE)
    nested, infos = isinstance(state, Mapping), source.infos
    if isinstance(state, Mapping):
        short = {key: _PREFIX.sub("", key, count=1) for key in state if isinstance(key, str) and is_tensor(state[key])}
        infos = {own: TensorInfo.of(own, state[key]) for key, own in short.items()}
    if not any(map(_MARK.fullmatch, infos)):
        return None
    likely, share = nearest(infos)
    count = sum(1 for each in infos if _ATTENTION.fullmatch(each))
    if share < ALIKE and not any(re.fullmatch(r"blocks\.[0-9]+\.attn\.qkvo?_w", each) for each in infos):
        return None
    decision = _decide(source, infos, provenance(source), told)
    record = decision.record if share >= ALIKE else likely
    count = count or (record.depth or 0) - len(record.no_attention)  # banks: the record says how many
    attention = f"{record.track} attention in {count} blocks"
    named = record.name if decision.problem is None else " or ".join(decision.candidates) or record.name
    return _File(name, infos, nested, record, f"{name}: {attention}, {named} ({decision.how})")


def _decide(source: TensorSource, infos: Mapping[str, TensorInfo], origin: Provenance, told: Record | None) -> Decision:
    """Whose tensors they are."""

    def is_tied() -> bool:
        weights = open_weights(source.path, state_dict_key=STATE)
        head, embedding = (weights.bytes_of(name) for name in ("lm_head.weight", "transformer.wte.weight"))
        if head is None or embedding is None:
            return bool((weights.read("lm_head.weight") == weights.read("transformer.wte.weight")).all())
        return head == embedding

    return identify(infos, read_script(origin.code), told=told, noted=origin.record, is_tied=is_tied)


def _format_of(record: Record) -> str:
    return NAMES.get(record.name, RECORD)


def _matches(name: str, told: Record | None, listing: Listing) -> str | None:
    """Evidence: the record's attention, and how it was found."""
    return "; ".join(each.text for each in _candidates(listing, told)[0] if _format_of(each.record) == name) or None


def _resembles(listing: Listing) -> int:
    """1 where a file is named as these training scripts name theirs."""
    named = (step_in_name(name) is not None and not listing.file(name).is_dir() for name in listing.entries)
    return 1 if any(named) else 0


def _read(name: str, told: Record | None, listing: Listing) -> Reading:
    """The checkpoint, part by part: files, blocks, keys, shapes."""
    parts, weights, nested = Parts(), None, False
    files = tuple(map(listing.file, weight_names(listing)))
    evidence = f"format={name}"
    with parts.within("files"):
        chosen = _file(name, told, listing)
        files = (listing.file(chosen.name if isinstance(chosen, _File) else chosen),)
        nested = isinstance(listing.weights(files[0].name).extras.get(STATE), Mapping)
        evidence = chosen.text if isinstance(chosen, _File) else evidence
        weights = open_weights(files[0], state_dict_key=STATE if nested else None)
        parts.sources.append(weights)
    if weights is None:
        return parts.reading(listing.path, files, None)
    foreign, findings = _other_entries(weights, nested)
    origin = Provenance()
    with parts.within("files"):
        origin = provenance(weights)
    script = read_script(origin.code)
    forced = {each: key for key, each in NAMES.items()}.get(name)
    decision = _decide(weights, weights.infos, origin, told)
    if decision.problem is not None:
        parts.refuse("keys", f"{weights.path}: {decision.problem}")
        return parts.reading(listing.path, files, None)
    record = decision.record if forced is None or _format_of(decision.record) == name else RECORDS[forced]
    with parts.within("shapes"):
        head_dim = _head_dim(script, weights, record)
        details = read_details(weights.infos, record, weights.path, parts, foreign, head_dim)
    if details is None:
        return parts.reading(listing.path, files, None)
    if details.head_dim_from == "nothing":
        other = ", and ipa_large_lite, whose tensors are the same, has heads of 64" if record.name == MEDIUM else ""
        if decision.candidates and details.num_layers != 16:
            text = f"could be {MEDIUM} (heads of 128) or {LARGE} (heads of 64), and nothing in it says which"
            parts.refuse("keys", f"{weights.path}: {text}; format={RECORD} family.record={LARGE} decides")
        findings.append(_HEADS.format(size=details.head_dim, other=other))
    details, said = _trained(replace(details, found_by=decision.how), script, origin.step)
    checkpoint = Checkpoint(
        path=listing.path,
        format=name,
        family=FAMILY,
        evidence=evidence,
        weights=weights,
        details=details,
        step=origin.step,
        training={
            **origin.describe(),
            "optimizers": optimizer_summaries(weights.extras.get("optimizers", weights.extras.get("optimizer"))),
        },
        findings=(*findings, *decision.findings, *said),
    )
    return parts.reading(listing.path, files, checkpoint)


def _file(name: str, told: Record | None, listing: Listing) -> _File | str:
    """The one file that is meant; its name alone where none looks like a record's."""
    found, unreadable = _candidates(listing, told)
    own = found if name == RECORD else [each for each in found if _format_of(each.record) == name]
    if len(own) > 1:
        several = ", ".join(each.name for each in own)
        raise CheckpointError(f"{listing.path}: several files could be meant: {several}; name one as ckpt=")
    if own:
        return own[0]
    if found:
        other = _format_of(found[0].record)
        files = ", ".join(each.name for each in found)
        raise CheckpointError(f"{listing.path}: {files}: its keys are those of format={other}")
    if listing.path.is_dir():
        reasons = "".join(f"; {reason}" for reason in unreadable)
        raise CheckpointError(f"{listing.path}: no file in it has the keys of format={name}{reasons}")
    return listing.path.name


def _head_dim(script: Script, weights: TensorSource, record: Record) -> int | None:
    """The size of a head as the script says it. Raises CheckpointError where it says two."""
    table = weights.infos.get(record.table)
    if table is None or len(table.shape) != 2:
        return script.head_dim
    width = table.shape[1]
    counted = width // script.num_heads if script.num_heads and width % script.num_heads == 0 else None
    if script.heads_from_width:
        return counted or script.head_dim
    if counted is not None and script.head_dim is not None and counted != script.head_dim:
        raise CheckpointError(
            f"{weights.path}: its script says {script.num_heads} heads of {script.head_dim}, its width is {width}"
        )
    return script.head_dim or counted


def _trained(details: GptDetails, script: Script, step: int | None) -> tuple[GptDetails, list[str]]:
    """The details with what depends on how far training has come, and findings about it."""
    record, total = details.record, script.iterations
    said: list[str] = []
    end = script.end_of_text
    if end is None and details.vocab_size > GPT2_END:
        end = GPT2_END
    known, end = end is not None, details.vocab_size - 1 if end is None else end
    details = replace(details, end_of_text=end, end_is_known=known)
    if not record.yarn and not record.split:
        return details, said
    if total is None or step is None:
        what = "the step that it was saved at" if step is None else "how long its script trains"
        embedding = ", with the embedding as it is stored" if record.split else ""
        said.append(f"{what} is not known: taken as trained to the end{embedding}")
        return details, said
    passed = [
        window for window, share in zip(record.yarn[1:], record.yarn_at, strict=False) if step >= round(share * total)
    ]
    if len(passed) + 1 < len(record.yarn):
        windows = ", ".join(map(str, (record.yarn[0], *passed)))
        said.append(f"saved at step {step} of {total}: YaRN has gone through the windows {windows} (blocks of 128)")
    split = math.ceil(script.split_share * total) | (record.split == "odd")
    before = bool(record.split) and step < split
    if before:
        said.append(
            f"saved at step {step}, before embedding and head part at {split}: the head's rows are the embedding"
        )
    return replace(details, yarn=(record.yarn[0], *passed), before_split=before), said


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
    """The record, sizes, tensors by component, scalars by what they are, and where the checkpoint comes from."""
    details: GptDetails = checkpoint.details
    record = details.record
    return {
        "dialect": record.track,
        "record": record.name,
        "record_found_by": details.found_by,
        "vocab_size": details.vocab_size,
        "padded_vocab_size": details.head_rows,
        "smallest_vocab_size": details.smallest_vocab_size,
        "num_layers": details.num_layers,
        "num_heads": details.num_heads,
        "head_dim": details.head_dim,
        "head_dim_from": details.head_dim_from,
        "model_dim": details.model_dim,
        "end_of_text": details.end_of_text if record.documents else None,
        "windows": _windows(record),
        "yarn": list(details.yarn) or None,
        "embedding": "lm_head.weight" if details.before_split else record.table,
        "components": components(checkpoint, component),
        "scalars": _scalars(checkpoint),
        **checkpoint.training,
    }


def _windows(record: Record) -> dict[str, Any] | None:
    """Those of validation, in blocks of 128 tokens or in tokens."""
    if not record.window:
        return None
    last = {"last": record.last_window} if record.last_window else {}
    unit = "tokens" if record.window == "tokens" else "blocks of 128"
    return {"long": record.windows[0], "short": record.windows[1], **last, "unit": unit}


def _scalars(checkpoint: Checkpoint) -> dict[str, Any] | None:
    details: GptDetails = checkpoint.details
    if not details.num_scalars:
        return None
    values, start = checkpoint.weights.numbers("scalars"), 0
    groups: dict[str, list[float]] = {}
    for what, count in details.scalar_counts().items():
        part = values[start : start + count]
        start += count
        groups |= _scalar_group(details, what, part)
    return {
        "count": details.num_scalars,
        "used": details.used_scalars,
        "padding": details.num_scalars - details.used_scalars,
        "values": {
            name: {"min": min(group), "mean": sum(group) / len(group), "max": max(group)}
            for name, group in groups.items()
        },
    }


def _scalar_group(details: GptDetails, what: str, values: list[float]) -> dict[str, list[float]]:
    """Weights of skips that are read, of x and x0, of v and its embedding, by the names that inspect shows."""
    if what == "skip" and details.record.skips:
        return {
            "skip": [
                values[number] for number, _ in sorted(skip_connections(details.record, details.num_layers).values())
            ]
        }
    names = {"lambdas": ("lambda_x", "lambda_x0", "lambda_x1"), "values": ("lambda_v", "lambda_ve")}.get(what)
    if names is None:
        return {what.replace(" ", "_"): values}
    step = len(values) // details.num_layers
    return {names[i]: values[i::step] for i in range(step)}


def formats(told: Record | None) -> tuple[CheckpointFormat, ...]:
    """The formats, where the user said whose checkpoint it is (`family.record`)."""
    return tuple(
        CheckpointFormat(
            name=name,
            family=FAMILY,
            matches=partial(_matches, name, told),
            read=partial(_read, name, told),
            resembles=_resembles if name == "gpt_small" else None,
            describe=_describe,
        )
        for name in (*NAMES.values(), RECORD)
    )


FORMATS: tuple[CheckpointFormat, ...] = formats(None)
