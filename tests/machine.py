"""How slow this machine is just now, and limits that follow from it. They catch hangs; nothing is to be read from them."""

import time
from collections.abc import Callable

import psutil
import torch  # noqa: F401 - the work that is measured: from the start of this process to here

_USUAL = 2.0  # seconds, on two idle cores
SLOW = max(1.0, (time.time() - psutil.Process().create_time()) / _USUAL)
LIMIT = 120 * SLOW  # seconds after which something hangs


def wait_for(condition: Callable[[], object], what: str = "nothing happened") -> None:
    """Until `condition()` holds; AssertionError where it never does."""
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)
