"""A process that has merged once, so has imported all it takes, and forks a child for each command line it is given.

A child is the command line itself, `runner.cli.run`, in a process of its own that strace can be attached to before it
starts. What is different: names that are drawn by chance are fixed, so that a call can be found again in another run,
and files are written in small steps, so that there are many.
"""

import contextlib
import io
import json
import os
import sys
import tempfile
import uuid
from pathlib import Path

import torch

from runner import cli
from runner.merge import writer as sinks
from tests.merge.sources import write_source


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


def warm_up() -> None:
    """One merge here, so that no child imports anything: a child costs a quarter of the CPU seconds."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        for seed, name in enumerate("ab"):
            write_source(Path(folder, name), {seed: ("single", 2, 2)}, seed=seed)
        words = [f"merge.sources=[{folder}/a,{folder}/b]", f"merge.output={folder}/out", f"hydra.run.dir={folder}/log"]
        assert cli.run(["task=merge", "tracker=none", *words]) == 0


def main() -> None:
    """For each line of JSON: fork, say the child's number, wait for `go`, say how it ended."""
    warm_up()
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
