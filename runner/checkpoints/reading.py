"""What a format's reader finds in a checkpoint, damaged or not: problems by part, and what each sound part holds.

One reading serves both who needs the whole (`open`: refused where anything stands against it) and the checks, which
look at each part by itself.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runner.checkpoints.checkpoint import (
    Checkpoint,
    CheckpointFormat,
    Listing,
    Problem,
    Reading,
    Severity,
    Sound,
    raise_refused,
)
from runner.checkpoints.model_directory import MERGED_MODEL
from runner.errors import CheckpointError
from runner.files.file_type import may_be_weights
from runner.files.tensors import TensorSource, read_pickle


class Parts:
    """Collects what a reader finds, part by part."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.sound: dict[str, Sound] = {}
        self.sources: list[TensorSource] = []

    def refuse(self, part: str, text: str, advice: str | None = None) -> None:
        """A problem with which nothing can be opened."""
        self.problems.append(Problem(part=part, text=text, advice=advice))

    def fail(self, part: str, text: str, advice: str | None = None) -> None:
        """A problem that a test must report, though the rest can be looked at."""
        self.problems.append(Problem(part=part, text=text, severity=Severity.FAILED, advice=advice))

    def odd(self, part: str, text: str) -> None:
        """What is not wrong, but should be said."""
        self.problems.append(Problem(part=part, text=text, severity=Severity.ODD))

    def is_sound(self, part: str, text: str, **data: Any) -> None:
        """What the part holds; it counts where the part has no problem."""
        self.sound[part] = Sound(text=text, data=data)

    def has(self, part: str) -> bool:
        """Whether anything stands against the part."""
        return any(problem.part == part and problem.severity is not Severity.ODD for problem in self.problems)

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        """A CheckpointError inside becomes a problem of `part`, which ends the block."""
        try:
            yield
        except CheckpointError as error:
            self.refuse(part, str(error))

    def raise_refused(self, path: Path) -> None:
        """Raise CheckpointError where anything stands against opening `path`."""
        raise_refused(self.problems, path)

    def weights(self, listing: Listing, name: str) -> TensorSource | None:
        """The tensors of a weights file; None, and a problem of the files, where it cannot be read."""
        with self.within("files"):
            source = listing.weights(name)
            self.sources.append(source)
            return source
        return None

    def reading(
        self,
        path: Path,
        files: tuple[Path, ...],
        checkpoint: Checkpoint | None,
        beside: tuple[Callable[[], TensorSource], ...] = (),
    ) -> Reading:
        """All that was found."""
        return Reading(
            path=path,
            checkpoint=checkpoint,
            files=files,
            sources=tuple(self.sources),
            beside=beside,
            problems=tuple(self.problems),
            sound=self.sound,
        )


def read(listing: Listing, found: CheckpointFormat | None) -> Reading:
    """The checkpoint as its format reads it; without one its files alone. A format without a reader only opens it."""
    parts = Parts()
    if found is None:
        names = weight_names(listing)
        for name in names:
            parts.weights(listing, name)
        return parts.reading(listing.path, tuple(map(listing.file, names)), None)
    if found.read is not None:
        return found.read(listing)
    checkpoint = None
    assert found.open is not None, f"{found.name}: a format needs read or open"
    with parts.within("loading"):
        checkpoint = found.open(listing)
        parts.sources.append(checkpoint.weights)
    return parts.reading(listing.path, checkpoint.weights.files if checkpoint else (), checkpoint)


def some(names: Sequence[str], most: int = 6, between: str = "; ") -> str:
    """Names for a message: the first of a long list, and how many there are."""
    return between.join([*names[:most], *([f"… ({len(names)} in all)"] if len(names) > most else [])])


def weight_names(listing: Listing) -> list[str]:
    """The entries that may hold weights; a file that was named is one, whatever its name."""
    if not listing.path.is_dir():
        return [listing.path.name]
    return [name for name in listing.entries if may_be_weights(name) and listing.file(name).is_file()]


def tensor_names(listing: Listing, name: str) -> list[str]:
    """The names of a weights file's tensors, with those that scripts nest under "model". Raises CheckpointError."""
    source = listing.weights(name)
    nested = source.extras.get("model")
    return [*source.infos, *(map(str, nested) if isinstance(nested, Mapping) else ())]


def load_mapping(path: Path) -> dict[str, Any]:
    """The dict of a trainer's .pt file, as `read_pickle` gives it. Raises CheckpointError."""
    content = read_pickle(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a dictionary")
    return content


def look_for_merged_model(parts: Parts, root: Path, what: str, *, deep: bool = False) -> list[Path]:
    """The files of a merged model beside `what`, which is all that belongs in `root`: gigabytes that nothing reads.

    They are a problem of `pollution`. `deep`: directories inside are looked through, too.
    """
    entries = [] if not root.is_dir() else root.rglob("*") if deep else root.iterdir()
    found = sorted(path for path in entries if MERGED_MODEL.fullmatch(path.name) and path.is_file())
    if found:
        size = sum(path.stat().st_size for path in found) / 1e6
        names = ", ".join(str(path.relative_to(root)) for path in found)
        parts.fail("pollution", f"a merged model lies beside {what}: {names} ({size:,.1f} MB)")
    parts.is_sound("pollution", f"no merged model beside {what}" if root.is_dir() else "a file by itself")
    return found
