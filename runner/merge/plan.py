"""What a merge reads and what it will write, decided from headers alone; how its sources are held against each other.

Which tensors go where is a family's own knowledge: its `plan_merge` gives the `MergeOutput`.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from runner.checkpoints import model_directory
from runner.checkpoints.checkpoint import Checkpoint
from runner.errors import CheckpointError, ConfigError
from runner.files.file_type import sha256_of
from runner.merge.lazy_tensor import LazyTensor, contained
from runner.merge.spec import MergeSpec, SourceSpec

if TYPE_CHECKING:
    import torch

    from runner.evaluation.base_models import Base

SUMMARY = "merge_summary.json"
JsonObject = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Source:
    """One checkpoint that is merged: what the user asks of it, its path as the user names it, all files that are read.

    `order`: the names of its weights in the order in which its optimizer counts them, where that is merged.
    """

    spec: SourceSpec
    path: Path
    checkpoint: Checkpoint
    files: tuple[Path, ...]
    order: tuple[str, ...] = ()

    @property
    def step(self) -> int | None:
        """The step that its own state reports, else that of its name."""
        return self.checkpoint.step


@dataclass(frozen=True, kw_only=True)
class MergedTensor:
    """One tensor of an output, `names[i]` being its name in `sources[i]`.

    `how`: copy, average, linear or slerp, with the share of each source in `weights`; `layer`: what it belongs to.
    """

    name: str
    tensor: LazyTensor
    layer: int
    how: str
    sources: tuple[Source, ...]
    names: tuple[str, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class TensorFile:
    """One file with tensors, `name` relative to the output. `value`: plain containers with `LazyTensor`s in them.

    A name that ends in .safetensors chooses that layout, with `metadata` in its header; any other is torch.save's.
    `finite`: NaN or Inf is refused; else it is written as it is, and said.
    """

    name: str
    value: Mapping[Any, Any]
    metadata: Mapping[str, str] = field(default_factory=dict)
    finite: bool = True

    @property
    def is_safetensors(self) -> bool:
        """Whether it is written as safetensors, where `value` is `LazyTensor`s by name."""
        return self.name.endswith(".safetensors")

    @property
    def tensors(self) -> list[LazyTensor]:
        """Its tensors."""
        return contained(self.value)


@dataclass(frozen=True, kw_only=True)
class MergeOutput:
    """Everything that a merge writes and says.

    `weights`: the tensors as a reader of the output names them, in its order; they are among those of `tensor_files`.
    `texts`: JSON files by name; `copies`: other files, as bytes or as a file to copy. `card(hashes)`: text files by
    name, of the hashes of what was read. `summary`: merge_summary.json without the hashes of what was read. `details`,
    `layers`, `conflicts`: fields of the result. `content`: what the bytes must equal, in words.

    `read_back(checkpoint)`: of the written checkpoint, what was found as fields of the result, and how that is said.
    `check_functions(checkpoint, base, prompts)`: whether it computes what its sources do, in words; prompts are text →
    token ids [T]. Both raise RunnerError where it is not as it should be. Without the latter the whole is compared
    with the first source.
    """

    format: str
    family: str
    sources: tuple[Source, ...]
    weights: Mapping[str, LazyTensor]
    tensor_files: tuple[TensorFile, ...]
    texts: Mapping[str, JsonObject]
    copies: Mapping[str, bytes | Path] = field(default_factory=dict)
    card: Callable[[Mapping[str, str]], Mapping[str, str]] = lambda hashes: {}
    summary: JsonObject
    details: JsonObject
    step: int | None
    layers: tuple[JsonObject, ...] = ()
    findings: tuple[str, ...] = ()
    conflicts: tuple[JsonObject, ...] = ()
    content: str = "what the sources hold"
    read_back: Callable[[Checkpoint], tuple[JsonObject, str]]
    check_functions: "Callable[[Checkpoint, Base, Mapping[str, torch.Tensor]], str] | None" = None

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(tensor.numel for tensor in self.weights.values())

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors: what takes the time."""
        return sum(tensor.nbytes for file in self.tensor_files for tensor in file.tensors)


def check_distinct(sources: Sequence[Source]) -> None:
    """Raise ConfigError where two sources are one file, whatever their names."""
    seen: dict[tuple[int, int], Source] = {}
    for source in sources:
        stat = source.checkpoint.weights.files[0].stat()
        other = seen.setdefault((stat.st_dev, stat.st_ino), source)
        if other is not source:
            raise ConfigError(f"merge.sources: {source.path} is given twice (also as {other.path}); name it once")


S = TypeVar("S", bound=Source)


def furthest(sources: Sequence[S]) -> S:
    """The source that trained longest; the first of several, and of sources without a step."""
    return max(sources, key=lambda source: -1 if source.step is None else source.step)


def latest_step(sources: Sequence[Source]) -> int | None:
    """The highest step of the sources; None where none reports one."""
    return max((source.step for source in sources if source.step is not None), default=None)


def differing_dtypes(tensors: Sequence[MergedTensor]) -> list[str]:
    """What should be said of layers that are stored in several dtypes, and of dtypes that differ between layers."""
    said: dict[str, None] = {}
    for tensor in tensors:
        pairs = zip(tensor.sources, tensor.names, strict=True)
        found = {source.checkpoint.weights.infos[name].dtype_name for source, name in pairs}
        if len(found) > 1:
            written = tensor.tensor.dtype_name
            said[f"layer {tensor.layer} is stored as {' and '.join(sorted(found))}: it is written as {written}"] = None
    dtypes = sorted({tensor.tensor.dtype_name for tensor in tensors})
    return [*said, *([f"layers differ in dtype: {', '.join(dtypes)}"] if len(dtypes) > 1 else [])]


def interpolation_weights(spec: MergeSpec) -> tuple[float, ...]:
    """The share of each source under average, linear or slerp. Raises ConfigError for another number of sources."""
    if any(source.weight is not None for source in spec.sources) and spec.rule != "average":
        raise ConfigError("merge.sources: a weight is a source's share of an average; give merge=average")
    if spec.rule == "average":
        if len(spec.sources) < 2:
            raise ConfigError("merge=average takes the mean of several checkpoints: give two sources or more")
        return spec.shares
    if len(spec.sources) != 2:
        raise ConfigError(
            f"merge={spec.rule} goes from one checkpoint to another: give two sources, not {len(spec.sources)}"
        )
    return 1 - spec.t, spec.t


def base_written(sources: Sequence[Source], base: str | None, output: Path) -> tuple[str | None, list[str]]:
    """The base's name as a checkpoint at `output` has to write it: the first source's; `base` where no source has one.

    Beside it what should be said of it. A name that leads to no directory here (a hub name) stays as it is, and so does
    an absolute path.
    """
    named = next((source.checkpoint for source in sources if source.checkpoint.base_name), None)
    place = os.path.realpath(output)
    if named is None:
        return (base if base is None or not Path(base).is_dir() else os.path.relpath(os.path.realpath(base), place)), []
    name, found = str(named.base_name), named.local_base()
    if found is None or Path(name).is_absolute():
        return name, []
    for start in (output, output.parent):
        # `output` does not exist yet, so `..` after it is taken off by name.
        there = Path(os.path.normpath(os.path.realpath(start) / Path(name)))
        if there.is_dir():
            if there.samefile(found):
                return name, []
            break
    moved = os.path.relpath(os.path.realpath(found), place)
    return moved, [f"config.json names the base as {moved}, which leads there from {output}"] if moved != name else []


def check_bases(sources: Sequence[S], base: str | None, check_fit: Callable[[S, Path, JsonObject], None]) -> list[str]:
    """What should be said of the sources' bases. Raises CheckpointError where one does not fit its own, or two differ.

    `check_fit(source, base, config)` raises where they do not fit, by the base's config.json. `base` is the user's own
    answer for all sources. Bases under different names are compared by their weights where both are at hand; else their
    names are only said.
    """

    def fit(source: S, place: Path) -> None:
        if (place / model_directory.CONFIG).is_file():
            check_fit(source, place, model_directory.read_config(place))

    if base is not None:
        path = Path(base).expanduser()
        given = path if path.is_dir() else _in_hub_cache(base)
        if given is None:
            from runner.evaluation.base_models import is_hub_name

            if not is_hub_name(base):
                raise CheckpointError(f"base={base}: no such directory")
            return [f"base={base} is not at hand: whether the sources stand on it was not checked"]
        for source in sources:
            fit(source, given)
        return []
    groups: dict[str, list[Source]] = {}
    places: dict[str, Path | None] = {}
    for source in sources:
        name = source.checkpoint.base_name
        place = (source.checkpoint.local_base() or _in_hub_cache(name)) if name else None
        if place is not None:
            fit(source, place)
        if name:
            # One relative name leads to different places from different checkpoints.
            key = name if place is None else os.path.realpath(place)
            groups.setdefault(key, []).append(source)
            places[key] = place
    return _compared([(places[key], group) for key, group in groups.items()])


def _compared(groups: Sequence[tuple[Path | None, Sequence[Source]]]) -> list[str]:
    """What should be said of the first base and each other one. Raises CheckpointError where weights differ."""

    def named(group: Sequence[Source]) -> str:
        return f"{group[0].checkpoint.base_name} ({', '.join(str(source.path) for source in group)})"

    def hashes(place: Path) -> list[str]:
        return [sha256_of(file) for file in model_directory.open_model_weights(place).files]

    findings = []
    for place, group in groups[1:]:
        there, first = groups[0]
        names = f"the sources name different base models, {named(first)} and {named(group)}"
        if there is None or place is None:
            if first[0].checkpoint.base_name != group[0].checkpoint.base_name:
                findings.append(f"{names}; they are not both at hand, so only the sizes of layers were compared")
        elif hashes(there) == hashes(place):
            findings.append(f"{names}, which hold the same weights")
        else:
            raise CheckpointError(
                f"{names}, whose weights differ: layers of different bases cannot be merged; if this is wrong, name "
                "the one base as base="
            )
    return findings


def _in_hub_cache(name: str) -> Path | None:
    """Where the hub's cache has the model `name`."""
    from runner.evaluation.base_models import is_hub_name, snapshot

    if not is_hub_name(name):
        return None
    try:
        return snapshot("base", name, download=False)
    except CheckpointError:
        return None
