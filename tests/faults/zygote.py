"""A process that has imported everything a merge needs, and forks a child for each command line it is given.

A child is the command line itself, `runner.cli.run`, in a process of its own that strace can be attached to before it
starts. What is different: names that are drawn by chance are fixed, so that a call can be found again in another run,
and files are written in small steps, so that there are many.
"""

import json
import os
import sys
import uuid
from pathlib import Path

import torch

from runner import cli
from runner.families.npt import merge as npt_merge  # noqa: F401
from runner.files import staging as commit  # noqa: F401 - imported here so that no child has to
from runner.files import staging as leftovers  # noqa: F401 - imported here so that no child has to
from runner.merge import inputs, verify  # noqa: F401
from runner.merge import writer as sinks
from runner.tasks import merge  # noqa: F401


class Fixed:
    """Stands for a random UUID."""

    hex = "0123456789abcdef"


def child(job: dict, go: int) -> int:
    """Wait for a byte on `go`, then run the command line; its exit code."""
    os.chdir(job["cwd"])
    out = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.read(go, 1)
    code = cli.run(job["words"])
    sys.stdout.flush()
    return code


def main() -> None:
    """For each line of JSON: fork, say the child's number, wait for `go`, say how it ended."""
    uuid.uuid4 = Fixed
    sinks.BUFFER = 2048
    torch.set_num_threads(1)
    for line in sys.stdin:
        go, start = os.pipe()
        number = os.fork()
        if number == 0:
            os.close(start)
            try:
                os._exit(child(json.loads(line), go))
            except BaseException:
                os._exit(99)
        os.close(go)
        print(number, flush=True)
        assert sys.stdin.readline() == "go\n"
        os.write(start, b"x")
        os.close(start)
        _, status = os.waitpid(number, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    main()
