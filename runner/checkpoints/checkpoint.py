"""What a checkpoint is, once its format is known: names, shapes, lazy tensors, and where it came from.

What files say, as plain JSON values: for `task=inspect`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.errors import CheckpointError
from runner.files.stubs import Inert
from runner.files.tensors import TensorInfo, TensorSource, is_tensor, open_weights

if TYPE_CHECKING:
    import torch


# The most problems that an error, or a row of a test, lists.
MOST_SHOWN = 4


class Severity(Enum):
    """What a problem of a checkpoint stops: its opening; only a test of it, which fails; or nothing, but it is said."""

    REFUSED = "refused"
    FAILED = "failed"
    ODD = "odd"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is wrong with one part of a checkpoint; `part` is named as the check that lists it, as files or keys.

    `advice`: what to do about it, where that is another thing than for the part's other problems.
    """

    part: str
    text: str
    severity: Severity = Severity.REFUSED
    advice: str | None = None


@dataclass(frozen=True, kw_only=True)
class NptLayer:
    """One NPT layer: `keys[projection][matrix]` are its tensors' names, one for each of the k rank-1 terms."""

    layer: int
    modulation: str
    np_rank: int
    num_ranks: int
    hidden_size: int
    intermediate_size: int
    parameters: int
    keys: Mapping[str, Mapping[str, tuple[str, ...]]]

    def summary(self) -> dict[str, Any]:
        """The layer's row of the result contract, without figures."""
        return {
            "layer": self.layer,
            "modulation": self.modulation,
            "np_rank": self.np_rank,
            "num_ranks": self.num_ranks,
            "parameters": self.parameters,
        }


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An opened checkpoint. Nothing but headers has been read.

    `details` is what its format read from names and shapes beyond the fields here: for its family alone.
    """

    path: Path
    format: str
    family: str
    evidence: str  # what decided the format
    weights: TensorSource
    details: Any = None
    layers: tuple[NptLayer, ...] = ()
    base_name: str | None = None  # the base model's name as the checkpoint writes it
    step: int | None = None  # that of the checkpoint's own state
    training: Mapping[str, Any] = field(default_factory=dict)
    missing: tuple[str, ...] = ()  # names that its format needs and that are not there
    unknown: tuple[str, ...] = ()  # names that its format does not know
    findings: tuple[str, ...] = ()

    def require_complete(self) -> None:
        """Raise CheckpointError with every missing and unknown name, for whoever needs all of the weights."""
        if self.missing or self.unknown:
            raise CheckpointError(
                f"{self.path}: missing keys {sorted(self.missing)}, unexpected keys {sorted(self.unknown)}"
            )

    def local_base(self) -> Path | None:
        """The directory of the base model that it names: beside it, beside its directory, or in the current one."""
        if not self.base_name:
            return None
        places = (start / self.base_name for start in (self.directory, self.directory.parent, Path()))
        return next((Path(os.path.normpath(place)) for place in places if place.is_dir()), None)

    @property
    def directory(self) -> Path:
        """Where its other files lie, and what its relative names start from."""
        return self.path if self.path.is_dir() else self.path.parent


@dataclass(frozen=True)
class Listing:
    """What lies at a path: a directory's entries, or one file. Formats recognise themselves in it."""

    path: Path
    entries: tuple[str, ...]
    _opened: dict[str, TensorSource] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, path: Path) -> Listing:
        """The listing of an existing file or directory. Raises CheckpointError when there is none."""
        try:
            if path.is_dir():
                return cls(path, tuple(sorted(entry.name for entry in path.iterdir())))
            if path.exists():
                return cls(path, (path.name,))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be listed: {error.strerror}") from error
        if path.is_symlink():
            raise CheckpointError(f"{path}: is a link to {path.readlink()}, which does not exist")
        raise CheckpointError(f"{path}: no such file or directory")

    def file(self, name: str) -> Path:
        """The path of one of the entries."""
        return self.path / name if self.path.is_dir() else self.path

    def weights(self, name: str) -> TensorSource:
        """The tensors of one weights file, headers only, opened once. Raises CheckpointError as `open_weights`."""
        if name not in self._opened:
            self._opened[name] = open_weights(self.file(name))
        return self._opened[name]

    def names(self, name: str) -> list[str]:
        """The tensors' names of one weights file; none where it cannot be read."""
        try:
            return list(self.weights(name).infos)
        except CheckpointError:
            return []


@dataclass(frozen=True, kw_only=True)
class Sound:
    """What a part without problems holds: a line for people, `data` for machines."""

    text: str
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """`checkpoint`: None where a part is missing without which there is none. `files`: those that hold its weights,
    readable or not; `sources`: those that could be opened; `beside` opens tensors that are no weights, but finite as
    they are.
    """

    path: Path
    checkpoint: Checkpoint | None
    files: tuple[Path, ...]
    sources: tuple[TensorSource, ...] = ()
    beside: tuple[Callable[[], TensorSource], ...] = ()
    problems: tuple[Problem, ...] = ()
    sound: Mapping[str, Sound] = field(default_factory=dict)

    def open(self) -> Checkpoint:
        """The checkpoint. Raises CheckpointError with every problem that stands against opening it."""
        raise_refused(self.problems, self.path)
        assert self.checkpoint is not None, "a checkpoint, or what stands against it"
        return self.checkpoint


def raise_refused(problems: Sequence[Problem], path: Path) -> None:
    """Raise CheckpointError with what stands against opening what lies at `path`: the first of many, and how many."""
    texts = list(dict.fromkeys(problem.text for problem in problems if problem.severity is Severity.REFUSED))
    if texts:
        lead = texts[0].partition(": ")[0]  # the place, mostly: said once
        shown = "; ".join([texts[0], *(text.removeprefix(f"{lead}: ") for text in texts[1:MOST_SHOWN])])
        shown += f"; … ({len(texts)} in all)" if len(texts) > MOST_SHOWN else ""
        raise CheckpointError(shown if str(path) in shown else f"{path}: {shown}")


@dataclass(frozen=True, kw_only=True)
class CheckpointFormat:
    """One format: how it recognises itself, how it is read, what `task=inspect` says of it.

    `matches` gives the evidence from names and shapes, or None; it never raises for another format's files.
    `read` gives every part with its problems (reading.py); a format with `open` alone gives the checkpoint or raises
    CheckpointError. `describe` gives further fields of the result contract. A damaged checkpoint that nothing matches
    is of the format that it most `resembles`, or of the one of whose training most `remains` where the weights are
    lost: 0 is not at all, and more the less another format could look like that.
    `adapters`: a few megabytes beside its base, unless something is wrong. `decides`: where it matches, its files may
    look like another format's and are not.
    """

    name: str
    family: str
    matches: Callable[[Listing], str | None]
    describe: Callable[[Checkpoint], dict[str, Any]]
    open: Callable[[Listing], Checkpoint] | None = None
    read: Callable[[Listing], Reading] | None = None
    resembles: Callable[[Listing], int] | None = None
    remains: Callable[[Listing], int] | None = None
    adapters: bool = False
    decides: bool = False

    def __post_init__(self) -> None:
        assert self.read or self.open, f"{self.name}: a format needs read or open"
        if self.read and not self.open:
            read = self.read
            object.__setattr__(self, "open", lambda listing: read(listing).open())


# What writes a converted checkpoint into a directory; it returns where each checkpoint lies in it (".": the directory
# itself) and the tensors that it must hold, each read when it is called.
Expected = Mapping[str, Mapping[str, Callable[[], "torch.Tensor"]]]
Writer = Callable[[Path], Expected]

# Longer lists and texts of a foreign file are cut: inspect shows what is there, not all of it.
_ITEMS, _CHARACTERS = 200, 2000


def plain(value: Any, depth: int = 6) -> Any:
    """`value` as JSON values: tensors as dtype and shape, foreign objects as their state, long things cut."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        return value if len(value) <= _CHARACTERS else f"{value[:_CHARACTERS]}… ({len(value)} characters)"
    if is_tensor(value):
        return f"{dtype_name(value.dtype)} {list(value.shape)}"
    if depth == 0:
        return "…"
    if isinstance(value, Inert):
        return plain(value.state, depth) if value.state and "state" not in value.state else repr(value)[:_CHARACTERS]
    if isinstance(value, Mapping):
        return {str(key): plain(item, depth - 1) for key, item in list(value.items())[:_ITEMS]}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item, depth - 1) for item in list(value)[:_ITEMS]]
    return repr(value)[:_CHARACTERS]


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def describe_training(state: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Step, learning rates, optimizer, scheduler and mixed precision of a training state."""
    optimizer, scheduler = state.get("optimizer_state_dict"), state.get("scheduler_state_dict")
    found = optimizer.get("param_groups") if isinstance(optimizer, Mapping) else None
    groups = list(found) if isinstance(found, (list, tuple)) else []
    rates = [group["lr"] for group in groups if isinstance(group, Mapping) and "lr" in group]
    scaler = state.get("scaler_state_dict")
    shown = ("step", "global_step", "batch_count", "current_epoch", "best_val_loss")
    return {
        **{name: plain(state[name]) for name in shown if state.get(name) is not None},
        "learning_rates": plain(rates) if rates else plain(config.get("learning_rate")),
        "optimizer": _optimizer(optimizer, groups),
        "scheduler": plain(scheduler),
        "mixed_precision": (isinstance(scaler, Mapping) and len(scaler) > 0) or plain(config.get("mixed_precision")),
        "config": plain(config or state.get("config")),
    }


def _optimizer(optimizer: Any, groups: list[Any]) -> dict[str, Any] | None:
    if not isinstance(optimizer, Mapping):
        return None
    moments = optimizer.get("state")
    return {
        "groups": [
            {name: plain(value) for name, value in group.items() if name != "params"}
            for group in groups
            if isinstance(group, Mapping)
        ],
        "parameters_with_moments": len(moments) if isinstance(moments, Mapping) else 0,
    }


def totals(infos: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """`keys`, `parameters`, `bytes`, and the number of tensors of each dtype."""
    return {
        "keys": len(infos),
        "parameters": sum(info.numel for info in infos.values()),
        "bytes": sum(info.nbytes for info in infos.values()),
        "dtypes": dict(Counter(info.dtype_name for info in infos.values())),
    }


def components(checkpoint: Checkpoint, group_of: Callable[[str], str]) -> list[dict[str, Any]]:
    """Tensors, parameters and bytes of each group of names, in file order."""
    groups: dict[str, dict[str, TensorInfo]] = {}
    for name, info in checkpoint.weights.infos.items():
        groups.setdefault(group_of(name), {})[name] = info
    return [
        {"component": group, **{k: v for k, v in totals(infos).items() if k != "dtypes"}}
        for group, infos in groups.items()
    ]


def tensor_readers(weights: TensorSource) -> dict[str, Callable[[], torch.Tensor]]:
    """What reads each tensor, by name."""
    return {name: partial(weights.read, name) for name in weights.infos}
