"""What an injection costs: at one position against a plain forward pass, and a token of generation with it.

    python tests/benchmarks/transfer.py [--threads 2] [--prompt 256] [--tokens 32] [--rounds 5]

An NPT Llama of 100 M parameters, triple modulation in two layers. Ratios of CPU seconds of one run: rounds are
interleaved and the best of each counts. `injection` runs the prompt once, and its last position with and without the
modulation; `pass with injection` is the injected pass alone, over the whole prompt.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from runner.evaluation.decoding import Continuation, Feed, extend  # noqa: E402 - the path is set above
from runner.evaluation.llama import Llama  # noqa: E402
from runner.evaluation.llama_config import read_config  # noqa: E402
from runner.families.npt.model import NptLlamaForCausalLM, RankKUpdate  # noqa: E402
from runner.families.npt.transfer import extract, overridden  # noqa: E402
from runner.families.npt.transfer_injection import How, Reader, continued, inject  # noqa: E402
from runner.metrics.generation import Sampling  # noqa: E402

LAYERS, RANK, TERMS = (9, 10), 32, 4


def npt_llama() -> NptLlamaForCausalLM:
    """Random weights."""
    config = read_config(
        {
            "model_type": "llama", "vocab_size": 16000, "hidden_size": 768, "intermediate_size": 2048,
            "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 12,
            "max_position_embeddings": 2048,
        }
    )  # fmt: skip
    empty = Llama(config)
    base = empty.assign({name: 0.02 * torch.randn(t.shape) for name, t in empty.state_dict().items()})
    d, f = config.hidden_size, config.intermediate_size

    def update(d_in: int, d_out: int) -> RankKUpdate:
        shapes = ((d, RANK), (RANK, d_in), (RANK, d_out))
        return RankKUpdate(*([0.02 * torch.randn(shape) for _ in range(TERMS)] for shape in shapes))

    updates = {i: {"gate": update(d, f), "up": update(d, f), "down": update(f, d)} for i in LAYERS}
    return NptLlamaForCausalLM(base, updates).eval().requires_grad_(False)


def best(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """CPU seconds of each, the best of interleaved rounds."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.process_time()
            run()
            found[name].append(time.process_time() - start)
    return {name: min(times) for name, times in found.items()}


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    model = npt_llama()
    ids = torch.randint(16000, (given.prompt,)).tolist()
    m = extract(model, ids[: given.prompt // 2])
    tokens = torch.tensor([ids])

    def generate(count: int) -> None:
        row = Continuation(prompt=ids, count=count)
        for _ in extend(Feed(model, model.device), [row], Sampling()):
            pass

    def plain() -> None:
        with torch.inference_mode():
            model(tokens)

    def injected(how: How) -> None:
        reader = Reader(model, m, how, LAYERS, cached=False)
        with torch.inference_mode(), overridden(model, LAYERS, reader.overrides_at(given.prompt - 1)):
            model(tokens)

    hows = {"replace": How(), "add": How(mode="add"), "add vectors": How(mode="add", space="vectors")}
    runs: dict[str, Callable[[], object]] = {"plain pass": plain}
    for name, how in hows.items():
        runs[f"pass with injection, {name}"] = lambda how=how: injected(how)
        runs[f"injection, {name}"] = lambda how=how: inject(model, ids, m, how)
    found = best(runs, given.rounds)
    for name, seconds in found.items():
        print(f"{name:<36} {seconds * 1e3:8.1f} ms  {seconds / found['plain pass']:.3f} x")
    for name, how in {"generation": None, **{f"generation, {n}": how for n, how in hows.items()}}.items():
        run = generate if how is None else lambda count, how=how: list(continued(model, ids, m, how, count))
        times = best({"one": lambda run=run: run(1), "all": lambda run=run: run(1 + given.tokens)}, given.rounds)
        each = (times["all"] - times["one"]) / given.tokens
        found[name] = each
        print(f"{name:<36} {each * 1e3:8.1f} ms  {each / found['generation']:.3f} x a token")


if __name__ == "__main__":
    main()
