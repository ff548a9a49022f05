"""What to merge and how, as conf/merge/*.yaml and the command line say it. Nothing heavy is imported here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runner.config import did_you_mean
from runner.errors import ConfigError

RULES = ("layers", "linear", "slerp")
ON_CONFLICT = ("first", "last", "error", "average", "newest")
FORMATS = ("pt", "safetensors")
VERIFY = ("bytes", "functional")


@dataclass(frozen=True, kw_only=True)
class SourceSpec:
    """One checkpoint to take layers from: all of them, or those named."""

    path: str
    layers: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class MergeSpec:
    """One merge. `sources` as paths or {path, layers}; they become `SourceSpec`s here.

    `rule`: `layers` unites the layers of all sources; `linear` and `slerp` go from the first of two checkpoints with
    the same layers (`t` = 0) to the second (`t` = 1). `layers` keeps only these of the union, `drop` leaves these out.
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

    def recipe(self) -> dict[str, Any]:
        """What determines the output beside the sources' content, as JSON values."""
        recipe: dict[str, Any] = {
            "task": "merge",
            "rule": self.rule,
            "sources": [
                {"path": s.path, **({} if s.layers is None else {"layers": list(s.layers)})} for s in self.sources
            ],
            "layers": None if self.layers is None else list(self.layers),
            "drop": list(self.drop),
            "format": self.format,
        }
        return recipe | ({"on_conflict": self.on_conflict} if self.rule == "layers" else {"t": self.t})


def _source(value: Any) -> SourceSpec:
    if isinstance(value, SourceSpec):
        return value
    if isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return SourceSpec(path=str(value))
    if isinstance(value, Mapping) and "path" in value:
        for key in value:
            if key not in ("path", "layers"):
                raise ConfigError(f"merge.sources: {key!r} is unknown{did_you_mean(str(key), ('path', 'layers'))}")
        return SourceSpec(path=str(value["path"]), layers=_layers("layers of a source", value.get("layers")))
    raise ConfigError(f"merge.sources: {value!r} is neither a path nor {{path: …, layers: […]}}")


def _layers(key: str, value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    given = [value] if isinstance(value, int) else value
    whole = isinstance(given, Sequence) and all(type(layer) is int and layer >= 0 for layer in given)
    if isinstance(given, str) or not whole:
        raise ConfigError(f"{key}={value}: give layer numbers, as [11,13]")
    if len(set(given)) < len(given):
        raise ConfigError(f"{key}={list(given)}: names a layer twice")
    return tuple(given)
