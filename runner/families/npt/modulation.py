"""A modulation: the rank-k vectors (v_a, v_b) of each NPT layer that a prompt gave, in memory and as one file.

The file is safetensors: `layer_{i}.{gate|up|down}.{v_a|v_b}` [k, width], and in its metadata how it was made.
"""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes

from runner.errors import CheckpointError, RunnerError
from runner.families.npt.model import PROJECTIONS, Origin
from runner.files.atomic import write_whole
from runner.files.file_type import sha256_of
from runner.files.tensors import open_weights, owned

FORMAT = "runner-modulation/1"
Pair = tuple[torch.Tensor, torch.Tensor]
SPACES, KINDS, SIDES = ("weights", "vectors"), ("single", "dual", "triple"), ("v_a", "v_b")


@dataclass(frozen=True, kw_only=True)
class Source:
    """What one extraction read: `position` -1 and `mean` for the mean over all positions, else the first taken."""

    text: str | None
    ids: tuple[int, ...]
    position: int
    count: int = 1  # positions from there on
    mean: bool = False
    special_tokens: bool = False


@dataclass(frozen=True, kw_only=True)
class Modulation:
    """`m[layer][projection]` is (v_a [k, d_in], v_b [k, d_out]) on the CPU; [n, k, …] where it is of n positions.

    `active`: the NPT layers that were on when it was taken. `space`: in which it was combined; one that was extracted
    is the same in both. `expression`: how it was made, in names. `origin`: the model that it was taken from, or what a
    file says of that. `taken`: when, in ISO 8601.
    """

    vectors: Mapping[int, Mapping[str, Pair]]
    active: tuple[int, ...]
    space: str = "vectors"
    expression: str
    sources: tuple[Source, ...] = ()
    origin: Origin | Mapping[str, str] | None = None
    taken: str = ""

    def __getitem__(self, layer: int) -> Mapping[str, Pair]:
        return self.vectors[layer]

    @property
    def layers(self) -> list[int]:
        """The layers that it has, lowest first."""
        return list(self.vectors)

    @property
    def count(self) -> int:
        """For how many positions it is."""
        first = next(iter(next(iter(self.vectors.values())).values()))[0]
        return first.shape[0] if first.ndim == 3 else 1

    def kind(self, layer: int) -> str:
        """single, dual or triple."""
        return KINDS[len(self.vectors[layer]) - 1]

    def ranks(self, layer: int) -> int:
        """k."""
        return next(iter(self.vectors[layer].values()))[0].shape[-2]

    def magnitudes(self) -> dict[int, float]:
        """By layer: the mean Frobenius norm of its v_a's and v_b's; of one made in weight space that of its ΔW's."""
        measure = delta_norm if self.space == "weights" else _vector_norm
        return {
            layer: sum(measure(pair) for pair in pairs.values()) / len(pairs) for layer, pairs in self.vectors.items()
        }

    def delta_norms(self) -> dict[int, dict[str, float]]:
        """‖ΔW‖ (Frobenius) of each layer's projections."""
        return {layer: {name: delta_norm(p) for name, p in pairs.items()} for layer, pairs in self.vectors.items()}

    def mapped(self, change: Callable[[int, str, Pair], Pair], **fields: Any) -> "Modulation":
        """The same layers and projections with other vectors, and other `fields`."""
        vectors = {
            layer: {name: change(layer, name, pair) for name, pair in pairs.items()}
            for layer, pairs in self.vectors.items()
        }
        return Modulation(**{**vars(self), "vectors": vectors, **fields})

    def only(self, layers: Collection[int]) -> "Modulation":
        """Without its other layers."""
        return Modulation(**{**vars(self), "vectors": {i: pairs for i, pairs in self.vectors.items() if i in layers}})

    def require_finite(self) -> "Modulation":
        """Itself. Raises RunnerError that names the layer where it holds NaN or Inf."""
        for layer, pairs in self.vectors.items():
            for name, pair in pairs.items():
                for which, tensor in zip(("v_a", "v_b"), pair, strict=True):
                    if not bool(torch.isfinite(tensor).all()):
                        raise RunnerError(f"layer {layer}: {which} of {name} is not finite")
        return self

    def save(self, path: str | Path) -> None:
        """Write it as one safetensors file, whole or not at all. Raises RunnerError where that is not possible."""
        target = Path(path).expanduser()
        try:
            write_whole(target, self.to_bytes())
        except OSError as error:
            raise RunnerError(f"{target}: cannot be written: {error.strerror}") from error

    def to_bytes(self) -> bytes:
        """The file that `load` reads."""
        tensors = {
            f"layer_{layer}.{name}.{side}": tensor
            for layer, pairs in self.vectors.items()
            for name, pair in pairs.items()
            for side, tensor in zip(SIDES, pair, strict=True)
        }
        said: dict[str, Any] = {
            "texts": [source.text for source in self.sources],
            "ids": [source.ids for source in self.sources],
            "position": [source.position for source in self.sources],
            "count": [source.count for source in self.sources],
            "mean": [source.mean for source in self.sources],
            "special_tokens": [source.special_tokens for source in self.sources],
            "active_layers": self.active,
            "dtype": str(next(iter(tensors.values())).dtype).removeprefix("torch."),
        }
        plain = {"format": FORMAT, "space": self.space, "expression": self.expression, "taken": self.taken}
        words = {name: json.dumps(value) for name, value in said.items()}
        return to_bytes(owned(tensors), {**words, **plain, **identity(self.origin)})


def delta_norm(pair: Pair) -> float:
    """‖Σ_i v_b_i v_a_iᵀ‖ from the Gram matrices of v_a [k, d_in] and v_b [k, d_out]; of several positions the mean."""
    v_a, v_b = (tensor.double() for tensor in pair)
    squares = ((v_a @ v_a.mT) * (v_b @ v_b.mT)).sum((-2, -1)).clamp_min(0)
    return float(squares.sqrt().mean())


def _vector_norm(pair: Pair) -> float:
    return sum(float(tensor.float().norm(dim=(-2, -1)).mean()) for tensor in pair) / 2


def identity(origin: Origin | Mapping[str, str] | None) -> dict[str, str]:
    """The checkpoint and the base by path and by the SHA-256 of their weights."""
    if not isinstance(origin, Origin):
        return dict(origin or {})
    return {
        "checkpoint": str(origin.checkpoint),
        "checkpoint_sha256": _hash(origin.files, _stats(origin.files)),
        "base": str(origin.base or ""),
        "base_sha256": _hash(origin.base_files, _stats(origin.base_files)),
    }


def _stats(files: Sequence[Path]) -> tuple[tuple[int, int], ...]:
    return tuple((file.stat().st_size, file.stat().st_mtime_ns) for file in files)


@lru_cache(maxsize=8)
def _hash(files: Sequence[Path], stats: object) -> str:
    return ",".join(sha256_of(file) for file in files)


def load(path: str | Path) -> Modulation:
    """A modulation that `Modulation.save` wrote. Raises CheckpointError for another file."""
    path = Path(path).expanduser()
    weights = open_weights(path)
    said = weights.extras
    if said.get("format") != FORMAT:
        raise CheckpointError(f"{path}: is no modulation ({FORMAT}): its metadata does not say so")
    vectors: dict[int, dict[str, Pair]] = {}
    names = {tuple(name.split(".")) for name in weights.infos}
    try:
        layers = sorted({int(front.removeprefix("layer_")) for front, _, _ in names})
        for layer in layers:
            for name in PROJECTIONS:
                keys = [f"layer_{layer}.{name}.{side}" for side in ("v_a", "v_b")]
                if any(key in weights.infos for key in keys):
                    v_a, v_b = (weights.read(key).clone() for key in keys)
                    vectors.setdefault(layer, {})[name] = (v_a, v_b)
        known = {
            name: json.loads(said[name]) for name in ("texts", "ids", "position", "count", "mean", "special_tokens")
        }
        sources = tuple(
            Source(text=text, ids=tuple(ids), position=position, count=count, mean=mean, special_tokens=special)
            for text, ids, position, count, mean, special in zip(*known.values(), strict=True)
        )
        active = tuple(map(int, json.loads(said["active_layers"])))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged: its names or metadata are not those of a modulation") from error
    found = Modulation(
        vectors=vectors,
        active=active,
        space=str(said.get("space")),
        expression=str(said.get("expression", path.stem)),
        sources=sources,
        origin={k: str(v) for k, v in said.items() if k.removesuffix("_sha256") in ("checkpoint", "base")},
        taken=str(said.get("taken", "")),
    )
    return checked(found, path)


def checked(m: Modulation, where: object) -> Modulation:
    """`m`, whose tensors fit each other. Raises CheckpointError."""
    if not m.vectors or m.space not in SPACES:
        raise CheckpointError(f"{where}: damaged: a modulation without vectors, or of an unknown space")
    for layer, pairs in m.vectors.items():
        shapes = {tuple(tensor.shape[:-1]) for pair in pairs.values() for tensor in pair}
        whole = tuple(pairs) == PROJECTIONS[: len(pairs)]
        if not whole or len(shapes) != 1 or len(next(iter(shapes))) not in (1, 2) or 0 in next(iter(shapes)):
            raise CheckpointError(f"{where}: layer {layer}: its vectors do not fit each other")
    return m.require_finite()
