"""How fast text is made: a Llama of 100 M parameters against transformers' own generate, NPT layers, and a GPT.

    python tests/benchmarks/generate.py [--threads 2] [--tokens 64] [--prompt 512] [--rounds 3] [--profile]

Ratios of tokens per second after the prompt, from CPU seconds of one run: rounds are interleaved and the best of each
counts. `--profile` prints where the time of one continuation goes.
"""

import argparse
import sys
import time
from collections.abc import Callable
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


def ours(model, prompts: torch.Tensor, count: int, *, cache: bool = True, how: Sampling = GREEDY) -> None:
    """`count` ids after each row of `prompts` [B, T], as runner draws them."""
    rows = [Continuation(prompt=row, count=count) for row in prompts.tolist()]
    for _ in extend(Feed(model, torch.device("cpu"), cache=cache), rows, how):
        pass


def theirs(model, prompts: torch.Tensor, count: int, kind: str = "static") -> None:
    """The same by transformers."""
    model.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=count, min_new_tokens=count, do_sample=False,
        cache_implementation=kind, disable_compile=True, pad_token_id=0,
    )  # fmt: skip


def seconds(run: Callable[[int], None], count: int) -> float:
    """CPU seconds a token, without the prompt's."""
    times = []
    for each in (1, 1 + count):
        start = time.process_time()
        run(each)
        times.append(time.process_time() - start)
    return (times[1] - times[0]) / count


def best(runs: dict[str, Callable[[int], None]], count: int, rounds: int) -> dict[str, float]:
    """Tokens per CPU second of each, the best of interleaved rounds."""
    found = {name: [seconds(run, count) for _ in [None]] for name, run in runs.items()}
    for _ in range(rounds - 1):
        for name, run in runs.items():
            found[name].append(seconds(run, count))
    return {name: 1 / min(times) for name, times in found.items()}


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
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
    for batch in (1, 8):
        prompts = torch.randint(3, VOCABULARY, (batch, given.prompt))
        speeds = best(
            {
                "runner": lambda n, p=prompts: ours(plain, p, n),
                "runner, sampled": lambda n, p=prompts: ours(plain, p, n, how=sampled),
                "transformers, static": lambda n, p=prompts: theirs(llama, p, n),
                "transformers, dynamic": lambda n, p=prompts: theirs(llama, p, n, "dynamic"),
                "npt": lambda n, p=prompts: ours(npt, p, n),
            },
            given.tokens,
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
            "cached": lambda n: ours(small, prompts, n),
            "again": lambda n: ours(small, prompts, n, cache=False),
        },
        8,
        given.rounds,
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
