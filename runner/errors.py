"""What can go wrong, and the exit code it ends with. Every message is one line: what is wrong, and what to do."""


def printable(text: object) -> str:
    """`text` on one line, with control characters escaped, so that a tensor's name cannot write to a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


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
