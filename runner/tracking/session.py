"""wandb for the length of one job: its service started quietly, bounded in time, and gone without a trace afterwards.

wandb was made to own its process: it sets environment variables, replaces `sys.exit` and `sys.excepthook`, waits for
its service (`wandb-core`) without a limit, also when the interpreter exits, and the service writes its crashes to our
stderr. A session undoes all of this, so that the next job of a multirun starts afresh.
"""

import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any, TypeVar

T = TypeVar("T")
_START_SECONDS = 30  # for the service to start, on a busy machine
_END_SECONDS = 3  # for it to end; the run has been written by then


@contextmanager
def wandb_session(folder: Path, mode: str, warn: Callable[[str], None]) -> Iterator[ModuleType]:
    """The module `wandb` with its service running, all of its files in `folder`.

    `mode` stands in for WANDB_MODE: "online", "offline", or "auto", which leaves it to the user's settings of wandb;
    what wandb would print as a warning goes to `warn`. Raises what wandb raises, and TimeoutError where the
    service does not start or end.
    """
    with ExitStack() as undo:
        undo.enter_context(_environment(_variables(folder, mode)))
        undo.enter_context(_exit_hooks())
        import wandb

        undo.enter_context(_silent_logger())
        settings = wandb.Settings(silent=True, x_service_wait=_START_SECONDS)
        service = None
        try:
            with _quiet_service():
                service = _service_of(within(_START_SECONDS + 5, lambda: wandb.setup(settings)))
            wandb.termsetup(settings, _Messages(warn))
            yield wandb
        finally:
            _shut_down(wandb, service)


def within(seconds: float, call: Callable[[], T]) -> T:
    """What `call` returns, or raises; TimeoutError after `seconds`, with `call` left behind in its thread."""
    outcome: Future[T] = Future()

    def work() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:  # wandb.teardown may call sys.exit
            outcome.set_exception(error)

    Thread(target=work, daemon=True, name="wandb call").start()
    try:
        return outcome.result(timeout=seconds)
    except TimeoutError as error:
        raise error if outcome.done() else TimeoutError(f"no answer in {seconds:g} s") from None
    except SystemExit as error:
        raise RuntimeError(f"wandb-core ended with exit code {error.code}") from error


def _variables(folder: Path, mode: str) -> dict[str, str | None]:
    """Environment of the session. WANDB_SERVICE would hand us the service of a process around this one."""
    kept = {name: os.environ[name] for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR") if os.environ.get(name)}
    return {
        "WANDB_MODE": None if mode == "auto" else mode,
        "WANDB_SILENT": "true",
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_SERVICE": None,
        # Tables and artifacts are staged here; `wandb sync` needs them, and the default is in the home directory.
        "WANDB_DATA_DIR": str(folder / "data"),
        "WANDB_CACHE_DIR": str(folder / "cache"),
        **kept,
    }


@contextmanager
def _environment(variables: Mapping[str, str | None]) -> Iterator[None]:
    """Environment variables set (None: unset) for the length of the block."""
    before = {name: os.environ.get(name) for name in variables}

    def put(values: Mapping[str, str | None]) -> None:
        for name, value in values.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    put(variables)
    try:
        yield
    finally:
        put(before)


@contextmanager
def _exit_hooks() -> Iterator[None]:
    """Put back `sys.exit` and `sys.excepthook`, which wandb replaces when its service starts."""
    before = sys.exit, sys.excepthook
    try:
        yield
    finally:
        sys.exit, sys.excepthook = before


@contextmanager
def _silent_logger() -> Iterator[None]:
    """Keep wandb's own debug log from being written: on a full disk `logging` prints a traceback for each line."""
    logger = logging.getLogger("wandb")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


class _QuietService(subprocess.Popen):
    """A process as asked for, but for wandb-core: that one writes its crashes nowhere."""

    def __init__(self, args: Any, *rest: Any, **options: Any) -> None:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL} if "wandb-core" in str(args) else {}
        super().__init__(args, *rest, **{**options, **quiet})


@contextmanager
def _quiet_service() -> Iterator[None]:
    """Start wandb-core without our stdout and stderr. Those stay open to the other threads of this process."""
    before = subprocess.Popen
    subprocess.Popen = _QuietService  # type: ignore[misc]
    try:
        yield
    finally:
        subprocess.Popen = before  # type: ignore[misc]


class _Messages:
    """Takes what a silent wandb would have printed."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn

    def info(self, message: str) -> None:
        pass

    def warning(self, message: str) -> None:
        self._warn(re.sub(r"^wandb:\s*((WARNING|ERROR)\s+)?", "", message))

    error = warning


def _shut_down(wandb: ModuleType, service: subprocess.Popen[bytes] | None) -> None:
    """End the service; one that does not end in time is killed. Raises what wandb raises."""
    try:
        within(_END_SECONDS, wandb.teardown)
    finally:
        if service is not None and service.poll() is None:
            service.kill()
            service.wait()


def _service_of(setup: object) -> subprocess.Popen[bytes] | None:
    """The process of wandb-core. wandb waits for it without a limit and has no public way to end one that hangs."""
    process = setup
    for name in ("_connection", "_proc", "_process"):
        process = getattr(process, name, None)
    return process if isinstance(process, subprocess.Popen) else None
