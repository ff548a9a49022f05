"""How long a merge takes beside copying the same bytes, and how much memory it takes of its own.

    python tests/benchmarks/merge_time.py [--repeats 5] [--directory DIR]

Writes two sources of 600 MB each (one layer: triple, k 8, r 512, d 2048, f 8192) into a temporary directory, then runs
`cp` with fsync, `import torch` alone, and the whole merge process alternately, and prints ratios of the medians taken
in this one run. Memory is RssAnon, sampled every 5 ms: pages of mapped files are left out.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

HIDDEN, INNER, RANK, COUNT = 2048, 8192, 512, 8


def prepare(directory: Path) -> list[Path]:
    """Two checkpoints of one layer each."""
    from runner.families.npt import checkpoint as npt_delta

    sources = []
    for layer in (11, 13):
        generator = torch.Generator().manual_seed(layer)
        weights = {}
        for projection in ("gate", "up", "down"):
            d_in, d_out = (INNER, HIDDEN) if projection == "down" else (HIDDEN, INNER)
            for matrix, shape in zip(npt_delta.MATRICES, ((HIDDEN, RANK), (RANK, d_in), (RANK, d_out)), strict=True):
                for i in range(COUNT):
                    name = npt_delta.key(layer, "triple", projection, matrix, i, COUNT)
                    weights[name] = torch.randn(shape, generator=generator) * 0.01
        path = directory / f"layer{layer}" / f"checkpoint-{layer}000"
        path.mkdir(parents=True)
        torch.save(weights, path / "npt_weights.pt")
        sources.append(path)
    return sources


def copy(sources: list[Path], target: Path) -> float:
    """Seconds of `cp` and fsync."""
    target.mkdir()
    files = [str(source / "npt_weights.pt") for source in sources]
    start = time.perf_counter()
    for number, file in enumerate(files):
        subprocess.run(["cp", file, str(target / f"{number}.pt")], check=True)
    subprocess.run(["sync", *map(str, target.iterdir())], check=True)
    return time.perf_counter() - start


def process(words: list[str], directory: Path) -> tuple[float, int]:
    """Seconds of one process, and its largest RssAnon in bytes; raises where it fails."""
    peak = 0
    start = time.perf_counter()
    running = subprocess.Popen(
        words, cwd=directory, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip

    def watch() -> None:
        nonlocal peak
        status = Path(f"/proc/{running.pid}/status")
        while running.poll() is None:
            try:
                lines = status.read_text().splitlines()
            except OSError:
                return
            peak = max([peak, *(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:"))])
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, _ = running.communicate()
    seconds = time.perf_counter() - start
    watcher.join()
    if running.returncode:
        raise SystemExit(f"{words}: exit {running.returncode}\n{output}")
    return seconds, peak


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--directory", type=Path, default=None, help="where the files are written")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        directory = Path(name)
        sources = prepare(directory)
        total = sum((source / "npt_weights.pt").stat().st_size for source in sources)
        merge = [
            sys.executable, "-m", "runner", "task=merge", "tracker=none",
            f"merge.sources=[{','.join(map(str, sources))}]", f"merge.output={directory / 'merged'}",
        ]  # fmt: skip
        taken: dict[str, list[float]] = {"cp and fsync": [], "import torch": [], "merge": []}
        peaks = []
        for turn in range(-1, arguments.repeats):
            copied = copy(sources, directory / "copied")
            shutil.rmtree(directory / "copied")
            imported, rest = process([sys.executable, "-c", "import torch"], directory)
            merged, peak = process(merge, directory)
            shutil.rmtree(directory / "merged")
            if turn >= 0:  # the first turn warms the page cache
                for label, seconds in zip(taken, (copied, imported, merged), strict=True):
                    taken[label].append(seconds)
                peaks.append(peak)
    cp, at_rest, whole = (statistics.median(seconds) for seconds in taken.values())
    print(f"{total / 1e9:.2f} GB in two sources; medians of {arguments.repeats}")
    for label, seconds in taken.items():
        print(f"{label:14} {statistics.median(seconds):6.2f} s   (from {min(seconds):.2f} to {max(seconds):.2f})")
    print(f"(merge - import torch) / cp   {(whole - at_rest) / cp:.2f}   (goal: at most 1.5)")
    print(
        f"peak RssAnon of the merge     {max(peaks) / 1e6:.0f} MB   (goal: under 400; import torch alone {rest / 1e6:.0f})"
    )
    print(f"peak RssAnon / bytes merged   {max(peaks) / total:.2f}")


if __name__ == "__main__":
    main()
