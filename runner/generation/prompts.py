"""Prompts from the command line, standard input, a file, or Python."""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runner.errors import ConfigError

Message = Mapping[str, str]
STANDARD_INPUT = "-"
_ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What is continued: a text, the `messages` of a conversation, or token `ids`.

    `extra`: further fields of its line in a file, which its samples keep.
    """

    text: str = ""
    messages: tuple[Message, ...] = ()
    ids: tuple[int, ...] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


def given_prompts(prompt: object, file: str | None) -> list[Prompt]:
    """The prompts that the keys `prompt` and `prompts` name; none where neither is given.

    Raises ConfigError for both, for what is no prompt, and for a file that cannot be read or has a wrong line.
    """
    if prompt is not None and file is not None:
        raise ConfigError("prompt= and prompts= are both given; give one of them")
    if file is not None:
        return read_prompts(Path(file).expanduser())
    if prompt is None:
        return []
    if prompt == STANDARD_INPUT:
        return [Prompt(text=_decoded(sys.stdin.buffer.read(), "standard input").removesuffix("\n"))]
    given = prompt if isinstance(prompt, (list, tuple)) else [prompt]
    texts = [text for text in given if isinstance(text, str)]
    if not texts or len(texts) < len(given):
        raise ConfigError(f"prompt={prompt}: give a text, a list of texts, or - for standard input")
    return [Prompt(text=text) for text in texts]


def prompts_of(prompts: Sequence[str | Sequence[int] | Prompt]) -> list[Prompt]:
    """Prompts given from Python: texts, or lists of token ids. Raises ConfigError for anything else."""
    found: list[Prompt] = []
    for each in [prompts] if isinstance(prompts, (str, Prompt)) else prompts:
        if isinstance(each, Prompt):
            found.append(each)
        elif isinstance(each, str):
            found.append(Prompt(text=each))
        elif isinstance(each, Sequence) and all(isinstance(one, int) and not isinstance(one, bool) for one in each):
            found.append(Prompt(ids=tuple(map(int, each))))
        else:
            raise ConfigError(f"prompts: {each!r} is neither a text nor a list of token ids")
    return found


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file: `.jsonl` an object a line, anything else one text a line; empty lines do not count.

    In a text file `\\n`, `\\t` and `\\\\` stand for a line break, a tab and a backslash.
    """
    try:
        text = _decoded(path.read_bytes(), path)
    except OSError as error:
        raise ConfigError(f"prompts={path}: cannot be read: {error.strerror}") from error
    lines = [(number, line) for number, line in enumerate(re.split(r"\r\n|\r|\n", text), 1) if line.strip()]
    if not lines:
        raise ConfigError(f"prompts={path}: holds no prompt")
    if path.suffix == ".jsonl":
        return [_from_json(line, f"{path}: line {number}") for number, line in lines]
    return [Prompt(text=re.sub(r"\\(.)", _unescaped, line)) for _, line in lines]


def _unescaped(match: re.Match[str]) -> str:
    return _ESCAPES.get(match[1], match[0])


def _decoded(content: bytes, where: object) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: is no UTF-8 text: {error.reason} at byte {error.start}") from error


def _from_json(line: str, where: str) -> Prompt:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where}: is no JSON: {error}") from error
    if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row):
        raise ConfigError(f'{where}: give an object with "prompt" or "messages"')
    extra = {key: value for key, value in row.items() if key not in ("prompt", "messages")}
    if "messages" in row:
        return Prompt(messages=checked_messages(row["messages"], where), extra=extra)
    if not isinstance(row["prompt"], str):
        raise ConfigError(f'{where}: "prompt" is {row["prompt"]!r}; give a text')
    return Prompt(text=row["prompt"], extra=extra)


def checked_messages(messages: object, where: str) -> tuple[Message, ...]:
    """`messages` as [{role, content}, …], both texts. Raises ConfigError where they are not."""
    if not isinstance(messages, list) or not messages:
        raise ConfigError(f'{where}: "messages" must be a list of {{role, content}}')
    for each in messages:
        if not isinstance(each, dict) or not all(isinstance(each.get(key), str) for key in ("role", "content")):
            raise ConfigError(f'{where}: "messages" must be a list of {{role, content}}, not {each!r}')
    return tuple({"role": each["role"], "content": each["content"]} for each in messages)
