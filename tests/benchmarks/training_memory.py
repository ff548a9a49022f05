"""Training on a large text against a small one: peak memory, and seconds from the start to the first step.

    python tests/benchmarks/training_memory.py [--small 10] [--large 1000] [--steps 30]

Sizes in MB. Each training runs in a process of its own; prints figures taken in this one run.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# What runs in a process of its own: the command line, its peak memory, and when the first row was logged.
RUN = """
import json, resource, sys, time
started = time.process_time(), time.monotonic()
from runner import cli
from runner.tasks import train
first = []
log = train._Follower.log
def logged(self, step, figures):
    first[:] = first or [time.process_time() - started[0], time.monotonic() - started[1]]
    log(self, step, figures)
train._Follower.log = logged
code = cli.run(sys.argv[1:])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"code": code, "peak": peak, "first_cpu": first[0], "first": first[1]}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", type=int, default=10)
    parser.add_argument("--large", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    chooser = random.Random(0)
    words = ["".join(chooser.choice("aeioubdgklmnprst") for _ in range(chooser.randint(2, 9))) for _ in range(5000)]
    text = "\n\n".join(" ".join(chooser.choices(words, k=chooser.randint(20, 300))) for _ in range(1100))
    block = text.encode()[: 1 << 20].rsplit(b" ", 1)[0] + b"\n\n"
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        for name, size in (("small", options.small), ("large", options.large)):
            path = Path(directory) / f"{name}.txt"
            with path.open("wb") as file:
                for _ in range(size * 1_000_000 // len(block)):
                    file.write(block)
            given = [
                "task=train", "data=text", f"data.path={path}", f"train.max_steps={options.steps}", "train.log_every=1",
                "train.warmup_steps=1", "train.sequence_length=128", "tracker=none", "device=cpu",
            ]  # fmt: skip
            done = subprocess.run(
                [sys.executable, "-c", RUN, *given], cwd=directory, env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            found[name] = json.loads(done.stdout.splitlines()[-1])
            print(f"{name}: {size} MB of text, peak {found[name]['peak']:.0f} MiB, first step after "
                  f"{found[name]['first']:.1f} s ({found[name]['first_cpu']:.1f} CPU seconds)")  # fmt: skip
    print(f"difference of the peaks: {found['large']['peak'] - found['small']['peak']:.1f} MiB")


if __name__ == "__main__":
    main()
