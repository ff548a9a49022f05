"""Reading fine-tuned classifiers: the directory of task=finetune, and the .pt of the script that it follows."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from runner.checkpoints.checkpoint import Checkpoint, CheckpointFormat, Listing, plain
from runner.checkpoints.reading import weight_names
from runner.errors import CheckpointError
from runner.files.strict_json import read_object
from runner.files.tensors import TensorInfo, TensorSource, is_tensor, open_weights
from runner.finetuning.files import (
    ADAPTER_FILE,
    BACKBONE_FILE,
    DESCRIPTION,
    FORMAT,
    HEAD_FILE,
    PEFT_PREFIX,
    VERSION,
)

FAMILY = "finetuned"
BACKBONE, HEAD = "pretrained_model.", "classifier."
STATE = "model"
# The general script's conversion of small backbones computes another function: their size tells.
_CONVERTED = {"n_layer": 12, "n_embd": 768}
_LIMIT = 64 << 20
# Of a description: what must be there, and of what kind.
_NEEDED: Mapping[str, type] = {
    "backbone": dict, "head": dict, "labels": list, "text": list, "separator": str, "max_length": int, "pair": str,
    "settings": dict, "trained": list,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class FinetunedDetails:
    """`description`: what classification.json says. `is_original`: of the script's .pt, which has none.

    `backbone`, `base`: path, format and hash of what it stands on; None for what is in the file itself.
    """

    description: Mapping[str, Any]
    head: str
    labels: tuple[str, ...]
    is_original: bool = False
    backbone: Mapping[str, Any] | None = None
    base: Mapping[str, Any] | None = None


def matches(listing: Listing) -> str | None:
    """Evidence: classification.json, or a backbone's and a classifier's tensors in one file."""
    if DESCRIPTION in listing.entries and listing.path.is_dir():
        return DESCRIPTION
    name = _original(listing)
    return None if name is None else f"{name}: {BACKBONE}* beside {HEAD}*"


def _original(listing: Listing) -> str | None:
    """The one file of weights, where it holds both."""
    names = weight_names(listing)
    if len(names) != 1:
        return None
    source = listing.weights(names[0])
    state = source.extras.get(STATE)
    tensors = state if isinstance(state, Mapping) else source.infos
    keys = [str(key).removeprefix("_orig_mod.") for key in tensors]
    both = f"{HEAD}1.weight" in keys and any(key.startswith(BACKBONE) for key in keys)
    return names[0] if both else None


def open_finetuned(listing: Listing, *, force: bool = False) -> Checkpoint:
    """The checkpoint. Raises CheckpointError."""
    if DESCRIPTION in listing.entries and listing.path.is_dir():
        return _directory(listing)
    name = _original(listing)
    if name is None:
        raise CheckpointError(f"{listing.path}: has no {DESCRIPTION}, and no {BACKBONE}* beside {HEAD}*")
    return _script_file(listing, name, force)


def _directory(listing: Listing) -> Checkpoint:
    path = listing.file(DESCRIPTION)
    said = read_object(path, DESCRIPTION, _LIMIT)
    if said.get("format") != FORMAT or said.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: format {said.get('format')!r}, version {said.get('version')!r}; known is {VERSION}"
        )
    wrong = [name for name, kind in _NEEDED.items() if not isinstance(said.get(name), kind)]
    head = said["head"].get("kind") if "head" not in wrong else None
    labels = said.get("labels")
    if wrong or head not in ("mlp", "linear") or not all(isinstance(each, str) for each in labels or ()):
        raise CheckpointError(f"{path}: {', '.join(wrong or ['head'])} is not as it should be")
    assert isinstance(labels, list)
    names = [name for name in (HEAD_FILE, BACKBONE_FILE, ADAPTER_FILE) if name in listing.entries]
    sources = [_unprefixed(listing.weights(name)) if name == ADAPTER_FILE else listing.weights(name) for name in names]
    weights = _together(listing.path, sources)
    lacking = sorted(set(map(str, said["trained"])) - set(weights.infos))
    step = said.get("step")
    return Checkpoint(
        path=listing.path,
        format=FORMAT,
        family=FAMILY,
        evidence=DESCRIPTION,
        weights=weights,
        details=FinetunedDetails(
            description=said, head=head, labels=tuple(labels), backbone=said["backbone"], base=said.get("base") or None
        ),
        base_name=str(said["base"]["path"]) if isinstance(said.get("base"), dict) else None,
        step=step if isinstance(step, int) else None,
        missing=tuple(lacking),
    )


def _unprefixed(source: TensorSource) -> TensorSource:
    """PEFT's names without what it puts before them."""
    short = {name: name.removeprefix(PEFT_PREFIX) for name in source.infos}
    long = {own: name for name, own in short.items()}
    infos = {short[name]: replace(info, name=short[name]) for name, info in source.infos.items()}
    return replace(source, infos=infos, reader=lambda name: source.reader(long[name]), stored=lambda name: None)


def _together(path: Path, sources: list[TensorSource]) -> TensorSource:
    """The tensors of several files of one directory; of a name in two the first."""
    owner = {name: source for source in reversed(sources) for name in source.infos}
    if not owner:
        raise CheckpointError(f"{path}: has no {HEAD_FILE}")
    return TensorSource(
        path=path,
        files=tuple(file for source in sources for file in source.files),
        infos={name: source.infos[name] for name, source in owner.items()},
        reader=lambda name: owner[name].read(name),
    )


def _script_file(listing: Listing, name: str, force: bool) -> Checkpoint:
    file = listing.file(name)
    whole = listing.weights(name)
    weights = open_weights(file, state_dict_key=STATE if isinstance(whole.extras.get(STATE), Mapping) else None)
    extras = {key: value for key, value in whole.extras.items() if key != STATE and not is_tensor(value)}
    args = extras.get("args")
    args = args if isinstance(args, Mapping) else {}
    odd = [key for key in weights.infos if not key.startswith((BACKBONE, HEAD))]
    count = weights.infos.get(f"{HEAD}4.weight", TensorInfo(name="", shape=(0,), dtype_name="", itemsize=0)).shape[0]
    if odd or not count:
        raise CheckpointError(f"{file}: {', '.join(odd[:4]) or f'no {HEAD}4.weight'}: not as the script writes it")
    medium = any(key.endswith(".attn.qkvo_w") for key in weights.infos)
    converted = medium and all(args.get(key) == value for key, value in _CONVERTED.items())
    if converted and not force:
        raise CheckpointError(
            f"{file}: a small backbone (12 blocks of 768) under the medium's keys, as the general script converts it; "
            "it computes another function than the small model; family=finetuned family.force=true opens it even so"
        )
    step = extras.get("iter_num")
    labels = ("entailment", "neutral", "contradiction") if count == 3 and "xnli" in str(args.get("dataset")) else None
    columns = args.get("text_column")
    description = {
        "metrics": {key: plain(extras[key]) for key in ("val_loss", "val_accuracy", "val_f2") if key in extras},
        "args": plain(args),
        "text": list(columns) if isinstance(columns, (list, tuple)) else None,
        "separator": "<ENDOFTEXT>",
        "max_length": args.get("block_size") if isinstance(args.get("block_size"), int) else 1024,
        "pair": "separator",
    }
    return Checkpoint(
        path=listing.path,
        format=FORMAT,
        family=FAMILY,
        evidence=f"{name}: {BACKBONE}* beside {HEAD}*",
        weights=weights,
        details=FinetunedDetails(
            description=description, head="mlp", labels=labels or tuple(map(str, range(count))), is_original=True
        ),
        step=step if isinstance(step, int) else None,
        training={"args": plain(args)},
        findings=("the backbone was converted to another architecture than it was trained in",) if converted else (),
    )


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """What inspect adds: classes, head, backbone, figures when it was saved, settings."""
    details: FinetunedDetails = checkpoint.details
    said = details.description
    known = {
        "classes": len(details.labels),
        "labels": list(details.labels),
        "head": details.head,
        "backbone": dict(details.backbone) if details.backbone else "in this file",
        "stands_on": dict(details.base) if details.base else None,
        "figures": said.get("metrics"),
        "text": said.get("text"),
        "max_length": said.get("max_length"),
        "scope": said.get("scope"),
        "settings": said.get("settings"),
        "args": said.get("args"),
    }
    return {name: value for name, value in known.items() if value is not None}


def formats(*, force: bool = False) -> tuple[CheckpointFormat, ...]:
    """The one format."""
    return (
        CheckpointFormat(
            name=FORMAT, family=FAMILY, matches=matches, describe=describe, open=partial(open_finetuned, force=force),
            decides=True,
        ),
    )  # fmt: skip


FORMATS = formats()
