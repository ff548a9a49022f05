"""How fast text is made: a Llama of 100 M parameters against transformers' own generate, NPT layers, and a GPT.

    python tests/benchmarks/generate.py [--threads 2] [--tokens 64] [--prompt 512] [--rounds 2] [--batch 1 8] [--profile]

Ratios of tokens per second after the prompt, from the CPU seconds of every step of interleaved rounds: the lower
quartile counts. `--profile` prints where the time of one continuation goes.
"""

import argparse
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from runner.evaluation import base_models  # noqa: E402 - the path is set above
from runner.evaluation.decoding import Continuation, Feed, extend  # noqa: E402
from runner.families.npt.model import NptLlamaForCausalLM, RankKUpdate  # noqa: E402
from runner.metrics.generation import Sampling  # noqa: E402
from tests import gpt_files  # noqa: E402

VOCABULARY = 16000
GREEDY = Sampling()


def ours(model, prompts: torch.Tensor, count: int, *, cache: bool = True, how: Sampling = GREEDY) -> list[float]:
    """CPU seconds of each of `count` steps after the first id of each row of `prompts` [B, T]."""
    rows = [Continuation(prompt=row, count=count + 1) for row in prompts.tolist()]
    times = []
    for _ in extend(Feed(model, torch.device("cpu"), cache=cache), rows, how):
        times.append(time.process_time())
    return [later - earlier for earlier, later in pairwise(times)]


def theirs(model, prompts: torch.Tensor, count: int, kind: str = "static") -> list[float]:
    """The same by transformers."""
    times = []

    def clock(ids: torch.Tensor, scores: object, **options: object) -> torch.Tensor:
        times.append(time.process_time())
        return torch.zeros(len(ids), dtype=torch.bool)

    model.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=count + 1, min_new_tokens=count + 1,
        do_sample=False, cache_implementation=kind, disable_compile=True, pad_token_id=0, stopping_criteria=[clock],
    )  # fmt: skip
    return [later - earlier for earlier, later in pairwise(times)]


def best(runs: dict[str, Callable[[], list[float]]], rounds: int) -> dict[str, float]:
    """Steps per CPU second of each: the lower quartile of all steps of interleaved rounds."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            found[name] += run()
    return {name: 1 / sorted(times)[len(times) // 4] for name, times in found.items()}


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--profile", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        num_key_value_heads=12, max_position_embeddings=2048,
    )  # fmt: skip
    llama = LlamaForCausalLM(config).eval().requires_grad_(False)
    plain = plain_of(llama)
    updates = {
        layer: {name: update(768, 2048, np_rank=256, num_ranks=4) for name in ("gate", "up")} for layer in (3, 6, 9)
    }
    npt = NptLlamaForCausalLM(plain, updates).eval().requires_grad_(False)
    sampled = Sampling(temperature=0.7, top_p=0.9)
    for batch in given.batch:
        prompts = torch.randint(3, VOCABULARY, (batch, given.prompt))
        speeds = best(
            {
                "runner": lambda p=prompts: ours(plain, p, given.tokens),
                "runner, sampled": lambda p=prompts: ours(plain, p, given.tokens, how=sampled),
                "transformers, static": lambda p=prompts: theirs(llama, p, given.tokens),
                "transformers, dynamic": lambda p=prompts: theirs(llama, p, given.tokens, "dynamic"),
                "npt": lambda p=prompts: ours(npt, p, given.tokens),
            },
            given.rounds,
        )
        print(
            f"Llama of {sum(p.numel() for p in llama.parameters()) / 1e6:.0f} M, batch {batch}: tokens a second of CPU"
        )
        for name, speed in speeds.items():
            print(f"  {name:24} {speed * batch:7.1f}")
        print(f"  runner / transformers (static)  {speeds['runner'] / speeds['transformers, static']:.2f}")
        print(f"  sampled / greedy                {speeds['runner, sampled'] / speeds['runner']:.2f}")
        print(f"  npt dual k 4 r 256 / plain      {speeds['npt'] / speeds['runner']:.2f}", flush=True)
    small = gpt_files.model("small", gpt_files.random_state("small", width=768, vocab=2048))
    prompts = torch.randint(3, 2048, (1, given.prompt))
    speeds = best(
        {
            "cached": lambda: ours(small, prompts, given.tokens),
            "again": lambda: ours(small, prompts, 4, cache=False),
        },
        min(2, given.rounds),
    )
    print(f"GPT small's layout: with a cache / computed again  {speeds['cached'] / speeds['again']:.2f}")
    if given.profile:
        prompts = torch.randint(3, VOCABULARY, (1, given.prompt))
        with torch.profiler.profile() as profile:
            ours(plain, prompts, given.tokens)
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))


def update(d: int, f: int, *, np_rank: int, num_ranks: int) -> RankKUpdate:
    """A random update from d to f."""
    shapes = ((d, np_rank), (np_rank, d), (np_rank, f))
    return RankKUpdate(*([torch.randn(shape) * 0.02 for _ in range(num_ranks)] for shape in shapes))


def plain_of(llama: LlamaForCausalLM) -> torch.nn.Module:
    """The Llama as runner builds it, over the same weights."""
    config = base_models.config_from(llama.config.to_dict(), "the benchmark")
    return base_models.build(config, dict(llama.state_dict()), torch.float32, "the benchmark")


if __name__ == "__main__":
    main()
