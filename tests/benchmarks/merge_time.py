"""What merges cost: processor seconds, time and memory of whole processes, paired and alternating, ratios of one run.

    python tests/benchmarks/merge_time.py [--repeats 5] [--directory DIR] [--against CHECKOUT] [--mergekit VENV]
                                          [--only union,average,linear,slerp,ties,dare_ties]

* union: two NPT sources of 600 MB each (one layer: triple, k 8, r 512, d 2048, f 8192) into one, beside `cp` with fsync
  of the same files, `python -c pass`, `import torch`, and, with --against, another checkout of this repository.
* average: two GPT .pt files of 456 MB each; linear, slerp, ties, dare_ties: two Llamas of 414 MB over a base; each
  beside mergekit, in an environment of its own (--mergekit, the folder with bin/mergekit-yaml in it).

Memory is RssAnon, sampled every 5 ms: pages of mapped files are left out.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

HIDDEN, INNER, RANK, COUNT = 2048, 8192, 512, 8
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 25904, "hidden_size": 768,
    "intermediate_size": 2048, "num_hidden_layers": 9, "num_attention_heads": 12, "num_key_value_heads": 12,
    "tie_word_embeddings": False, "torch_dtype": "float32",
}  # fmt: skip
METHODS = ("linear", "slerp", "ties", "dare_ties")


def npt_sources(directory: Path) -> list[Path]:
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


def gpt_sources(directory: Path) -> list[Path]:
    """Two GPTs of 456 MB each, as their training script saves them."""
    from tests.gpt_files import random_state, script_file

    paths = []
    for seed, name in enumerate("ab"):
        path = directory / f"gpt_{name}.pt"
        state = random_state("small", layers=12, width=768, vocab=8184, seed=seed)
        script_file(path, state)
        torch.save(state, path.with_suffix(".bare.pt"))  # the state dict alone, as mergekit needs it
        paths.append(path)
    return paths


def llamas(directory: Path) -> list[Path]:
    """A base and two models near it."""
    from runner.families.hf.checkpoint import llama_shapes

    paths = []
    shapes = llama_shapes(LLAMA)
    for seed, name in enumerate(("base", "a", "b")):
        tensors = {}
        for number, (key, shape) in enumerate(shapes.items()):
            tensors[key] = torch.randn(shape, generator=torch.Generator().manual_seed(number)) * 0.02
            if seed:
                tensors[key] += (
                    torch.randn(shape, generator=torch.Generator().manual_seed(1000 * seed + number)) * 0.004
                )
        (directory / name).mkdir()
        (directory / name / "config.json").write_text(json.dumps(LLAMA))
        save_file(tensors, directory / name / "model.safetensors", metadata={"format": "pt"})
        paths.append(directory / name)
    return paths


@dataclass(frozen=True)
class Cost:
    """Of one process: processor seconds, seconds, and the largest RssAnon in bytes."""

    cpu: float
    wall: float
    peak: int


def process(words: list[str], directory: Path, root: Path = ROOT) -> Cost:
    """Run it; raises where it fails."""
    peak, done = 0, threading.Event()
    start = time.perf_counter()
    with (directory / "said").open("wb") as said:
        running = subprocess.Popen(
            words, cwd=directory, env={**os.environ, "PYTHONPATH": str(root)}, stdout=said, stderr=subprocess.STDOUT
        )

    def watch() -> None:
        nonlocal peak
        status = Path(f"/proc/{running.pid}/status")
        while not done.is_set():
            try:
                lines = status.read_text().splitlines()
            except OSError:
                return
            peak = max([peak, *(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:"))])
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, code, used = os.wait4(running.pid, 0)
    running.returncode = os.waitstatus_to_exitcode(code)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    if running.returncode:
        raise SystemExit(f"{words}: exit {running.returncode}\n{(directory / 'said').read_text()}")
    return Cost(used.ru_utime + used.ru_stime, seconds, peak)


def runner(directory: Path, *words: str, root: Path = ROOT) -> Cost:
    """One merge into `merged`, which is removed again."""
    cost = process(
        [sys.executable, "-m", "runner", "task=merge", "tracker=none", f"merge.output={directory / 'merged'}", *words],
        directory, root,
    )  # fmt: skip
    shutil.rmtree(directory / "merged")
    return cost


def mergekit(directory: Path, venv: Path, program: str, recipe: dict) -> Cost:
    """One merge by mergekit into `theirs`, which is removed again."""
    (directory / "recipe.yml").write_text(yaml.safe_dump(recipe))
    words = [str(venv / "bin" / program), "recipe.yml", str(directory / "theirs"), "--no-copy-tokenizer"]
    cost = process([*words, "--no-write-model-card"], directory, venv)
    shutil.rmtree(directory / "theirs")
    return cost


def copy(files: list[Path], directory: Path) -> Cost:
    """`cp` and fsync."""
    target = directory / "copied"
    target.mkdir()
    pairs = [(str(file), str(target / str(number))) for number, file in enumerate(files)]
    script = "; ".join([*(f"cp '{a}' '{b}'" for a, b in pairs), "sync " + " ".join(f"'{b}'" for _, b in pairs)])
    cost = process(["sh", "-ec", script], directory)
    shutil.rmtree(target)
    return cost


def alternating(repeats: int, **runs) -> dict[str, Cost]:
    """Medians; the first turn, which warms the page cache, does not count."""
    found: dict[str, list[Cost]] = {name: [] for name in runs}
    for turn in range(-1, repeats):
        for name, run in runs.items():
            cost = run()
            if turn >= 0:
                found[name].append(cost)
    medians = {
        name: Cost(*(statistics.median(getattr(cost, each) for cost in costs) for each in ("cpu", "wall", "peak")))
        for name, costs in found.items()
    }
    for name, cost in medians.items():
        print(f"  {name:16} {cost.cpu:7.2f} s of processor {cost.wall:7.2f} s {cost.peak / 1e6:7.0f} MB")
    return medians


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--directory", type=Path, default=None, help="where the files are written")
    parser.add_argument("--against", type=Path, default=None, help="another checkout of this repository")
    parser.add_argument("--mergekit", type=Path, default=None, help="an environment with mergekit")
    parser.add_argument("--only", default=",".join(("union", "average", *METHODS)))
    arguments = parser.parse_args()
    only, venv = arguments.only.split(","), arguments.mergekit
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        directory = Path(name)
        if "union" in only:
            union(directory, arguments)
        if "average" in only and venv is not None:
            first, second = gpt_sources(directory)
            recipe = {
                "merge_method": "linear",
                "models": [{"model": str(p), "parameters": {"weight": 0.5}} for p in (first, second)],
            }
            print(f"average of two GPTs of {first.stat().st_size / 1e6:.0f} MB")
            costs = alternating(
                arguments.repeats,
                ours=lambda: runner(directory, "merge=average", f"merge.sources=[{first},{second}]"),
                mergekit=lambda: mergekit(directory, venv, "mergekit-pytorch", recipe),
            )
            ratios(costs)
        if venv is not None and set(only) & set(METHODS):
            base, a, b = llamas(directory)
            for method in (each for each in METHODS if each in only):
                models(directory, venv, method, base, a, b, arguments.repeats)


def union(directory: Path, arguments: argparse.Namespace) -> None:
    """NPT sources beside cp, starting a process, and another checkout."""
    sources = npt_sources(directory)
    files = [source / "npt_weights.pt" for source in sources]
    total = sum(file.stat().st_size for file in files)
    words = f"merge.sources=[{','.join(map(str, sources))}]"
    runs = {
        "cp and fsync": lambda: copy(files, directory),
        "python": lambda: process([sys.executable, "-c", "pass"], directory),
        "import torch": lambda: process([sys.executable, "-c", "import torch"], directory),
        "ours": lambda: runner(directory, words),
    }
    if arguments.against is not None:
        runs["the other"] = lambda: runner(directory, words, root=arguments.against)
    print(f"union of {total / 1e9:.2f} GB in two NPT sources")
    costs = alternating(arguments.repeats, **runs)
    cp, ours = costs["cp and fsync"], costs["ours"]
    print(f"  wall beyond `python` / cp      {(ours.wall - costs['python'].wall) / cp.wall:.2f}")
    print(f"  wall beyond `import torch` / cp {(ours.wall - costs['import torch'].wall) / cp.wall:.2f}")
    print(f"  processor / cp                  {ours.cpu / cp.cpu:.2f}")
    if "the other" in costs:
        print(f"  processor / the other           {ours.cpu / costs['the other'].cpu:.2f}   (goal: at most 0.4)")


def models(directory: Path, venv: Path, method: str, base: Path, a: Path, b: Path, repeats: int) -> None:
    """One method on two Llamas."""
    weights = {"weight": 0.6, **({"density": 0.5} if method in ("ties", "dare_ties") else {})}
    recipe = {
        "merge_method": method, "dtype": "float32",
        "models": [{"model": str(path), **({} if method == "slerp" else {"parameters": weights})} for path in (a, b)],
    }  # fmt: skip
    if method == "slerp":
        recipe |= {"base_model": str(a), "parameters": {"t": 0.4}}
    if method in ("ties", "dare_ties"):
        recipe |= {"base_model": str(base)}
    (directory / "ours.yml").write_text(yaml.safe_dump(recipe))
    print(f"{method} of two Llamas of {(a / 'model.safetensors').stat().st_size / 1e6:.0f} MB")
    ratios(
        alternating(
            repeats,
            ours=lambda: runner(directory, f"merge={directory / 'ours.yml'}"),
            mergekit=lambda: mergekit(directory, venv, "mergekit-yaml", recipe),
        )
    )


def ratios(costs: dict[str, Cost]) -> None:
    """Ours over mergekit's."""
    ours, theirs = costs["ours"], costs["mergekit"]
    print(f"  processor {ours.cpu / theirs.cpu:.2f}, peak memory {ours.peak / theirs.peak:.2f} of mergekit's")


if __name__ == "__main__":
    main()
