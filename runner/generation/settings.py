"""The node `generate`: what is drawn, how, and how it is shown. Nothing heavy is imported here."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import yaml

from runner.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from runner.metrics.generation import Sampling

AUTO = "auto"
_WHOLE = {"max_new_tokens": 1, "top_k": 1, "seed": 0, "num_samples": 1, "batch_size": 1}
_OPTIONAL = ("top_k", "min_p", "system", "layers")
_CHOICES = ("special_tokens", "chat", "stream")
_SWITCHES = ("ignore_eos", "cache")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The keys `generate.…` (conf/task/generate.yaml says what they mean). Raises ConfigError for impossible values."""

    max_new_tokens: int = 100
    temperature: float = 0.7
    top_k: int | None = None
    top_p: float = 0.9
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    num_samples: int = 1
    batch_size: int = 8
    cache: bool = True
    special_tokens: bool | str = AUTO
    chat: bool | str = AUTO
    system: str | None = None
    stream: bool | str = AUTO
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name, least in _WHOLE.items():
            if not self._left_out(name) and not is_whole(value := getattr(self, name), least):
                raise ConfigError(f"generate.{name}={value}: give a whole number, at least {least}")
        self._number("temperature", "a number of at least 0; 0 is greedy", self.temperature, 0, math.inf)
        self._number("top_p", "a number above 0, at most 1", self.top_p, 0, 1, low_allowed=False)
        self._number("min_p", "a number from 0 to 1", self.min_p, 0, 1)
        penalty = self.repetition_penalty
        self._number("repetition_penalty", "a number above 0; 1 is none", penalty, 0, math.inf, low_allowed=False)
        for name in _CHOICES:
            if (value := getattr(self, name)) not in (AUTO, True, False) or is_whole(value, 0):
                raise ConfigError(f"generate.{name}={value}: choose auto, true or false")
        for name in _SWITCHES:
            if not isinstance(value := getattr(self, name), bool):
                raise ConfigError(f"generate.{name}={value}: choose true or false")
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, (list, tuple)) or not all(isinstance(text, str) and text for text in stop):
            raise ConfigError(f"generate.stop={self.stop}: give a list of texts")
        object.__setattr__(self, "stop", tuple(stop))
        if self.system is not None and not isinstance(self.system, str):
            raise ConfigError(f"generate.system={self.system}: give a text")
        if self.layers is not None:
            layers = (self.layers,) if is_whole(self.layers, 0) else self.layers
            if not isinstance(layers, (list, tuple)) or not all(is_whole(layer, 0) for layer in layers):
                raise ConfigError(f"generate.layers={self.layers}: give a list of layer numbers, such as [1,3]")
            object.__setattr__(self, "layers", tuple(layers))

    def _left_out(self, name: str) -> bool:
        return name in _OPTIONAL and getattr(self, name) is None

    def _number(
        self, name: str, said: str, value: object, low: float, high: float, *, low_allowed: bool = True
    ) -> None:
        if self._left_out(name):
            return
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not good or not low <= value <= high or (value == low and not low_allowed):  # type: ignore[operator]
            raise ConfigError(f"generate.{name}={value}: give {said}")

    @property
    def sampling(self) -> "Sampling":
        """How one token is drawn."""
        from runner.metrics.generation import Sampling

        return Sampling(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p or 0.0,
            repetition_penalty=self.repetition_penalty,
        )

    def changed(self, values: Mapping[str, object]) -> "Settings":
        """These settings with other `values`. Raises ConfigError for a name that is none."""
        known = [each.name for each in fields(self)]
        for name in values:
            if name not in known:
                raise ConfigError(f"generate.{name} is unknown{did_you_mean(name, known)}")
        return replace(self, **values)  # type: ignore[arg-type]  # checked above, one by one

    def values(self) -> dict[str, object]:
        """All of them as JSON values."""
        found = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def is_whole(value: object, least: int) -> bool:
    """Whether it is a whole number of at least `least`: True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def spoken(words: str) -> dict[str, object]:
    """`temperature=0 top_k=40` as values, each as YAML reads it. Raises ConfigError for a word without `=`."""
    values: dict[str, object] = {}
    for word in words.split():
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise ConfigError(f"{word}: settings are written key=value, such as temperature=0")
        try:
            values[name.removeprefix("generate.")] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"{word}: its value cannot be read") from error
    return values
