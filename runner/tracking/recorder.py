"""Runs that are recorded after their command has ended, by a process of its own, which outlives command and terminal.

A run is left as a file in the folder of the runs before its command says that it is done. The recorder removes that
file when the run is recorded: one that is killed leaves it to the next. What goes wrong is written to the run's log.
"""

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from runner.files.atomic import write_whole
from runner.results import JsonObject

PENDING = "pending"


@dataclass(frozen=True, kw_only=True)
class Left:
    """What a recorder needs to know of a run: the tracker's settings, and what its methods take."""

    tracker: JsonObject
    identity: JsonObject
    config: JsonObject
    result: JsonObject
    exit_code: int
    log: str
    run_id: str
    cwd: str


def leave(folder: Path, left: Left) -> None:
    """Leave a run for a recorder. Raises OSError where it cannot be written."""
    write_whole(folder / PENDING / f"{left.run_id}.json", json.dumps(asdict(left), default=str).encode())


def start(folder: Path) -> None:
    """Start a recorder of what is left in `folder`, which nobody waits for."""
    path = [*filter(None, [os.environ.get("PYTHONPATH")]), str(Path(__file__).resolve().parents[2])]
    subprocess.Popen(
        [sys.executable, "-P", "-c", f"from runner.tracking.wandb import record_left; record_left({str(folder)!r})"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # neither Ctrl-C nor the end of the terminal is for it
    )


def left_in(folder: Path) -> Iterator[Left]:
    """Every run that is left in `folder` and that no other recorder has in hand, the oldest first.

    Who asks for the next one has recorded the one before. The current directory is that of the run's command.
    """
    for file in sorted((folder / PENDING).glob("*.json"), key=lambda path: path.stat().st_mtime_ns):
        with _in_hand(file) as content:
            if content is not None:
                left = Left(**json.load(content))
                with suppress(OSError):
                    os.chdir(left.cwd)
                yield left
                file.unlink()


@contextmanager
def _in_hand(file: Path) -> Iterator[IO[bytes] | None]:
    """The open file, held against other recorders; None where one of them has it or has recorded it."""
    try:
        content = file.open("rb")
    except FileNotFoundError:
        yield None
        return
    with content:
        try:
            fcntl.flock(content, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        yield content if file.exists() else None


def log(left: Left, warnings: list[str], location: str | None) -> None:
    """Add to the run's log what became of its record; where its directory is gone there is nobody to be told."""
    moment = time.strftime("%Y-%m-%d %H:%M:%S,000")
    lines = [*(("WARNING", words) for words in warnings), *([("INFO", location)] if location else [])]
    with suppress(OSError), Path(left.log).open("a", encoding="utf-8") as file:
        file.writelines(f"[{moment}][{__name__}][{level}] {words}\n" for level, words in lines)
