"""JSON that someone else wrote: bounded in size, without duplicate keys."""

import json
from pathlib import Path
from typing import Any

from runner.errors import CheckpointError


def parse_object(text: bytes, path: Path, what: str) -> dict[str, Any]:
    """The JSON object in `text`, which is `what` of `path`. Raises CheckpointError, also for a key given twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise CheckpointError(f"{path}: {twice}: given twice in the {what}: which one counts is undefined")
        return made

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{_named(path, what)} is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{_named(path, what)} is not a JSON object")
    return value


def read_object(path: Path, what: str, limit: int) -> dict[str, Any]:
    """The JSON object in the file `path`, which may hold `limit` bytes. Raises CheckpointError."""
    try:
        with path.open("rb") as file:
            text = file.read(limit + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if len(text) > limit:
        raise CheckpointError(f"{_named(path, what)} is larger than {limit >> 20} MB")
    if not text.strip():
        raise CheckpointError(f"{path}: an empty file where a {what} is expected")
    return parse_object(text, path, what)


def _named(path: Path, what: str) -> str:
    """Once, where `what` is the file's own name."""
    return str(path) if what == path.name else f"{path}: the {what}"
