"""`npt_edit`: an NPT model into whose base modulations were written for good.

Either the edits alone: `edits.safetensors`, rank-k factors of each touched matrix, and `injection.json`, which names
the npt_delta and the base that they were made on. Or the whole: the base with changed MLPs in a Hugging Face directory,
beside it the NPT weights unchanged, and `injection_history.json`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.checkpoints import model_directory
from runner.checkpoints.checkpoint import Checkpoint, CheckpointFormat, Listing
from runner.checkpoints.reading import Parts, Reading
from runner.errors import CheckpointError
from runner.families.npt import checkpoint as npt_delta
from runner.files.strict_json import read_object
from runner.files.tensors import TensorSource, open_weights

if TYPE_CHECKING:
    import torch

NAME, FAMILY = "npt_edit", "npt"
FACTORS, EDITS, HISTORY = "edits.safetensors", "injection.json", model_directory.INJECTION_HISTORY
VERSION = "runner-edit/1"
_LIMIT = 64 << 20


@dataclass(frozen=True, kw_only=True)
class EditDetails:
    """`edits`: as `injection.json` lists them, in order. `config`: config.json where the base's weights are here, too.

    `sha256`: the weights files that the factors were made on, by name; what else is there is another model.
    """

    edits: Sequence[Mapping[str, Any]]
    config: Mapping[str, Any] | None
    base_keys: Sequence[str] = ()
    checkpoint: Path | None = None
    sha256: Mapping[str, str] | None = None


def key(edit: int, layer: int, projection: str, side: str) -> str:
    """The name of a factor [k, width] of an edit; `side` is v_a or v_b, ΔW = strength · v_bᵀ v_a."""
    return f"edit_{edit}.layer_{layer}.{projection}.{side}"


def matches(listing: Listing) -> str | None:
    """Evidence: the file that lists the edits."""
    for name, beside in ((EDITS, FACTORS), (HISTORY, npt_delta.WEIGHT_FILES[1])):
        if name in listing.entries and beside in listing.entries:
            return f"{name}: edits"
    return None


def read(listing: Listing) -> Reading:
    """The checkpoint, part by part: files, config, keys, shapes."""
    parts = Parts()
    whole = HISTORY in listing.entries
    said: dict[str, Any] = {}
    with parts.within("config"):
        said = _described(listing.file(HISTORY if whole else EDITS))
    checkpoint = None
    if said:
        with parts.within("files"):
            checkpoint = _whole(listing, said, parts) if whole else _factors(listing, said, parts)
    files = checkpoint.weights.files if checkpoint else ()
    return parts.reading(listing.path, files, checkpoint)


def _described(path: Path) -> dict[str, Any]:
    said = read_object(path, path.name, _LIMIT)
    edits = said.get("edits")
    if said.get("format") != VERSION or not isinstance(edits, list) or not all(map(_is_edit, edits)):
        raise CheckpointError(f"{path}: lists no edits of the format {VERSION}")
    return said


def _is_edit(edit: object) -> bool:
    if not isinstance(edit, Mapping) or not isinstance(edit.get("strength"), (int, float)):
        return False
    layers = edit.get("layers")
    return isinstance(layers, list) and all(type(layer) is int for layer in layers)


def _base_name(said: Mapping[str, Any]) -> str | None:
    name = said.get("base")
    return name if isinstance(name, str) else None


def _factors(listing: Listing, said: Mapping[str, Any], parts: Parts) -> Checkpoint:
    """The edits over the checkpoint that they name."""
    under = _under(listing.path, said)
    opened = npt_delta.read(Listing.of(under)).open()
    factors = open_weights(listing.file(FACTORS))
    wanted = {
        key(i, layer, projection, side)
        for i, edit in enumerate(said["edits"])
        for layer, projections in _matrices(edit, listing.path).items()
        for projection in projections
        for side in ("v_a", "v_b")
    }
    if missing := sorted(wanted - set(factors.infos)) or sorted(set(factors.infos) - wanted):
        parts.refuse("keys", f"{factors.path}: {missing[0]} is {'missing' if missing[0] in wanted else 'unexpected'}")
    both = TensorSource(
        path=factors.path,
        files=(*opened.weights.files, *factors.files),
        infos={**opened.weights.infos, **factors.infos},
        reader=lambda name: (factors if name in factors.infos else opened.weights).read(name),
    )
    parts.sources.append(both)
    details = EditDetails(edits=said["edits"], config=None, checkpoint=under, sha256=said.get("sha256"))
    _say_sound(parts, opened, said)
    return replace(
        opened,
        path=listing.path,
        format=NAME,
        evidence=f"{EDITS}: {len(said['edits'])} edits of {under}",
        weights=both,
        details=details,
        base_name=_base_name(said) or opened.base_name,
        training={"edits": said["edits"]},
    )


def _under(directory: Path, said: Mapping[str, Any]) -> Path:
    name = said.get("checkpoint")
    if not isinstance(name, str):
        raise CheckpointError(f"{directory / EDITS}: names no checkpoint that was edited")
    places = [start / name for start in (directory, Path())]
    found = next((place for place in places if place.exists()), None)
    if found is None:
        raise CheckpointError(f"{directory}: the checkpoint {name} that was edited is neither beside it nor here")
    return found.resolve()


def _matrices(edit: Mapping[str, Any], path: Path) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    rows = edit.get("matrices")
    for row in rows if isinstance(rows, list) else [None]:
        if not isinstance(row, Mapping) or type(row.get("layer")) is not int or row.get("projection") not in (
            "gate", "up", "down",
        ):  # fmt: skip
            raise CheckpointError(f"{path / EDITS}: an edit names no matrices")
        found.setdefault(row["layer"], []).append(row["projection"])
    return found


def _whole(listing: Listing, said: Mapping[str, Any], parts: Parts) -> Checkpoint:
    """The changed base, and the NPT weights beside it."""
    config = model_directory.read_config(listing.path)
    base = model_directory.open_model_weights(listing.path)
    own = open_weights(listing.file(npt_delta.WEIGHT_FILES[1]))
    keys = npt_delta.read_keys(own.infos, own.path, parts)
    both = TensorSource(
        path=listing.path,
        files=(*base.files, *own.files),
        infos={**base.infos, **own.infos},
        reader=lambda name: (own if name in own.infos else base).read(name),
    )
    parts.sources.append(both)
    step = said.get("step")
    checkpoint = Checkpoint(
        path=listing.path,
        format=NAME,
        family=FAMILY,
        evidence=f"{HISTORY}: {len(said['edits'])} edits, base and NPT weights beside it",
        weights=both,
        layers=keys.layers,
        missing=keys.missing,
        unknown=keys.unknown,
        details=EditDetails(edits=said["edits"], config=config, base_keys=tuple(base.infos)),
        base_name=_base_name(said),
        step=step if isinstance(step, int) else None,
        training={"edits": said["edits"]},
    )
    _say_sound(parts, checkpoint, said)
    return checkpoint


def _say_sound(parts: Parts, checkpoint: Checkpoint, said: Mapping[str, Any]) -> None:
    parts.is_sound("config", f"{len(said['edits'])} edits")
    parts.is_sound("pollution", "edits")
    shown = ", ".join(str(layer.layer) for layer in checkpoint.layers)
    parts.is_sound("keys", f"{len(checkpoint.weights.infos)} keys; NPT layers {shown}")
    npt_delta.check_sizes(checkpoint.layers, parts)


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """The edits, in order."""
    details: EditDetails = checkpoint.details
    return {"edits": list(details.edits)}


def factors(checkpoint: Checkpoint, edit: int, layer: int, projection: str) -> "tuple[torch.Tensor, torch.Tensor]":
    """v_a and v_b of one matrix of an edit."""
    v_a, v_b = (checkpoint.weights.read(key(edit, layer, projection, side)) for side in ("v_a", "v_b"))
    return v_a, v_b


def matrices(edit: Mapping[str, Any]) -> dict[int, list[str]]:
    """The projections that an edit touches, by layer."""
    return _matrices(edit, Path())


FORMATS = (CheckpointFormat(name=NAME, family=FAMILY, matches=matches, describe=describe, read=read),)
