"""What a diagnosis costs beside another checkout of this repository: CPU seconds and peak memory of whole processes.

    python tests/benchmarks/diagnose_cost.py CHECKOUT [--repeats 5]

Writes a Llama of 102 million parameters, another with other weights, and NPT layers over the first (3 layers, dual,
k 4, r 256) into a temporary directory; then runs this repository and CHECKOUT in turn on the demonstration, on the NPT
checkpoint, and on one Llama against the other, and prints the ratios of the medians taken in this one run. (CHECKOUT
is not run on the demonstration: older ones train it first.)
"""

import argparse
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def cost(words: list[str], root: Path, directory: Path) -> tuple[float, float]:
    """CPU seconds and peak memory in MiB of one process with the package of `root`; raises where it fails."""
    home = directory / f"home-{root.name}"
    home.mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(root), "HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")}
    with (directory / "output").open("w+") as output:
        process = subprocess.Popen(words, cwd=directory, env=environment, stdout=output, stderr=output)
        _, status, used = os.wait4(process.pid, 0)
        if status:
            output.seek(0)
            raise SystemExit(f"{words} with {root}: exit {os.waitstatus_to_exitcode(status)}\n{output.read()}")
    return used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def prepare(directory: Path) -> dict[str, list[str]]:
    """The words of each command."""
    from tests.conftest import npt_tensors, write_base, write_npt

    bases = [
        write_base(
            directory / f"base{seed}", seed=seed, hidden=640, layers=12, vocab_size=32000, intermediate_size=1792,
            num_attention_heads=10, num_key_value_heads=10, max_position_embeddings=1024, initializer_range=0.02,
        )
        for seed in range(2)
    ]  # fmt: skip
    tensors = npt_tensors(bases[0], dict.fromkeys((4, 7, 10), ("dual", 256, 4)), scale=0.01)
    npt = write_npt(directory / "run" / "checkpoint-100", tensors, base=bases[0], step=100)
    return {
        "the demonstration": [],
        "NPT over a Llama of 102M": [f"ckpt={npt}"],
        "a Llama of 102M against another": [f"ckpt={bases[0]}", f"reference={bases[1]}"],
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    roots = (ROOT, options.checkout.resolve())
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        # In a process of its own: the peak that a child is told of starts with the memory of its parent.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            commands = pool.apply(prepare, (directory,))
        torch_alone = statistics.median(
            cost([sys.executable, "-c", "import torch"], ROOT, directory)[0] for _ in range(options.repeats)
        )
        print(f"import torch: {torch_alone:.2f} CPU seconds; medians of {options.repeats}")
        for label, words in commands.items():
            turn = roots if words else (ROOT,)
            taken: dict[Path, list[tuple[float, float]]] = {root: [] for root in turn}
            for number in range(options.repeats + 1):
                for root in turn:
                    found = cost([sys.executable, "-m", "runner", *words, "tracker=none"], root, directory)
                    if number:  # the first one warms the page cache
                        taken[root].append(found)
            cpu, peak = ([statistics.median(row[i] for row in rows) for rows in taken.values()] for i in range(2))
            print(
                f"{label:32} CPU {ratio(cpu, 's', 2)}, {cpu[0] / torch_alone:.2f} x import torch   "
                f"peak {ratio(peak, 'MiB', 0)}",
                flush=True,
            )


def ratio(medians: list[float], unit: str, digits: int) -> str:
    """One median, or two and their ratio."""
    if len(medians) == 1:
        return f"{medians[0]:.{digits}f} {unit}"
    return f"{medians[0]:.{digits}f} / {medians[1]:.{digits}f} {unit} = {medians[0] / medians[1]:.2f}"


if __name__ == "__main__":
    main()
