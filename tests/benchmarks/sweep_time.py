"""What a sweep costs beside one job: ten checkpoints in one process, and the same sweep once more.

    python tests/benchmarks/sweep_time.py [--repeats 3] [--tier quick] [--steps 10] [--tiny 200]

Times whole processes over the base of 100 million parameters and the ten checkpoints of diagnose_time.py (or the last
--steps of them), alternately, the single job and each pair of sweeps with an empty cache; prints ratios of the medians.
--tiny N instead times a sweep of N checkpoints of a tiny model, and its first and last jobs: nothing may grow with
their number.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.benchmarks.diagnose_time import prepare, seconds  # noqa: E402 - the path is set above


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tier", default="quick")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--tiny", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        if options.tiny:
            many_tiny(Path(name), options.tiny)
        else:
            one_many_again(Path(name), options.repeats, options.tier, options.steps)


def one_many_again(directory: Path, repeats: int, tier: str, count: int) -> None:
    """One step, `count` steps with nothing kept, the same ones once more."""
    _, run = prepare(directory)
    # The hash of a file that has just been written is not remembered.
    time.sleep(3)
    runner = [sys.executable, "-m", "runner", "tracker=none", f"ckpt={run}", f"tier={tier}"]
    steps = f"step={','.join(str(-number) for number in range(1, count + 1))}"
    taken: dict[str, list[float]] = {"one step": [], f"{count} steps": [], "the same sweep again": []}
    seconds([*runner, "step=-1"], directory)  # warm the page cache
    for number in range(repeats):
        own, cache = (f"cache={directory / f'{name}-{number}'}" for name in ("one", "many"))
        runs = ([*runner, "step=-1", own], [*runner, "-m", steps, cache], [*runner, "-m", steps, cache])
        for values, words in zip(taken.values(), runs, strict=True):
            values.append(seconds(words, directory))
    one, many, again = (statistics.median(values) for values in taken.values())
    print(f"{'':22} median of {repeats}, tier={tier}")
    for label, values in taken.items():
        print(f"{label:22} {statistics.median(values):6.2f} s   (from {min(values):.2f} to {max(values):.2f})")
    print(f"{count} steps / one step           {many / one:.2f}   (goal for ten, quick: at most 2.5)")
    print(f"the second sweep / the first  {again / many:.2f}   (goal: below 1)")


def many_tiny(directory: Path, count: int) -> None:
    """A sweep of `count` checkpoints of a tiny model."""
    from tests.conftest import npt_tensors, write_base, write_npt

    base = write_base(directory / "base")
    for number in range(1, count + 1):
        tensors = npt_tensors(base, {1: ("dual", 2, 2)}, seed=number)
        write_npt(directory / "run" / f"checkpoint-{number}", tensors, base=base, step=number)
    words = [sys.executable, "-m", "runner", "-m", "tracker=none", f"ckpt={directory / 'run'}", "step=all"]
    total = seconds([*words, f"cache={directory / 'cache'}"], directory)
    (sweep,) = (directory / "sweeps").iterdir()
    jobs = json.loads((sweep / "sweep.json").read_text())["jobs"]
    ended = [(sweep / job["directory"] / "result.json").stat().st_mtime for job in jobs]
    tenth = max(1, count // 10)
    first, last = (
        statistics.mean(b - a for a, b in pairwise(part)) for part in (ended[: tenth + 1], ended[-tenth - 1 :])
    )
    print(
        f"{count} jobs in {total:.1f} s; from one to the next {first:.3f} s in the first tenth, {last:.3f} s in the last"
    )
    print(f"before the first job ended {ended[0] - (sweep / 'sweep.json').stat().st_mtime:.1f} s after the plan")
    print(f"after the last job {time.time() - ended[-1]:.1f} s until all was compared")


if __name__ == "__main__":
    main()
