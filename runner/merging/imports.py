"""Importing heavy libraries inside a function: fast, and not torn by Ctrl-C."""

import gc
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def importing() -> Iterator[None]:
    """For a block of imports: the garbage collector is off, and an interrupt waits for its end.

    Going through the million objects that torch leaves takes a quarter of the import time; and a library in whose
    import a KeyboardInterrupt falls swallows it, or stays half imported.
    """
    on_main_thread = threading.current_thread() is threading.main_thread()
    arrived = []

    def remember(number: int, frame: Any) -> None:
        arrived.append(number)

    before = signal.signal(signal.SIGINT, remember) if on_main_thread else None
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.freeze()
            gc.enable()
        if on_main_thread:
            signal.signal(signal.SIGINT, before)
    if arrived:
        raise KeyboardInterrupt
