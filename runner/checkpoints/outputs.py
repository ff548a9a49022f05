"""Where an output may be written: asked before the first byte is."""

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from runner.errors import CheckpointError

# For the manifest and the file system's own records.
_MARGIN = 1 << 20


def check_output(target: Path, *, replace: bool = False, inputs: Sequence[Path] = (), expected_bytes: int = 0) -> None:
    """Raises CheckpointError unless the directory `target` can be written.

    It must not be a link, a file, or (without `replace`) there already; not equal to, inside or around an input,
    by file identity and not by name; and its file system must have `expected_bytes` to spare.
    """
    try:
        target.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be an output: {error.strerror}: choose another output") from error
    if target.is_symlink():
        raise CheckpointError(f"{target}: a symbolic link cannot be an output: give the directory itself")
    if target.exists():
        if not target.is_dir():
            raise CheckpointError(f"{target}: a file stands where the output directory should be")
        if target.is_mount():
            raise CheckpointError(f"{target}: a mount point cannot be an output: give a directory inside it")
        if not replace:
            raise CheckpointError(
                f"{target}: exists already: choose another output, or replace it: merge.force=true (convert.force=true)"
            )
    for source in inputs:
        _check_input(target, source)
    existing = next(folder for folder in target.parents if folder.exists())
    if not existing.is_dir():
        raise CheckpointError(f"{target}: {existing} is not a directory")
    free = shutil.disk_usage(existing).free
    if expected_bytes and free < expected_bytes + _MARGIN:
        raise CheckpointError(
            f"{target}: needs {_megabytes(expected_bytes + _MARGIN)}, {existing} has {_megabytes(free)} free"
        )


def _check_input(target: Path, source: Path) -> None:
    if not source.exists():
        raise CheckpointError(f"{source}: no such input")
    if _any_same((target, *target.parents), source):
        raise CheckpointError(f"{target}: the output is equal to or inside the input {source}: choose another output")
    if target.exists() and _any_same(source.resolve().parents, target):
        raise CheckpointError(f"{target}: the output holds the input {source}: choose another output")


def _any_same(folders: Iterable[Path], other: Path) -> bool:
    return any(folder.exists() and folder.samefile(other) for folder in folders)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"
