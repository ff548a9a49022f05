"""What can go wrong, and the exit code it ends with. Every message is one line: what is wrong, and what to do."""

import difflib
from collections.abc import Iterable


def printable(text: object) -> str:
    """`text` on one line, with control characters escaped, so that a tensor's name cannot write to a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`: did you mean 'x'?`, or the known words where none is close and they are few."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known are {', '.join(known)}" if len(known) <= 24 else ""


class RunnerError(Exception):
    """A failure that the user can read: one line, no traceback. Exit code 1 unless a subclass says otherwise."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class ConfigError(RunnerError):
    """The command line or a config file asks for something that does not exist."""

    exit_code = 2


class CheckpointError(RunnerError):
    """A file is missing, damaged, unsafe, or not what it is said to be."""

    exit_code = 2


class DamagedError(CheckpointError):
    """A file's bytes are not those that were written: a CRC does not match."""


class ModelError(RunnerError):
    """A checkpoint and a model do not fit together: keys, shapes, depth or architecture."""

    exit_code = 2


class DivergedError(ModelError):
    """A training whose loss or weights are not finite, or that is worse than the base alone: nothing to be saved."""

    exit_code = 1
