"""Bars on a terminal for work whose size is known; nothing elsewhere."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


@contextmanager
def step_bar(
    console: Console,
    what: str,
    total: int,
    done: int = 0,
    *,
    tokens: int | None = None,
    stage: Callable[[int], str | None] = lambda step: None,
) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
    """A function to call with (step, losses) after each step; `losses["loss"]`, speed and time left are shown, with
    `tokens` a step those in a second, too, and the name of the `stage` that a step runs in."""
    with _bar(console, MofNCompleteColumn(), TextColumn("{task.fields[figures]}")) as progress:
        task = progress.add_task(what, total=total, completed=done, figures="")

        def on_step(step: int, losses: Mapping[str, float]) -> None:
            speed = progress.tasks[0].speed
            rate = f", {speed:.3g} steps/s" if speed else ""
            rate += f", {speed * tokens:,.0f} tokens/s" if speed and tokens else ""
            name = f"{stage(step)}, " if stage(step) else ""
            shown = f"{name}loss {losses['loss']:.3f}{rate}"
            progress.update(task, completed=step, total=max(total, step), figures=shown)

        yield on_step


@contextmanager
def byte_bar(console: Console, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A function to call with the number of bytes just done, of `total`; speed and time left are shown."""
    with _bar(console, DownloadColumn(binary_units=True), TransferSpeedColumn()) as progress:
        task = progress.add_task(what, total=total)
        yield lambda count: progress.advance(task, count)


def _bar(console: Console, *columns: ProgressColumn) -> Progress:
    every = (TextColumn("{task.description}"), BarColumn(), *columns, TimeRemainingColumn())
    return Progress(*every, console=console, transient=True, disable=not console.is_terminal)
