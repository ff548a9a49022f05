"""The words of the command line: flags, overrides, and paths and texts spelled so that Hydra keeps them.

Hydra's grammar refuses or changes values that are common in paths (`=`, `[`, `(`, `,`, `~`, `#`, quotes, letters
beyond ASCII, `1e5`, `true`), so the values of paths and texts are quoted before Hydra sees them.
"""

import difflib
import errno
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from runner.config import PATH_KEYS, TEXT_KEYS, implied_family
from runner.errors import ConfigError

# Hydra's flags that a user may give, and how many words each takes; "?" is at most one.
FLAGS = {
    "--multirun": 0, "-m": 0, "--resolve": 0, "--version": 0, "--hydra-help": 0, "--shell-completion": 0, "-sc": 0,
    "--cfg": 1, "-c": 1, "--package": 1, "-p": 1, "--config-dir": 1, "-cd": 1, "--config-name": 1, "-cn": 1,
    "--info": "?", "-i": "?", "--help": 0, "-h": 0,
}  # fmt: skip
# Keys whose value is a list of paths, each alone or as one field of a dict.
LIST_KEYS = ("merge.sources", "sweep")
PATH_FIELD = "path"
_INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")


@dataclass(frozen=True, kw_only=True)
class CommandLine:
    """`flags` for Hydra, in order; `overrides` as (key, value) with the value as it was typed; None deletes a key."""

    flags: tuple[str, ...]
    overrides: tuple[tuple[str, str | None], ...]

    @property
    def multirun(self) -> bool:
        """Whether -m was given."""
        return bool({"-m", "--multirun"} & set(self.flags))

    @property
    def flags_of_hydra(self) -> bool:
        """Whether any flag but -m was given."""
        return bool(set(self.flags) - {"-m", "--multirun"})

    def get(self, key: str) -> str | None:
        """The last value given for `key`, without quotes around it."""
        values = [value for name, value in self.overrides if name == key]
        return unquoted(values[-1]) if values and values[-1] is not None else None


def parse(words: Sequence[str]) -> CommandLine:
    """Tell flags from overrides, wherever they stand. Raises ConfigError for a word that is neither."""
    flags: list[str] = []
    overrides: list[tuple[str, str | None]] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word.startswith("-"):
            flags += _flag(word, rest)
        elif word.startswith("~"):
            overrides.append((word, None))
        elif "=" in word:
            key, _, value = word.partition("=")
            if key == "merge" and unquoted(value).endswith((".yml", ".yaml")):
                overrides += [("merge", "mergekit"), ("merge.file", value)]
            else:
                overrides.append((key, value))
        else:
            hint = f"; did you mean ckpt={word}?" if _exists(word) else "; options are written key=value, see --help"
            raise ConfigError(f"{word!r} is no option{hint}")
    if family := implied_family([key for key, _ in overrides]):
        overrides.insert(0, ("family", family))
    return CommandLine(flags=tuple(flags), overrides=tuple(overrides))


def _flag(word: str, rest: list[str]) -> list[str]:
    """The words that belong to the flag `word`, the following ones taken from `rest`."""
    name, equals, value = word.partition("=")
    if name not in FLAGS:
        close = difflib.get_close_matches(name, [flag for flag in FLAGS if flag.startswith("--")], n=1, cutoff=0.75)
        hint = f"did you mean {close[0]!r}?" if close else f"options are written {name.lstrip('-')}=…, flags see --help"
        raise ConfigError(f"unknown flag {name}; {hint}")
    if equals:
        return [name, value]
    takes = FLAGS[name]
    if takes == 1:
        if not rest:
            raise ConfigError(f"{name} needs a value")
        return [name, rest.pop(0)]
    if takes == "?" and rest and rest[0] in _INFO:
        return [name, rest.pop(0)]
    return [name]


def quoted(value: str) -> str:
    """`value` as a quoted string of Hydra's grammar that means exactly `value`."""
    escaped = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", escaped)
    escaped = re.sub(r"(\\+)$", r"\1\1", escaped)
    return f"'{escaped}'"


def unquoted(value: str) -> str:
    """`value` without the quotes around it, if there are any."""
    if len(value) >= 2 and value[0] == value[-1] and value[0] in "'\"":
        return value[1:-1].replace(f"\\{value[0]}", value[0])
    return value


def spell(key: str, value: str, *, multirun: bool) -> str:
    """One override for Hydra: a path or text quoted, each of a list or a sweep by itself; any other value as typed."""
    known = key.lstrip("+")
    if known not in PATH_KEYS | TEXT_KEYS or not value or value == "null":
        return f"{key}={value}"
    if known in TEXT_KEYS:
        return f"{key}={_spell_text(value, multirun)}"
    spelled = _spell_list(value) if known in LIST_KEYS else _spell_path(value, multirun)
    return f"{key}={spelled}"


def check_paths(line: CommandLine) -> None:
    """Raise ConfigError for a path that is empty, as an unset variable of the shell leaves it, or a web address."""
    for key, value in line.overrides:
        known = key.lstrip("+")
        if value is None or known not in PATH_KEYS or known.startswith(("hydra.", "convert.")):
            continue
        if not (plain := unquoted(value)).strip():
            raise ConfigError(f"{key}= is empty (an unset variable?); give it a value, or leave it out")
        if re.match(r"https?://", plain):
            hub = ", or a name of the hub (OWNER/NAME)" if known in ("base", "reference", "tokenizer") else ""
            raise ConfigError(f"{key}={plain}: is a web address; download it and give the path{hub}")
        if known == "ckpt" and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", plain) and not _exists(plain.split("/")[0]):
            raise ConfigError(
                f"{key}={plain}: no such file or directory; where it is a name of the hub, download it first "
                f"(hf download {plain} --local-dir DIR) and give ckpt=DIR"
            )


def _exists(text: str) -> bool:
    """Whether `text` is a path that is there; what is too long for a name, as many names with commas are, is none.

    Raises ConfigError for the home directory of nobody.
    """
    try:
        return Path(text).expanduser().exists()
    except RuntimeError as error:
        raise ConfigError(f"{text}: there is no such user; write the path without ~") from error
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return False


def _spell_text(value: str, multirun: bool) -> str:
    """Text, `[a,b]` each by itself, or under -m `a,b` as the values of a sweep. Raises ConfigError for half a list."""
    if re.fullmatch(r"\$\{[^}]*\}", value):
        return value
    if _is_list(value):
        return f"[{','.join(quoted(unquoted(part)) for part in split_list(value))}]"
    if multirun and len(parts := split_list(value)) > 1:
        return ",".join(_spell_text(part, multirun=False) for part in parts)
    if value.startswith("["):
        raise ConfigError(
            f"{value}: is no list, whose last character is its ]; put quotes around a text that starts so"
        )
    return quoted(unquoted(value))


def _spell_path(value: str, multirun: bool) -> str:
    for literal in (value, unquoted(value)):
        if _exists(literal):
            return quoted(literal)
    if value[0] in "'\"" and value[-1] == value[0] and len(value) > 1 and value.count(value[0]) == 2:
        return quoted(unquoted(value))
    if re.fullmatch(r"\$\{[^}]*\}", value):
        return value
    if multirun and "," in value:
        return ",".join(quoted(unquoted(part)) for part in split_list(value))
    return quoted(value)


def _spell_list(value: str) -> str:
    """A list of paths and of `{path: …, layers: […]}`; one path alone is a list of one."""
    if _exists(unquoted(value)) or not _is_list(value):
        return f"[{quoted(unquoted(value))}]"
    items = _existing_paths(value[1:-1].split(",")) or list(map(_spell_item, split_list(value)))
    return f"[{','.join(items)}]"


def _existing_paths(parts: list[str]) -> list[str] | None:
    """`parts`, joined by commas again where only that is a path, quoted; None unless every path is there."""
    joined: list[str] = []
    while parts:
        counts = range(len(parts), 0, -1)
        longest = next((n for n in counts if _exists(",".join(parts[:n]).strip())), None)
        if longest is None:
            return None
        joined.append(quoted(",".join(parts[:longest]).strip()))
        parts = parts[longest:]
    return joined


def _spell_item(item: str) -> str:
    if not (item.startswith("{") and item.endswith("}")) or _exists(item):
        return quoted(unquoted(item))
    fields = [field.partition(":") for field in split_list(f"[{item[1:-1]}]")]
    spelled = [(name.strip(), value.strip()) for name, _, value in fields]
    return f"{{{','.join(f'{k}:{quoted(unquoted(v)) if k == PATH_FIELD else v}' for k, v in spelled)}}}"


def split_list(value: str) -> list[str]:
    """`a,b` or `[a,b]` in its parts; a comma inside quotes or brackets belongs to its part."""
    return _parts(value[1:-1] if _is_list(value) else value)


def _is_list(value: str) -> bool:
    """Whether `value` is one list: `[a,b]`, but not `[a],[b]`."""
    return value.startswith("[") and value.endswith("]") and len(_parts(value)) == 1


_CLOSING = {"(": ")", "[": "]", "{": "}"}
# A quote that a text or a field begins with, up to the one that ends it: an apostrophe inside a word is neither.
_QUOTED = re.compile(r"""(?<![^\s,:\[({])('(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*")(?=\s*(?:[,\])}]|$))""")


def _parts(value: str, plain: frozenset[int] = frozenset()) -> list[str]:
    """`value` cut at the commas outside quotes and pairs of brackets; those at the positions `plain` open nothing."""
    parts, position = [""], 0
    opened: list[int] = []
    while position < len(value):
        if match := _QUOTED.match(value, position):
            parts[-1] += match[1]
            position = match.end()
            continue
        character = value[position]
        if character in "([{" and position not in plain:
            opened.append(position)
        elif opened and character == _CLOSING[value[opened[-1]]]:
            opened.pop()
        if character == "," and not opened:
            parts.append("")
        else:
            parts[-1] += character
        position += 1
    if opened:  # never closed: a character like any other
        return _parts(value, plain | {opened[-1]})
    return [part.strip() for part in parts if part.strip()]
