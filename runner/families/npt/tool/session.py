"""The interactive tool's session: what it holds, and how one line becomes a command with its arguments and options."""

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from runner.errors import ConfigError, did_you_mean, printable
from runner.evaluation.decoding import Continuation, Feed, extend
from runner.evaluation.tokenizers import TextTokenizer
from runner.families.npt.model import NptLlamaForCausalLM
from runner.families.npt.modulation import SPACES, Modulation
from runner.families.npt.transfer import Position, check_ids
from runner.families.npt.transfer_injection import Injection
from runner.metrics.generation import Sampling
from runner.results import JsonObject

SHOWN, KEPT = 5, 10  # of the most probable tokens: printed, and in the result


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The keys `transfer.…` (conf/task/transfer.yaml says what they mean). Raises ConfigError for impossible values."""

    script: str | None = None
    session: str | None = None
    experiment: str | None = None
    space: str = "weights"
    special_tokens: bool = False
    controls: bool = True
    page: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.space not in SPACES:
            raise ConfigError(f"transfer.space={self.space}: choose {' or '.join(SPACES)}")
        for name in ("special_tokens", "controls", "page"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"transfer.{name}={getattr(self, name)}: choose true or false")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ConfigError(f"transfer.seed={self.seed}: give a whole number, at least 0")
        if self.script and self.experiment:
            raise ConfigError("transfer.script and transfer.experiment are two runs: give one of them")


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a command says: `lines` to be shown, `figures` for the result, `ends` where it ends the session."""

    lines: Sequence[str] = ()
    figures: JsonObject = field(default_factory=dict)
    ends: bool = False


@dataclass(kw_only=True)
class Tool:
    """One session with one model: the bank, the tracked tokens (text → id), the active layers, the lines so far.

    `unrelated`: prompts that a transfer should leave alone. `layer`, `strength`: of what is written for good.
    """

    model: NptLlamaForCausalLM
    tokenizer: TextTokenizer
    settings: Settings
    unrelated: Sequence[str] = ()
    eos: frozenset[int] = frozenset()
    active: tuple[int, ...]
    layer: int
    strength: float
    bank: dict[str, Modulation] = field(default_factory=dict)
    tracked: dict[str, int] = field(default_factory=dict)
    history: list[str] = field(default_factory=list)

    def ids(self, text: str, special_tokens: bool | None = None) -> list[int]:
        """The token ids of a text. Raises ConfigError for an empty one."""
        if not text:
            raise ConfigError("the text is empty: give one in quotes")
        special = self.settings.special_tokens if special_tokens is None else special_tokens
        found = self.tokenizer.encode(text, special=special)
        if not found:
            raise ConfigError(f"the text {text!r} has no tokens in this tokenizer")
        return found

    def continuation(self, ids: Sequence[int], count: int, sampling: Sampling | None = None) -> str:
        """The text of a continuation by the active layers, greedy without `sampling`. Raises ConfigError."""
        check_ids(self.model, ids, count)
        row = Continuation(prompt=list(ids), count=count, seed=self.settings.seed)
        with self.model.npt_mode(set(self.active)):
            for _ in extend(Feed(self.model, self.model.device), [row], sampling or Sampling(), eos=self.eos):
                pass
        return self.tokenizer.decode(row.new_ids, skip_special=True)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        return self.tokenizer.decode(ids)

    def named(self, name: str) -> Modulation:
        """The modulation `name`. Raises ConfigError that lists the bank."""
        if name not in self.bank:
            there = f"the bank holds {', '.join(self.bank)}" if self.bank else "the bank is empty: extract one first"
            raise ConfigError(f"there is no modulation {name!r}; {there}")
        return self.bank[name]

    def keep(self, name: str, m: Modulation) -> list[str]:
        """Put it into the bank; what is to be said of that, and its magnitudes."""
        said = [f"{name} replaces the one of that name"] if name in self.bank else []
        self.bank[name] = m
        shown = ", ".join(f"layer {layer} {value:.4f}" for layer, value in m.magnitudes().items())
        return [*said, f"{name}: {m.expression}; {m.space}; magnitude {shown}"]

    def tracked_rows(self, found: Injection) -> list[JsonObject]:
        """The tracked tokens before and after."""
        return [{"text": text, **found.row(token)} for text, token in self.tracked.items()]

    def top_rows(self, found: Injection, count: int = KEPT) -> list[JsonObject]:
        """The most probable tokens after, with their texts."""
        return [{"text": self.decode([int(row["token"])]), **row} for row in found.top(count)]


def arrow(percent: float, *, one: float = 20, two: float = 100) -> str:
    """↑↑, ↑, =, ↓ or ↓↓: how much a probability changed."""
    size = 2 if abs(percent) > two else 1 if abs(percent) > one else 0
    return ("↑" if percent > 0 else "↓") * size or "="


def share(probability: float) -> str:
    """A probability in six characters, or with an exponent where they would show none of it."""
    return f"{probability:.4f}" if probability >= 0.001 else f"{probability:.0e}"


def token_lines(rows: Sequence[Mapping[str, Any]], **bounds: float) -> list[str]:
    """A line a token: text, baseline → injected, the change in percent of the baseline, arrow."""
    shown = [printable(repr(str(row["text"]))) for row in rows]
    width = max(map(len, shown), default=0)
    return [
        f"  {text.ljust(width)}  {share(row['baseline'])} → {share(row['injected'])}  "
        f"{row['percent']:+.1f} %  {arrow(row['percent'], **bounds)}"
        for text, row in zip(shown, rows, strict=True)
    ]


@dataclass(frozen=True, kw_only=True)
class Call:
    """One line: the words after the command's name, and its options."""

    words: Sequence[str]
    options: Mapping[str, Any]

    def get(self, name: str, default: Any = None) -> Any:
        """An option's value."""
        return self.options.get(name, default)


Convert = Callable[[str], Any]


@dataclass(frozen=True, kw_only=True)
class Command:
    """`usage` names its arguments, `least` to `most` of them (None: any number); `about` says what it does."""

    usage: str
    about: str
    run: Callable[[Tool, Call], Reply]
    least: int = 0
    most: int | None = 0
    options: Mapping[str, Convert] = field(default_factory=dict)


def split(line: str) -> list[str]:
    """A line's words, as a shell splits them: names and texts in quotes, \\" for a quote. Raises ConfigError."""
    try:
        return shlex.split(line)
    except ValueError as error:
        raise ConfigError(f"the quotes do not match ({error}): {line}") from error


def quoted(word: str) -> str:
    """One word of a line, whatever is in it."""
    return shlex.quote(word)


def parse(line: str, commands: Mapping[str, Command]) -> tuple[Command, Call]:
    """The command of a line, with its arguments. Raises ConfigError for an unknown command or option."""
    name, *words = split(line)
    command = commands.get(name)
    if command is None:
        raise ConfigError(f"there is no command {name!r}{did_you_mean(name, commands) or '; help lists them'}")
    plain: list[str] = []
    options: dict[str, Any] = {}
    rest = iter(words)
    for word in rest:
        if not _is_option(word):
            plain.append(word)
            continue
        key = word.lstrip("-")
        if key not in command.options:
            hint = did_you_mean(word, [f"-{each}" for each in command.options]) if command.options else ""
            raise ConfigError(f"{name} has no option {word}{hint}")
        value = next(rest, None)
        if value is None:
            raise ConfigError(f"{name}: -{key} needs a value")
        options[key] = _converted(key, value, command.options[key])
    if len(plain) < command.least or (command.most is not None and len(plain) > command.most):
        raise ConfigError(f"it is {name} {command.usage}; texts of several words stand in quotes")
    return command, Call(words=plain, options=options)


def _is_option(word: str) -> bool:
    """`-pos`, and not `-3` or `-1.5`."""
    return word.startswith("-") and len(word) > 1 and not word[1].isdigit() and word[1] != "."


def _converted(key: str, value: str, convert: Convert) -> Any:
    try:
        return convert(value)
    except ValueError as error:
        raise ConfigError(f"-{key} {value}: {error}") from error


def whole(value: str) -> int:
    """An option's whole number."""
    try:
        return int(value)
    except ValueError:
        raise ValueError("give a whole number") from None


def number(value: str) -> float:
    """An option's finite number."""
    try:
        found = float(value)
    except ValueError:
        raise ValueError("give a number") from None
    if not math.isfinite(found):
        raise ValueError("give a finite number")
    return found


def numbers(value: str) -> list[float]:
    """Several finite numbers: 0,0.5,1."""
    return [number(each) for each in value.split(",")]


def layer_list(value: str) -> tuple[int, ...]:
    """Layers: 1,3."""
    return tuple(whole(each) for each in value.split(","))


def position(value: str) -> Position:
    """A position: a whole number, last, first, mean (or all), or several at the end as -3:."""
    words: dict[str, Position] = {"last": -1, "first": 0, "mean": "mean", "all": "mean"}
    if value in words:
        return words[value]
    start, colon, end = value.partition(":")
    if colon:
        return slice(whole(start) if start else None, whole(end) if end else None)
    return whole(value)


def switch(value: str) -> bool:
    """true or false."""
    if value not in ("true", "false"):
        raise ValueError("choose true or false")
    return value == "true"


def choice(*known: str) -> Convert:
    """One of some words."""

    def convert(value: str) -> str:
        if value not in known:
            raise ValueError(f"choose {', '.join(known)}{did_you_mean(value, known)}")
        return value

    return convert
