"""What small commands and sweeps cost beside another checkout: CPU seconds and peak memory of whole processes.

    git worktree add --detach DIR e0cf704
    python tests/benchmarks/start_time.py --against DIR [--pairs 5] [--only help,inspect …]

Both checkouts run each command alternately, with their own empty home directory; the ratios are of the medians taken
in this one run. CPU seconds are those of the process and of all that it waits for, until the prompt is back.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


@dataclass(frozen=True, kw_only=True)
class Case:
    """A command, the exit code that it has, the ratio that is aimed at, and what it is compared with in one checkout."""

    words: list[str]
    goal: float
    code: int = 0
    beside: str | None = None  # the case of our own checkout that it is compared with; None: the same of the other's


def cost(root: Path, words: list[str], home: Path, code: int) -> tuple[float, float]:
    """CPU seconds and peak memory (MiB) of one process. Raises SystemExit where its exit code is not `code`."""
    home.mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(root), "HOME": str(home), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *words]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, cwd=home, env=environment, stdout=said, stderr=said)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != code:
            said.seek(0)
            raise SystemExit(f"{command}: exit {process.returncode}\n{said.read().decode()[-2000:]}")
    return used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def llama(directory: Path) -> Path:
    """A Llama of 2.5 GB that holds no byte of weights: a header, and a hole."""
    hidden, inner, layers, vocabulary = 2048, 5632, 10, 32000
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "lm_head.weight": (vocabulary, hidden)}
    for i in range(layers):
        at = f"model.layers.{i}."
        shapes |= {f"{at}self_attn.{x}_proj.weight": (hidden, hidden) for x in "qkvo"}
        shapes |= {f"{at}mlp.{x}_proj.weight": (inner, hidden) for x in ("gate", "up")}
        shapes |= {f"{at}mlp.down_proj.weight": (hidden, inner)}
        shapes |= {f"{at}{x}_layernorm.weight": (hidden,) for x in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (hidden,)}
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 4 * (shape[0] * shape[1] if len(shape) > 1 else shape[0])
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    directory.mkdir()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    config = {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": vocabulary, "tie_word_embeddings": False,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def prepared(directory: Path, only: list[str]) -> dict[str, Case]:
    """The cases whose names begin with one of the words `only` (none: all), with what they read."""
    import torch

    def chosen(name: str) -> bool:
        return not only or any(name.startswith(word) for word in only)

    from tests.benchmarks.diagnose_time import prepare
    from tests.conftest import npt_tensors, write_base, write_npt

    quiet = ["-m", "runner", "tracker=none"]
    cases = {
        "help": Case(words=["-m", "runner", "--help"], goal=0.5),
        "misspelt key": Case(words=[*quiet, "ckp=demo"], goal=0.5, code=2),
        "no such path": Case(words=[*quiet, "ckpt=nowhere/checkpoint-1"], goal=0.5, code=2),
        "import runner": Case(words=["-c", "import runner"], goal=1.0),
        "import torch": Case(words=["-c", "import torch"], goal=1.0),
        "demo": Case(words=quiet, goal=2.0, beside="import torch"),
        "default tracker": Case(words=["-m", "runner"], goal=1.05, beside="demo"),
    }
    if chosen("inspect"):
        small = write_base(directory / "small")
        for step in range(50):
            write_npt(directory / "fifty" / f"checkpoint-{step}", npt_tensors(small, {1: ("dual", 2, 2)}), base=small)
        sizes = {"W_down": (2048, 128), "W_a_up": (128, 2048), "W_b_up": (128, 5632)}
        big = {
            f"layer_{i}_np.{matrix}{part}.{k}": torch.zeros(shape)
            for i in range(4) for part in ("_gate", "_up") for k in range(11) for matrix, shape in sizes.items()
        }  # fmt: skip
        write_npt(directory / "pickle", big)
        for name, path in {
            "safetensors, 2.5 GB": llama(directory / "llama"),
            "pickle, 450 MB": directory / "pickle",
            "50 checkpoints": directory / "fifty",
        }.items():
            cases[f"inspect {name}"] = Case(words=[*quiet, "task=inspect", f"ckpt={path}"], goal=0.2)
    if chosen("diagnose") or chosen("sweep"):
        _, run = prepare(directory)
        cases["diagnose"] = Case(words=[*quiet, f"ckpt={run}", "step=-1"], goal=0.55)
        ten = [*quiet, "-m", f"ckpt={run}"]
        cases["sweep of one"] = Case(words=[*ten, "step=1000"], goal=0.55)
        cases["sweep of ten"] = Case(words=[*ten, "step=all"], goal=0.55)
    beside = {case.beside for name, case in cases.items() if chosen(name)}
    return {name: case for name, case in cases.items() if chosen(name) or name in beside}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", type=Path, required=True, help="a checkout of e0cf704")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--only", default="", help="words that the names of the cases begin with")
    options = parser.parse_args()
    words = [word for word in options.only.split(",") if word]

    with tempfile.TemporaryDirectory() as name, ProcessPoolExecutor(1, get_context("spawn")) as elsewhere:
        directory = Path(name)
        # A process that is started begins with the memory of the one that starts it: this one imports no torch.
        cases = elsewhere.submit(prepared, directory, words).result()
        roots = {"ours": ROOT, "theirs": options.against.resolve()}
        taken: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for number in range(options.pairs + 1):
            for label, case in cases.items():
                for side, root in sorted(roots.items(), reverse=bool(number % 2)):
                    if side == "theirs" and case.beside:
                        continue
                    found = cost(root, case.words, directory / f"home-{side}-{number}", case.code)
                    if number:  # the first of each warms the page cache
                        taken.setdefault((label, side), []).append(found)
    medians = {key: tuple(map(statistics.median, zip(*values, strict=True))) for key, values in taken.items()}
    print(f"{'CPU s':24} {'ours':>7} {'other':>7} {'ratio':>6} {'goal':>5}   peak MiB (medians of {options.pairs})")
    for label, case in cases.items():
        (ours, memory), (theirs, before) = (
            medians[label, "ours"],
            medians[case.beside or label, "ours" if case.beside else "theirs"],
        )
        print(
            f"{label:24} {ours:7.2f} {theirs:7.2f} {ours / theirs:6.2f} {case.goal:5.2f}   {memory:.0f} / {before:.0f}"
        )
    if ("sweep of ten", "ours") in medians:
        each = {side: (medians["sweep of ten", side][0] - medians["sweep of one", side][0]) / 9 for side in roots}
        print(
            f"{'each further checkpoint':24} {each['ours']:7.2f} {each['theirs']:7.2f} {each['ours'] / each['theirs']:6.2f}  0.60"
        )


if __name__ == "__main__":
    main()
