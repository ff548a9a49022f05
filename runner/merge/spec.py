"""What to merge and how, as conf/merge/*.yaml and the command line say it. Nothing heavy is imported here."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from runner.errors import ConfigError, did_you_mean
from runner.merge.mergekit import layer_range, read_recipe
from runner.merge.recipe import METHODS, Part, Recipe, Setting, Slice, check_names

# What checkpoints of layers, experts and GPTs are merged by; whole models and adapters know METHODS as well.
FAMILY_RULES = ("layers", "average", "linear", "slerp")
# Of adapters alone; `mergekit` stands for a file that names one of METHODS.
ADAPTER_RULES = ("cat", "svd", "into_base")
RULES = tuple(dict.fromkeys((*FAMILY_RULES, *METHODS, *ADAPTER_RULES, "mergekit")))
ON_CONFLICT = ("first", "last", "error", "average", "newest")
FORMATS = ("pt", "safetensors")
VERIFY = ("bytes", "functional")
DTYPES = ("float64", "float32", "float16", "bfloat16")
# The parameters that each source may have of its own.
_OF_A_SOURCE = tuple(dict.fromkeys(name for method in METHODS.values() for name in method.each))


@dataclass(frozen=True, kw_only=True)
class SourceSpec:
    """One checkpoint to take layers (of a lora_moe: experts) from: all of them, or those named.

    `weight`: its share of an average, before the shares are made to sum to 1; 1 where it is not given. Of a whole model
    or adapter `weight` and `parameters` are settings of the method, and `layer_range` the layers [start, stop) that
    passthrough takes.
    """

    path: str
    layers: tuple[int, ...] | None = None
    experts: tuple[int, ...] | None = None
    weight: Setting = None
    layer_range: tuple[int, int] | None = None
    parameters: Mapping[str, Setting] = field(default_factory=dict)

    @property
    def settings(self) -> Mapping[str, Setting]:
        """Its parameters of the method, the weight among them."""
        return {**self.parameters, **({} if self.weight is None else {"weight": self.weight})}

    def recipe(self) -> dict[str, Any]:
        """As JSON values, without what is not given."""
        chosen = {"layers": self.layers, "experts": self.experts, "layer_range": self.layer_range}
        given = {name: list(numbers) for name, numbers in chosen.items() if numbers is not None}
        return {
            "path": self.path,
            **given,
            **({} if self.weight is None else {"weight": self.weight}),
            **self.parameters,
        }


@dataclass(frozen=True, kw_only=True)
class MergeSpec:
    """One merge. `sources` as paths or {path, layers, experts, weight}; they become `SourceSpec`s here.

    `rule`: `layers` unites the layers (of a lora_moe: the experts) of all sources; `average` takes the mean of sources
    with the same layers, by their weights; `linear` and `slerp` go from the first of two such checkpoints (`t` = 0) to
    the second (`t` = 1). `layers` keeps only these of the union, `drop` leaves these out. `format` is that of the
    weights file; the experts of a lora_moe, whole models and adapters are safetensors always.
    `verify`: `bytes` is always done; `functional` also runs the models. `demo`: sources are made on the fly.

    Of whole models and adapters: `parameters` of the method, `base` and `dtype` (None: as stored), `tokenizer`: union
    or base, `shard_size` in GB, `rank` of what svd writes, `file`: a mergekit YAML in place of all that.
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
    base: str | None = None
    parameters: Mapping[str, Setting] = field(default_factory=dict)
    dtype: str | None = None
    tokenizer: str | None = None
    shard_size: float = 5.0
    rank: int | None = None
    seed: int = 0
    file: str | None = None
    recipe_of_file: Recipe | None = None

    def __post_init__(self) -> None:
        given = [self.sources] if isinstance(self.sources, str) else list(self.sources or ())
        object.__setattr__(self, "sources", tuple(map(_source, given)))
        object.__setattr__(self, "layers", _layers("merge.layers", self.layers))
        object.__setattr__(self, "drop", _layers("merge.drop", self.drop) or ())
        object.__setattr__(self, "parameters", plain(self.parameters or {}))
        for key, known in (
            ("rule", RULES), ("on_conflict", ON_CONFLICT), ("format", FORMATS), ("verify", VERIFY),
            ("dtype", (None, *DTYPES)), ("tokenizer", (None, "union", "base")),
        ):  # fmt: skip
            value = getattr(self, key)
            if value not in known:
                raise ConfigError(f"merge.{key}={value} is unknown{did_you_mean(str(value), [k for k in known if k])}")
        for key in ("force", "dry_run", "demo"):
            if not isinstance(getattr(self, key), bool):
                raise ConfigError(f"merge.{key}={getattr(self, key)}: choose true or false")
        if isinstance(self.t, bool) or not isinstance(self.t, (int, float)) or not 0 <= self.t <= 1:
            raise ConfigError(f"merge.t={self.t}: give a number from 0 (the first source) to 1 (the second)")
        if not _is_number(self.shard_size) or self.shard_size <= 0:
            raise ConfigError(f"merge.shard_size={self.shard_size}: give a number of GB above 0")
        if self.rank is not None and (type(self.rank) is not int or self.rank < 1):
            raise ConfigError(f"merge.rank={self.rank}: give a whole number from 1")
        if type(self.seed) is not int or self.seed < 0:
            raise ConfigError(f"merge.seed={self.seed}: give a whole number from 0")
        self._check_weights()

    def _check_weights(self) -> None:
        weights = [source.weight for source in self.sources if source.weight is not None]
        if self.rule in ("average", "layers"):
            for weight in weights:
                if not _is_number(weight) or not 0 < weight < 1e9:
                    raise ConfigError(f"weight of a source: {weight}: give a number above 0")
        if weights and self.rule == "layers" and self.on_conflict != "average":
            raise ConfigError("merge.sources: a weight is a source's share of an average; give merge=average")
        if self.rule in METHODS and self.recipe_of_file is None:
            check_names(self.rule, self.parameters, [source.settings for source in self.sources])

    @property
    def shares(self) -> tuple[float, ...]:
        """The weights of the sources, which sum to 1. Raises ConfigError where one is no number above 0."""
        weights = [1.0 if source.weight is None else source.weight for source in self.sources]
        if not all(_is_number(weight) and weight > 0 for weight in weights):
            raise ConfigError(f"merge={self.rule}: the weights of these sources must be numbers above 0")
        return tuple(weight / sum(weights) for weight in weights)

    def read_file(self) -> "MergeSpec":
        """The merge that `file` describes, with the keys here. Raises ConfigError."""
        if self.rule != "mergekit":
            return self
        if not self.file:
            raise ConfigError("merge.file is needed: a mergekit YAML file, as merge=FILE.yml")
        if self.sources or self.base:
            raise ConfigError(f"merge.sources and merge.base stand in {self.file}; leave them out")
        models, recipe = read_recipe(Path(self.file).expanduser())
        sources = [SourceSpec(path=path) for path in models]
        return replace(self, rule=recipe.method, sources=sources, recipe_of_file=recipe)

    def models(self) -> Recipe:
        """What is asked for, as a recipe over the sources, whose last is the base where `base` names one.

        Raises ConfigError where the rule is none for whole models.
        """
        if self.recipe_of_file is not None:
            recipe = self.recipe_of_file
            return recipe if self.dtype is None else replace(recipe, dtype=self.dtype)
        if self.layers is not None or self.drop:
            raise ConfigError("merge.layers and merge.drop are for NPT layers; whole models take layer_range")
        method, parameters = self.rule, dict(self.parameters)
        settings = [dict(source.settings) for source in self.sources]
        if self.rule == "average":
            method, settings = "linear", [{"weight": 1.0, **each} for each in settings]
        elif self.rule == "linear" and not any("weight" in each for each in settings) and "weight" not in parameters:
            if len(settings) != 2:
                raise ConfigError("merge=linear: give each source a weight, as {path: …, weight: 0.5}")
            settings = [{"weight": weight} for weight in (1 - self.t, self.t)]
        elif self.rule == "slerp":
            parameters.setdefault("t", self.t)
        if method not in METHODS:
            raise ConfigError(f"merge={self.rule} is not for whole models; choose {', '.join(('average', *METHODS))}")
        parts = [
            Part(source=number, layers=source.layer_range, parameters=each)
            for number, (source, each) in enumerate(zip(self.sources, settings, strict=True))
        ]
        sliced = [part.layers is not None for part in parts]
        if any(sliced) and (method != "passthrough" or not all(sliced)):
            raise ConfigError("layer_range is for merge=passthrough, and then of every source")
        slices = [Slice(parts=(part,)) for part in parts] if method == "passthrough" else [Slice(parts=tuple(parts))]
        if method == "passthrough" and len(slices) > 1 and not any(sliced):
            raise ConfigError("merge=passthrough: give each source its layers, as {path: …, layer_range: [0,16]}")
        return Recipe(
            method=method,
            slices=tuple(slices),
            parameters=parameters,
            base=None if self.base is None else len(self.sources),
            dtype=self.dtype,
            tokenizer=self.tokenizer,
        )

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
        if self.recipe_of_file is not None:
            return recipe | {"mergekit": self.recipe_of_file.text, "dtype": self.dtype, "seed": self.seed}
        given = {name: getattr(self, name) for name in ("base", "parameters", "dtype", "tokenizer", "rank", "seed")}
        recipe |= {name: value for name, value in given.items() if value}
        if self.rule in ("linear", "slerp"):
            return recipe | {"t": self.t}
        return recipe | ({"on_conflict": self.on_conflict} if self.rule == "layers" else {})


def plain(value: Any) -> Any:
    """A config's containers as dicts and lists."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    return value


def _source(value: Any) -> SourceSpec:
    if isinstance(value, SourceSpec):
        return value
    path = value.get("path", value) if isinstance(value, Mapping) else value
    if path is None or path == "":
        raise ConfigError("merge.sources: a source without a path; give the checkpoints to merge, as [A,B]")
    if isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return SourceSpec(path=str(value))
    if isinstance(value, Mapping) and "path" in value:
        known = [each.name for each in fields(SourceSpec) if each.name != "parameters"] + list(_OF_A_SOURCE)
        for key in value:
            if key not in known:
                raise ConfigError(f"merge.sources: {key!r} is unknown{did_you_mean(str(key), known)}")
        own = {key: plain(value[key]) for key in _OF_A_SOURCE if value.get(key) is not None and key != "weight"}
        return SourceSpec(
            path=str(value["path"]),
            layers=_some("layers", value.get("layers"), value["path"]),
            experts=_some("experts", value.get("experts"), value["path"]),
            weight=_weight(value.get("weight")),
            layer_range=None if value.get("layer_range") is None else layer_range(plain(value["layer_range"])),
            parameters=own,
        )
    raise ConfigError(f"merge.sources: {value!r} is neither a path nor {{path: …, layers: […]}}")


def _some(key: str, value: Any, path: Any) -> tuple[int, ...] | None:
    chosen = _layers(f"{key} of a source", value, key.removesuffix("s"))
    if chosen == ():
        raise ConfigError(f"{key} of {path}: an empty list takes nothing of it; leave the source out, or {key} for all")
    return chosen


def _weight(value: Any) -> Setting:
    if isinstance(value, (Mapping, Sequence)) and not isinstance(value, str):
        return plain(value)
    if value is None or _is_number(value):
        return None if value is None else float(value)
    raise ConfigError(f"weight of a source: {value}: give a number")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


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
