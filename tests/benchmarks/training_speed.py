"""Optimizer steps of NPT training on the demonstration's recipe, of this checkout and of another.

    python tests/benchmarks/training_speed.py [OTHER_CHECKOUT] [--steps 500]

Steps per second of CPU time in later epochs, where what the base computes is known; each checkout in a process of its
own, alternately. OTHER_CHECKOUT may be one of before the families had folders of their own (e0cf704).
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RUN = """
import random, sys, tempfile, time
from pathlib import Path
import torch
from tokenizers import Tokenizer
from runner.data.world import generate
from runner.training.batches import equal_length_batches, packed_samples, sentence_samples
root, steps, after = Path(sys.argv[1]), int(sys.argv[2]), 1100
if (root / "runner" / "families").is_dir():
    from runner.evaluation.base_models import load_base
    from runner.evaluation.placement import Placement
    from runner.families.npt import EquivalenceSettings
    from runner.families.npt.training import train_run
    options = {"placement": Placement(device="cpu"), "llama": True}
else:
    from runner.bases import load_base
    from runner.training.runs import train_run
    from runner.training.settings import EquivalenceSettings
    options = {"device": "cpu"}
torch.set_num_threads(1)
directory = Path(sys.argv[3])
base, tokenizer = load_base(None, directory, **options), Tokenizer.from_file(str(directory / "tokenizer.json"))
settings = EquivalenceSettings(
    layers=(1, 2), np_rank=16, num_ranks=2, max_steps=6000, save_every=10**9, warmup_steps=5000, learning_rate=1.5e-3,
    initial_scale=3.0, direct_weight=5.0, gradient_clip_value=0.5, batch_size=4,
)
chooser, sentences = random.Random(0), generate(0).train
batches = equal_length_batches(sentence_samples(sentences, tokenizer), settings.batch_size, chooser)
batches += equal_length_batches(packed_samples(sentences, tokenizer, settings.sequence_length)[:20], 1, chooser)

class Enough(Exception):
    pass

marks = {}
def on_step(step, figures):
    marks[step] = time.process_time()
    if step == after + steps:
        raise Enough

try:
    train_run(Path(tempfile.mkdtemp()) / "run", base, [b.ids for b in batches], settings, base_name="x", on_step=on_step)
except Enough:
    print(steps / (marks[after + steps] - marks[after]))
"""


def measure(root: Path, steps: int) -> float:
    """Steps per CPU second of the checkout at `root`."""
    base = ROOT / "runner" / "demo" / "run" / "base"
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(root), str(steps), str(base)],
        cwd=root, env={"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, nargs="?")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    roots = [ROOT, *([options.other.resolve()] if options.other else [])]
    found = {root: [] for root in roots}
    for _ in range(options.rounds):
        for root in roots:
            found[root].append(measure(root, options.steps))
    for root, speeds in found.items():
        print(f"{root.name}: {statistics.median(speeds):.1f} steps per CPU second")
    if options.other:
        print(f"ratio: {statistics.median(found[ROOT]) / statistics.median(found[roots[1]]):.2f}")


if __name__ == "__main__":
    main()
