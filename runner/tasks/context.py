"""What a task may use beside its config: where its files go, who is told, how long work is shown; and the one
checkpoint that `ckpt` and `step` name. No model is imported here.
"""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from runner.checkpoints.checkpoint import Checkpoint, Listing
from runner.checkpoints.runs import resolve
from runner.config import AUTO, CheckpointConfig
from runner.errors import ConfigError
from runner.installation import demo_run
from runner.results import Result, versions
from runner.tracking.base import Tracker

if TYPE_CHECKING:
    from rich.console import Console

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Context:
    """`directory`: the run's own; `quiet`: no progress is shown.

    `in_sweep`: whether other jobs follow that will want the same things again. `started` begins the
    tracker's run, once.
    """

    directory: Path
    tracker: Tracker
    quiet: bool = False
    in_sweep: bool = False
    started: Callable[[], None] = lambda: None
    timing: dict[str, float] = field(default_factory=dict)

    @property
    def progress(self) -> "Console":
        """The console (stderr) for bars, silent where it is no terminal."""
        from rich.console import Console

        return Console(stderr=True, quiet=self.quiet)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the seconds that the block takes to `timing[phase]`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.timing[phase] = self.timing.get(phase, 0.0) + time.perf_counter() - start

    def log(self, row: Mapping[str, float]) -> None:
        """Tell the tracker one live row; the first one begins the run, so that what is refused leaves none."""
        self.started()
        self.tracker.log(row)

    def result(self, task: str, checkpoint: Checkpoint, **more: Any) -> Result:
        """The result of `task` on `checkpoint`: what that is and what was found in it; `more` are further fields."""
        fields = {"findings": list(checkpoint.findings), **more}
        return Result(
            task=task, ckpt=str(checkpoint.path), step=checkpoint.step, family=checkpoint.family,
            format=checkpoint.format, timing=self.timing, versions=versions(), **fields,
        )  # fmt: skip

    def track(self, items: Iterable[Item], what: str, total: int | None = None) -> Iterator[Item]:
        """`items` one by one, under a bar that says `what`; nothing is shown for work that is done at once."""
        if self.quiet or not sys.stderr.isatty():  # rich is not imported to show nothing
            yield from items
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self.progress, transient=True) as progress:
            yield from progress.track(items, description=what, total=total)


DEMO = "demo"


def checkpoint_path(config: CheckpointConfig) -> Path:
    """The one checkpoint that `ckpt` and `step` name; of `demo` the last step is the default, which `last` names."""
    step = -1 if config.step == "last" else config.step
    if step is not None and (isinstance(step, bool) or not isinstance(step, int)):
        raise ConfigError(f"step={config.step}: a step is a whole number; several steps are a sweep: add -m")
    if config.ckpt != DEMO:
        return resolve(Path(config.ckpt).expanduser(), step)
    return resolve(demo_run(), -1 if step is None else step)


def require_checkpoint(config: CheckpointConfig) -> None:
    """Raise ConfigError or CheckpointError where `ckpt` and `step` name nothing that is there."""
    Listing.of(checkpoint_path(config))


def cache_directory(cache: str | None) -> Path:
    """Where things are kept between runs: `cache`, or its default."""
    return Path(cache).expanduser() if cache else Path.home() / ".cache" / "runner"


def check_family(config: CheckpointConfig, checkpoint: Checkpoint) -> None:
    """Raise ConfigError where the family that was asked for is not the checkpoint's."""
    if config.family.name != AUTO:
        config.family.of(checkpoint)
