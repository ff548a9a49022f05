"""What is installed: where conf/ and the demonstration lie; heavy libraries imported fast, and not torn by Ctrl-C."""

import gc
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import FrameType

from runner.errors import ConfigError


def config_directory() -> Path:
    """The absolute path of conf/. Raises ConfigError for an installation without it."""
    package = Path(__file__).resolve().parent
    for directory in (package / "conf", package.parent / "conf"):
        if (directory / "config.yaml").is_file():
            return directory
    raise ConfigError("the installation has no conf/ directory; install runner again")


def demo_run() -> Path:
    """The demonstration's run directory: `base` and `checkpoint-<step>`. Raises ConfigError where it is missing."""
    run = Path(__file__).resolve().parent / "demo" / "run"
    if not run.is_dir():
        raise ConfigError("the installation has no demonstration; install runner again, or give ckpt=PATH")
    return run


@contextmanager
def uncollected() -> Iterator[None]:
    """For a block of imports: the garbage collector is off, and never looks at what they left.

    Going through the million objects that torch and transformers leave takes a quarter of the import time.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def first_torch() -> AbstractContextManager[None]:
    """`uncollected` around an import of torch in a function, where it is the first one."""
    return nullcontext() if "torch" in sys.modules else uncollected()


@contextmanager
def importing() -> Iterator[None]:
    """`uncollected`, and an interrupt waits for the end of the block.

    A library in whose import a KeyboardInterrupt falls swallows it, or stays half imported.
    """
    on_main_thread = threading.current_thread() is threading.main_thread()
    arrived = []

    def remember(number: int, frame: FrameType | None) -> None:
        arrived.append(number)

    before = signal.signal(signal.SIGINT, remember) if on_main_thread else None
    try:
        with uncollected():
            yield
    finally:
        if on_main_thread:
            signal.signal(signal.SIGINT, before)
    if arrived:
        raise KeyboardInterrupt
