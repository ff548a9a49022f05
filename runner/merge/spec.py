"""What to merge and how, as conf/merge/*.yaml and the command line say it. Nothing heavy is imported here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from runner.errors import ConfigError, did_you_mean

RULES = ("layers", "average", "linear", "slerp")
ON_CONFLICT = ("first", "last", "error", "average", "newest")
FORMATS = ("pt", "safetensors")
VERIFY = ("bytes", "functional")


@dataclass(frozen=True, kw_only=True)
class SourceSpec:
    """One checkpoint to take layers (of a lora_moe: experts) from: all of them, or those named.

    `weight`: its share of an average, before the shares are made to sum to 1; 1 where it is not given.
    """

    path: str
    layers: tuple[int, ...] | None = None
    experts: tuple[int, ...] | None = None
    weight: float | None = None

    def recipe(self) -> dict[str, Any]:
        """As JSON values, without what is not given."""
        chosen = {"layers": self.layers, "experts": self.experts}
        given = {name: list(numbers) for name, numbers in chosen.items() if numbers is not None}
        return {"path": self.path, **given, **({} if self.weight is None else {"weight": self.weight})}


@dataclass(frozen=True, kw_only=True)
class MergeSpec:
    """One merge. `sources` as paths or {path, layers, experts, weight}; they become `SourceSpec`s here.

    `rule`: `layers` unites the layers (of a lora_moe: the experts) of all sources; `average` takes the mean of sources
    with the same layers, by their weights; `linear` and `slerp` go from the first of two such checkpoints (`t` = 0) to
    the second (`t` = 1). `layers` keeps only these of the union, `drop` leaves these out. `format` is that of the
    weights file; the experts of a lora_moe are safetensors always.
    `verify`: `bytes` is always done; `functional` also runs the models. `demo`: sources are made on the fly.
    """

    name: str
    rule: str = "layers"
    sources: Sequence[Any] = ()
    output: str | None = None
    on_conflict: str = "first"
    layers: Sequence[int] | None = None
    drop: Sequence[int] = ()
    t: float = 0.5
    format: str = "pt"
    verify: str = "bytes"
    force: bool = False
    dry_run: bool = False
    demo: bool = False

    def __post_init__(self) -> None:
        given = [self.sources] if isinstance(self.sources, str) else list(self.sources or ())
        object.__setattr__(self, "sources", tuple(map(_source, given)))
        object.__setattr__(self, "layers", _layers("merge.layers", self.layers))
        object.__setattr__(self, "drop", _layers("merge.drop", self.drop) or ())
        for key, known in (("rule", RULES), ("on_conflict", ON_CONFLICT), ("format", FORMATS), ("verify", VERIFY)):
            value = getattr(self, key)
            if value not in known:
                raise ConfigError(f"merge.{key}={value} is unknown{did_you_mean(str(value), known)}")
        for key in ("force", "dry_run", "demo"):
            if not isinstance(getattr(self, key), bool):
                raise ConfigError(f"merge.{key}={getattr(self, key)}: choose true or false")
        if isinstance(self.t, bool) or not isinstance(self.t, (int, float)) or not 0 <= self.t <= 1:
            raise ConfigError(f"merge.t={self.t}: give a number from 0 (the first source) to 1 (the second)")
        averages = self.rule == "average" or (self.rule == "layers" and self.on_conflict == "average")
        if not averages and any(source.weight is not None for source in self.sources):
            raise ConfigError("merge.sources: a weight is a source's share of an average; give merge=average")

    @property
    def shares(self) -> tuple[float, ...]:
        """The weights of the sources, which sum to 1."""
        weights = [1.0 if source.weight is None else source.weight for source in self.sources]
        return tuple(weight / sum(weights) for weight in weights)

    def recipe(self) -> dict[str, Any]:
        """What determines the output beside the sources' content, as JSON values."""
        recipe: dict[str, Any] = {
            "task": "merge",
            "rule": self.rule,
            "sources": [source.recipe() for source in self.sources],
            "layers": None if self.layers is None else list(self.layers),
            "drop": list(self.drop),
            "format": self.format,
        }
        if self.rule in ("linear", "slerp"):
            return recipe | {"t": self.t}
        return recipe | ({"on_conflict": self.on_conflict} if self.rule == "layers" else {})


def _source(value: Any) -> SourceSpec:
    if isinstance(value, SourceSpec):
        return value
    path = value.get("path", value) if isinstance(value, Mapping) else value
    if path is None or path == "":
        raise ConfigError("merge.sources: a source without a path; give the checkpoints to merge, as [A,B]")
    if isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return SourceSpec(path=str(value))
    if isinstance(value, Mapping) and "path" in value:
        known = [each.name for each in fields(SourceSpec)]
        for key in value:
            if key not in known:
                raise ConfigError(f"merge.sources: {key!r} is unknown{did_you_mean(str(key), known)}")
        return SourceSpec(
            path=str(value["path"]),
            layers=_some("layers", value.get("layers"), value["path"]),
            experts=_some("experts", value.get("experts"), value["path"]),
            weight=_weight(value.get("weight")),
        )
    raise ConfigError(f"merge.sources: {value!r} is neither a path nor {{path: …, layers: […]}}")


def _some(key: str, value: Any, path: Any) -> tuple[int, ...] | None:
    chosen = _layers(f"{key} of a source", value, key.removesuffix("s"))
    if chosen == ():
        raise ConfigError(f"{key} of {path}: an empty list takes nothing of it; leave the source out, or {key} for all")
    return chosen


def _weight(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e9:
        raise ConfigError(f"weight of a source: {value}: give a number above 0")
    return float(value)


def _layers(key: str, value: Any, what: str = "layer") -> tuple[int, ...] | None:
    if value is None:
        return None
    given = [value] if isinstance(value, int) else value
    whole = isinstance(given, Sequence) and all(type(layer) is int and layer >= 0 for layer in given)
    if isinstance(given, str) or not whole:
        raise ConfigError(f"{key}={value}: give {what} numbers, as [11,13]")
    if len(set(given)) < len(given):
        raise ConfigError(f"{key}={list(given)}: names {'an' if what == 'expert' else 'a'} {what} twice")
    return tuple(given)
