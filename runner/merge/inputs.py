"""Whether the files that a merge reads are sound, and what they are: CRCs and hashes, in one pass beside other work.

Nothing heavy is imported here, so that files are being read while torch is still being imported.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from runner.errors import CheckpointError
from runner.files.archive import hash_sound

# Large, because each step waits for the interpreter's lock, which an import holds most of the time.
_STEP = 1 << 24


@dataclass(frozen=True)
class _Reading:
    stat: tuple[int, int, int]
    sha256: "Future[str]"


class Inputs:
    """The files of a merge, each read once for its CRCs and its hash, in two threads."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._stop = Event()
        self._readings: dict[Path, _Reading] = {}

    def start(self, paths: Iterable[Path]) -> None:
        """Begin to read `paths`. Errors are raised by `check` and `sha256`."""
        new = [path for path in dict.fromkeys(paths) if path not in self._readings]
        stats = [_stat(path) for path in new]
        for path, stat in zip(new, stats, strict=True):
            self._readings[path] = _Reading(stat, self._pool.submit(hash_sound, path, self._steps))

    def check(self, path: Path) -> None:
        """Wait for the CRCs of `path`. Raises CheckpointError for a damaged record; other layouts carry no CRC."""
        self.start([path])
        self._readings[path].sha256.result()

    def sha256(self, path: Path) -> str:
        """The hash of `path`, in hexadecimal. Raises CheckpointError where the file changed since it was opened."""
        self.start([path])
        reading = self._readings[path]
        found = reading.sha256.result()
        if _stat(path) != reading.stat:
            raise CheckpointError(f"{path}: was changed while it was merged; start again when nobody writes it")
        return found

    def stop(self) -> None:
        """Give up what is still being read."""
        self._stop.set()

    def _steps(self, view: memoryview) -> Iterator[memoryview]:
        for start in range(0, len(view), _STEP):
            if self._stop.is_set():
                raise CheckpointError("given up")
            yield view[start : start + _STEP]


@contextmanager
def reading(paths: Iterable[Path]) -> Iterator[Inputs]:
    """`Inputs` that begin with `paths` and give up, without waiting for the rest, when the block is left."""
    with ThreadPoolExecutor(max_workers=2, thread_name_prefix="reading") as pool:
        inputs = Inputs(pool)
        inputs.start(paths)
        try:
            yield inputs
        finally:
            inputs.stop()
            pool.shutdown(wait=False, cancel_futures=True)


def _stat(path: Path) -> tuple[int, int, int]:
    try:
        stat = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    return stat.st_size, stat.st_mtime_ns, stat.st_ino
