"""How long a diagnosis takes beside what cannot be avoided: importing torch and transformers, and loading the base.

    python tests/benchmarks/diagnose_time.py [--repeats 3]

Writes a base of 100 million parameters and a run of ten 3-layer dual checkpoints (k 4, r 256) into a temporary
directory, then times whole processes alternately, and prints ratios of the medians taken in this one run.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

FLOOR = (
    "import torch, transformers; from transformers import AutoModelForCausalLM; "
    "AutoModelForCausalLM.from_pretrained({base!r}, dtype=torch.float32)"
)


def seconds(words: list[str], directory: Path) -> float:
    """Wall time of one process; raises where it fails."""
    start = time.perf_counter()
    done = subprocess.run(
        words, cwd=directory, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{words}: exit {done.returncode}\n{done.stderr}")
    return time.perf_counter() - start


def prepare(directory: Path) -> tuple[Path, Path]:
    """A base of 102 million parameters and a run of ten checkpoints."""
    from tests.conftest import npt_tensors, write_base, write_npt

    base = write_base(
        directory / "base", hidden=640, layers=12, vocab_size=32000, intermediate_size=1792, num_attention_heads=10,
        num_key_value_heads=10, max_position_embeddings=1024, initializer_range=0.02,
    )  # fmt: skip
    run = directory / "run"
    for number in range(1, 11):
        tensors = npt_tensors(base, dict.fromkeys((4, 7, 10), ("dual", 256, 4)), seed=number, scale=0.01)
        write_npt(run / f"checkpoint-{number}00", tensors, base=base, step=100 * number)
    return base, run


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        base, run = prepare(directory)
        python = sys.executable
        commands = {
            "import + load base": [python, "-c", FLOOR.format(base=str(base))],
            "diagnose, one step": [python, "-m", "runner", f"ckpt={run}", "step=-1", "tracker=none"],
            "diagnose, ten steps": [python, "-m", "runner", "-m", f"ckpt={run}", "step=all", "tracker=none"],
        }
        for words in commands.values():
            seconds(words, directory)  # warm the page cache
        taken: dict[str, list[float]] = {label: [] for label in commands}
        for _ in range(repeats):
            for label, words in commands.items():
                taken[label].append(seconds(words, directory))
    floor, one, ten = (statistics.median(values) for values in taken.values())
    print(f"{'':22} median of {repeats}")
    for label, values in taken.items():
        print(f"{label:22} {statistics.median(values):6.2f} s   (from {min(values):.2f} to {max(values):.2f})")
    print(f"one step / (import + load base)   {one / floor:.2f}   (goal: at most 1.3)")
    print(f"ten steps / one step              {ten / one:.2f}   (goal: at most 2.5)")


if __name__ == "__main__":
    main()
