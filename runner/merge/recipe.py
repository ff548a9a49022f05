"""How whole models are merged: by which method, with which numbers in which layer and tensor (nothing heavy here).

A number may be given for a whole model, as a gradient over its layers, or by the names of tensors, as in mergekit's
files, whose rules these are.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from runner.errors import ConfigError, did_you_mean

# A number or flag; a list of numbers, a gradient from the first layer to the last; or [{filter: …, value: …}, …].
Setting: TypeAlias = Any


@dataclass(frozen=True, kw_only=True)
class Method:
    """What a method takes: parameters of the whole and of each model with their defaults (`...`: must be given), and
    how many models beside the base."""

    whole: Mapping[str, Any] = field(default_factory=dict)
    each: Mapping[str, Any] = field(default_factory=dict)
    base: bool = False
    least: int = 1
    most: int = 10_000


_WEIGHT: Mapping[str, Any] = {"weight": ...}
_SPARSE: Mapping[str, Any] = {"weight": ..., "density": 1.0}
_MIX: Mapping[str, Any] = {"int8_mask": False, "lambda": 1.0}
METHODS: Mapping[str, Method] = {
    "linear": Method(whole={"normalize": True}, each=_WEIGHT),
    "slerp": Method(whole={"t": ...}, least=2, most=2),
    "nuslerp": Method(whole={"nuslerp_row_wise": False, "nuslerp_flatten": True}, each=_WEIGHT, least=2, most=2),
    "task_arithmetic": Method(whole={**_MIX, "normalize": False, "rescale": False}, each=_SPARSE, base=True),
    "ties": Method(whole={**_MIX, "normalize": True, "rescale": False}, each=_SPARSE, base=True),
    "dare_linear": Method(whole={**_MIX, "normalize": False, "rescale": True}, each=_SPARSE, base=True),
    "dare_ties": Method(whole={**_MIX, "normalize": False, "rescale": True}, each=_SPARSE, base=True),
    "della": Method(
        whole={**_MIX, "normalize": True, "rescale": True}, each={**_SPARSE, "epsilon": 0.15}, base=True
    ),
    "della_linear": Method(
        whole={**_MIX, "normalize": False, "rescale": True}, each={**_SPARSE, "epsilon": 0.15}, base=True
    ),
    "model_stock": Method(whole={"filter_wise": False}, base=True, least=2),
    "karcher": Method(whole={"max_iter": 10, "tol": 1e-5}, least=2),
    "passthrough": Method(each={"scale": 1.0}, most=1),
}  # fmt: skip
_FLAGS = ("normalize", "rescale", "int8_mask", "nuslerp_row_wise", "nuslerp_flatten", "filter_wise")
# What each number must lie in: least, most.
_RANGES = {"density": (0, 1), "epsilon": (0, 1), "t": (0, 1), "max_iter": (0, 1e6), "tol": (0, 1)}


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one model gives to a slice: its number among the sources, which of its layers ([start, stop), None: all)."""

    source: int
    layers: tuple[int, int] | None = None
    parameters: Mapping[str, Setting] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Layers of the output, one below the other: made of as many layers of each part."""

    parts: tuple[Part, ...]
    parameters: Mapping[str, Setting] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A merge of whole models. `base`: its number among the sources. `dtype` is that which is written.

    `tokenizer`: union, base, or the number of a source; None: the vocabularies are one. `text`: as the user wrote it.
    """

    method: str
    slices: tuple[Slice, ...]
    parameters: Mapping[str, Setting] = field(default_factory=dict)
    base: int | None = None
    dtype: str | None = None
    tokenizer: str | int | None = None
    pad_to_multiple_of: int | None = None
    text: str = ""

    @property
    def whole(self) -> bool:
        """Whether every layer stays where it is."""
        return len(self.slices) == 1 and all(part.layers is None for part in self.slices[0].parts)

    def value(self, name: str, tensor: str, t: float, slice_: Slice, part: Part | None = None) -> Any:
        """The parameter `name` for `tensor`, which lies at `t` (0 to 1) of its slice's layers.

        A model's own goes before its slice's, that before all models'. Raises ConfigError where it is needed and not
        given, and where it is none.
        """
        method = METHODS[self.method]
        default = (method.each if part is not None else method.whole)[name]
        places = [*([part.parameters] if part is not None else []), slice_.parameters, self.parameters]
        for place in places:
            if place.get(name) is not None and (found := evaluate(place[name], tensor, t, name)) is not None:
                return _checked(name, found)
        if default is ...:
            hint = "give it for each source, as {path: …, weight: 0.5}" if part is not None else "give it"
            raise ConfigError(f"merge={self.method}: {tensor} has no {name}; {hint}")
        return default


def evaluate(setting: Setting, tensor: str, t: float, name: str) -> Any:
    """What `setting` gives for `tensor` at `t`: a gradient is interpolated, of filters the first that fits counts.

    None where no filter fits. Raises ConfigError for what is no setting.
    """
    if isinstance(setting, (bool, int, float)):
        return setting
    if isinstance(setting, Mapping):
        setting = [setting]
    if isinstance(setting, Sequence) and not isinstance(setting, str) and setting:
        if all(isinstance(each, (int, float)) and not isinstance(each, bool) for each in setting):
            place = t * (len(setting) - 1)
            low = int(place)
            high = min(low + 1, len(setting) - 1)
            return (1 - (place - low)) * setting[low] + (place - low) * setting[high]
        if all(isinstance(each, Mapping) and "value" in each and set(each) <= {"filter", "value"} for each in setting):
            for each in setting:
                if each.get("filter") in (None, "*") or str(each["filter"]) in tensor:
                    return evaluate(each["value"], tensor, t, name)
            return None
    raise ConfigError(
        f"merge: {name}={setting}: give a number, a list of numbers from the first layer to the last, or a list of "
        "{filter: part of a tensor's name, value: …}"
    )


def _checked(name: str, value: Any) -> Any:
    if name in _FLAGS:
        if value not in (True, False):
            raise ConfigError(f"merge: {name}={value}: choose true or false")
        return bool(value)
    if isinstance(value, bool) or not math.isfinite(value):
        raise ConfigError(f"merge: {name}={value}: give a number")
    least, most = _RANGES.get(name, (-math.inf, math.inf))
    if not least <= value <= most:
        raise ConfigError(f"merge: {name}={value}: give a number from {least} to {most}")
    return int(value) if name == "max_iter" else float(value)


def check_names(method: str, whole: Mapping[str, Setting], each: Sequence[Mapping[str, Setting]]) -> None:
    """Raise ConfigError for parameters that the method does not take; what all models share may stand in `whole`."""
    known = METHODS[method]
    for given, names in ((whole, (*known.whole, *known.each)), *((one, tuple(known.each)) for one in each)):
        for name in given:
            if name not in names:
                raise ConfigError(f"merge={method} takes no {name}{did_you_mean(str(name), names)}")
