"""The checkpoints that a merge reads: opened, told apart, and checked against each other, all from headers."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from runner.checkpoints.checkpoint import Checkpoint, NptLayer
from runner.checkpoints.content import Kind, kind_of
from runner.errors import CheckpointError, ConfigError
from runner.families.npt import checkpoint as npt_delta
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
