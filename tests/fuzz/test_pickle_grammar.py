"""Random pickles by grammar, in every file that a pickle may lie in: a value or a typed error, never a signal.

Each batch runs in a forked child, so that a crash of the process is seen. `RUNNER_FUZZ_SECONDS` sets the time, and
`RUNNER_FUZZ_SEED` where the seeds begin.
"""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.checkpoints.grammar_readers import TARGETS, tried, write_targets
from tests.fuzz.test_readers import SECONDS

pytestmark = pytest.mark.fuzz
BATCH = 100


def forked(directory: Path, name: str, seeds: range) -> None:
    """The seeds in a child of at most five minutes; fails on a signal or a traceback."""
    child = os.fork()
    if child == 0:
        signal.alarm(300)
        found = list(filter(None, (tried(directory, name, seed) for seed in seeds)))
        if found:
            print("\n".join(found[:3]), flush=True)
        os._exit(1 if found else 0)
    _, status = os.waitpid(child, 0)
    assert not os.WIFSIGNALED(status), f"killed by signal {os.WTERMSIG(status)} in {name}, seeds {seeds}"
    assert os.WEXITSTATUS(status) == 0, f"{name}, seeds {seeds}: see what it printed"


@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TARGETS)
def test_any_pickle_ends_in_a_value_or_an_error(name, tmp_path, base):
    write_targets(tmp_path, base)
    end = time.monotonic() + SECONDS / len(TARGETS)
    seed = int(os.environ.get("RUNNER_FUZZ_SEED", "1000"))
    while time.monotonic() < end:
        forked(tmp_path, name, range(seed, seed + BATCH))
        seed += BATCH
