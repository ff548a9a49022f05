"""A bar on a terminal that shows a training's step, loss, speed and the time left; nothing elsewhere.

A bar on a terminal that shows bytes done, bytes per second and the time left; nothing elsewhere.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


@contextmanager
def step_bar(
    console: Console, what: str, total: int, done: int = 0
) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
    """A function to call with (step, losses) after each step; `losses["loss"]` is shown."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total, completed=done, figures="")

        def on_step(step: int, losses: Mapping[str, float]) -> None:
            speed = progress.tasks[0].speed
            rate = f", {speed:.0f} steps/s" if speed else ""
            progress.update(task, completed=step, figures=f"loss {losses['loss']:.3f}{rate}")

        yield on_step


@contextmanager
def byte_bar(console: Console, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A function to call with the number of bytes that were just done, of `total`."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda count: progress.advance(task, count)
