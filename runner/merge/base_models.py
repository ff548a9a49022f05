"""Whether the sources of a merge stand on one base model, as far as names, shapes and files at hand tell."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from runner.checkpoints.content import sha256_of
from runner.errors import CheckpointError
from runner.families.hf import checkpoint as hf
from runner.hub import is_hub_name, snapshot
from runner.merge.sources import Opened, Source

S = TypeVar("S", bound=Opened)


def check_bases(sources: Sequence[S], base: str | None, check_fit: Callable[[S, Path], None]) -> list[str]:
    """What should be said of the sources' bases. Raises CheckpointError where one does not fit its own, or two differ.

    `check_fit(source, base)` raises where they do not fit. `base` is the user's own answer for all sources. Bases under
    different names are compared by their weights where both are at hand; else their names are only said.
    """
    if base is not None:
        path = Path(base).expanduser()
        given = path if path.is_dir() else _in_hub_cache(base)
        if given is None and not is_hub_name(base):
            raise CheckpointError(f"base={base}: no such directory")
        if given is None:
            return [f"base={base} is not at hand: whether the sources stand on it was not checked"]
        for source in sources:
            check_fit(source, given)
        return []
    groups: dict[str, list[S]] = {}
    places: dict[str, Path | None] = {}
    for source in sources:
        name = source.checkpoint.base_name
        place = _at_hand(source, name) if name else None
        if place is not None:
            check_fit(source, place)
        if name:
            # One relative name leads to different places from different checkpoints.
            key = name if place is None else os.path.realpath(place)
            groups.setdefault(key, []).append(source)
            places[key] = place
    return _compared([(places[key], group) for key, group in groups.items()])


def _compared(groups: Sequence[tuple[Path | None, Sequence[Opened]]]) -> list[str]:
    """What should be said of the first base and each other one. Raises CheckpointError where weights differ."""
    findings = []
    for place, group in groups[1:]:
        there, first = groups[0]
        names = f"the sources name different base models, {_named(first)} and {_named(group)}"
        if there is None or place is None:
            if first[0].checkpoint.base_name != group[0].checkpoint.base_name:
                findings.append(f"{names}; they are not both at hand, so only the sizes of layers were compared")
        elif _weights(there) == _weights(place):
            findings.append(f"{names}, which hold the same weights")
        else:
            raise CheckpointError(
                f"{names}, whose weights differ: layers of different bases cannot be merged; if this is wrong, name "
                "the one base as base="
            )
    return findings


def _named(group: Sequence[Opened]) -> str:
    """The name of a base and who names it."""
    return f"{group[0].checkpoint.base_name} ({', '.join(str(source.path) for source in group)})"


def _weights(place: Path) -> list[str]:
    """The hashes of a base's weight files."""
    return [sha256_of(file) for file in hf.open_model_weights(place).files]


def check_layers(source: Source, base: Path) -> None:
    """Raise CheckpointError where the base's config.json says that a layer cannot stand on it."""
    if not (base / hf.CONFIG).is_file():
        return
    config: dict[str, Any] = hf.read_config(base)
    for layer in source.layers.values():
        sizes = {"hidden_size": layer.hidden_size, "intermediate_size": layer.intermediate_size}
        for key, size in sizes.items():
            if config.get(key) not in (None, size):
                raise CheckpointError(
                    f"{source.path}: layer {layer.layer} is made for {key} {size}, but its base {base} has "
                    f"{config[key]}; give the right one as base="
                )
        depth = config.get("num_hidden_layers")
        if isinstance(depth, int) and layer.layer >= depth:
            raise CheckpointError(
                f"{source.path}: has NPT layer {layer.layer}, but its base {base} has only the layers 0 to "
                f"{depth - 1}; give the right one as base="
            )


def _at_hand(source: Opened, name: str) -> Path | None:
    """Where the base lies that a checkpoint names: beside it, in the current directory, or in the hub's cache."""
    if found := source.checkpoint.local_base():
        return found
    return _in_hub_cache(name)


def _in_hub_cache(name: str) -> Path | None:
    """Where the hub's cache has the model `name`."""
    if not is_hub_name(name):
        return None
    try:
        return snapshot("base", name, download=False)
    except CheckpointError:
        return None
