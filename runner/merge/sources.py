"""The checkpoints that a merge reads: opened, told apart, and checked against each other, all from headers.

Whether the sources of a merge stand on one base model, as far as names, shapes and files at hand tell.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from runner.checkpoints import model_directory as hf
from runner.checkpoints.checkpoint import Checkpoint, NptLayer
from runner.errors import CheckpointError, ConfigError
from runner.evaluation.base_models import is_hub_name, snapshot
from runner.families.npt import checkpoint as npt_delta
from runner.files.file_type import Kind, kind_of, sha256_of
from runner.merge.spec import SourceSpec


@dataclass(frozen=True, kw_only=True)
class Source:
    """One npt_delta checkpoint and the layers that are taken from it.

    `order`: the names of its weights in the order in which its optimizer counts them. `weight`: its share of an
    average, not yet made to sum to 1 with those of others.
    """

    path: Path
    checkpoint: Checkpoint
    layers: Mapping[int, NptLayer]
    order: tuple[str, ...]
    weight: float = 1.0

    @property
    def step(self) -> int | None:
        """The step that its own state reports, else that of its name."""
        return self.checkpoint.step

    @property
    def config(self) -> Mapping[str, Any]:
        """Its config.json; {} where there is none."""
        return self.checkpoint.training["config"]

    @property
    def merge_info(self) -> Mapping[str, Any]:
        """What an earlier merge left in it; {} where it is none."""
        info = self.config.get("merge_info") or self.checkpoint.training["state"].get("merge_info")
        return info if isinstance(info, Mapping) else {}

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that the merge reads."""
        names = (npt_delta.TRAINING_STATE, npt_delta.MULTI_LAYER_STATE, npt_delta.CONFIG)
        beside = [self.checkpoint.directory / name for name in names]
        return (*self.checkpoint.weights.files, *(file for file in beside if file.is_file()))

    def origins(self, layer: int) -> list[str]:
        """Where its layer comes from: itself, or what was merged into it before."""
        known = self.merge_info.get("layer_sources")
        known = known if isinstance(known, Mapping) else {}
        found = known.get(layer, known.get(str(layer), str(self.path)))
        return [str(path) for path in found] if isinstance(found, (list, tuple)) else [str(found)]

    def layer_step(self, layer: int) -> int | None:
        """The step to which its layer was trained: its own, or that of what was merged into it before."""
        known = self.merge_info.get("layer_steps")
        found = known.get(layer, known.get(str(layer))) if isinstance(known, Mapping) else None
        return found if type(found) is int else self.step

    def merged_from(self) -> list[str]:
        """The checkpoints that it stands for: itself, or those that were merged into it."""
        found = self.merge_info.get("merged_from")
        return [str(path) for path in found] if isinstance(found, (list, tuple)) and found else [str(self.path)]


def open_source(spec: SourceSpec, path: Path, checkpoint: Checkpoint) -> Source:
    """`checkpoint`, found at `path`, with the layers that `spec` takes of it.

    Raises CheckpointError where it holds no NPT weights or not all of them, ConfigError for a layer that it lacks.
    """
    if checkpoint.format != npt_delta.NAME:
        raise CheckpointError(
            f"{path}: No NPT layers to merge: its format is {checkpoint.format} ({checkpoint.evidence}), not npt_delta"
        )
    if spec.experts is not None:
        raise ConfigError(f"{path}: has no experts, it is an npt_delta; choose layers: […] of it")
    checkpoint.require_complete()
    layers = {layer.layer: layer for layer in checkpoint.layers}
    if spec.layers is not None:
        for layer in spec.layers:
            if layer not in layers:
                raise ConfigError(f"{path}: has no NPT layer {layer}; it has {', '.join(map(str, layers))}")
        layers = {index: layer for index, layer in layers.items() if index in spec.layers}
    weight = 1.0 if spec.weight is None else spec.weight
    return Source(path=path, checkpoint=checkpoint, layers=layers, order=_optimizer_order(checkpoint), weight=weight)


def _optimizer_order(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The names by the index under which an optimizer state beside them counts them.

    That is their order in the file, but safetensors' own writer sorts names, dtype by dtype, and so loses it: where
    they are sorted, it is the order that the format's parameters have.
    """
    infos = checkpoint.weights.infos
    names = tuple(infos)
    (file, *_) = checkpoint.weights.files
    dtypes = list(dict.fromkeys(infos[name].dtype for name in names))
    by_dtype = sorted(names, key=lambda name: (dtypes.index(infos[name].dtype), name))
    if kind_of(file) is not Kind.SAFETENSORS or list(names) not in (sorted(names), by_dtype):
        return names
    return tuple(
        name
        for layer in checkpoint.layers
        for matrices in layer.keys.values()
        for names_of_matrix in matrices.values()
        for name in names_of_matrix
    )


class Opened(Protocol):
    """A source of any format: its path as the user names it, and the checkpoint there."""

    @property
    def path(self) -> Path:
        """As the user names it."""

    @property
    def checkpoint(self) -> Checkpoint:
        """What lies there."""


def check_distinct(sources: Sequence[Opened]) -> None:
    """Raise ConfigError where two sources are one file, whatever their names."""
    seen: dict[tuple[int, int], Opened] = {}
    for source in sources:
        stat = source.checkpoint.weights.files[0].stat()
        other = seen.setdefault((stat.st_dev, stat.st_ino), source)
        if other is not source:
            raise ConfigError(f"merge.sources: {source.path} is given twice (also as {other.path}); name it once")


def check_sizes(sources: Sequence[Source]) -> None:
    """Raise CheckpointError where layers are made for different hidden or MLP sizes: they have different bases."""
    first: tuple[Source, NptLayer] | None = None
    for source in sources:
        for layer in source.layers.values():
            first = first or (source, layer)
            a, b = first[1], layer
            if (a.hidden_size, a.intermediate_size) != (b.hidden_size, b.intermediate_size):
                raise CheckpointError(
                    f"{source.path}: layer {b.layer} is made for hidden size {b.hidden_size} and MLP size "
                    f"{b.intermediate_size}, but layer {a.layer} of {first[0].path} for {a.hidden_size} and "
                    f"{a.intermediate_size}; they stand on different base models and cannot be merged"
                )


def furthest(sources: Sequence[Source]) -> Source:
    """The source that trained longest; the first of several, and of sources without a step."""
    return max(sources, key=lambda source: -1 if source.step is None else source.step)


def rebased(source: Opened, output: Path) -> str | None:
    """The name of the source's base as a checkpoint at `output` has to write it, to mean the same.

    A name that leads to no directory here (a hub name) stays as it is, and so does an absolute path.
    """
    name, found = source.checkpoint.base_name, source.checkpoint.local_base()
    if name is None or found is None or Path(name).is_absolute():
        return name
    for place in (output, output.parent):
        # `output` does not exist yet, so `..` after it is taken off by name.
        there = Path(os.path.normpath(os.path.realpath(place) / Path(name)))
        if there.is_dir():
            if there.samefile(found):
                return name
            break
    return os.path.relpath(os.path.realpath(found), os.path.realpath(output))


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
