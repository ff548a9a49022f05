"""What fine-tuning saves: memory where only the head trains, time where batches are padded to their longest row.

    python tests/benchmarks/finetune.py [--layers 12 --width 768]

Takes two steps of a Llama (by default of about 100 million parameters) with train.scope=head and train.scope=all, each in a
process of its own, and prints the ratio of their peak memory. Then times the same steps over rows with lengths like those of
natural-language inference (a median of 30 tokens, few beyond 100), padded to 128 and to the longest of each batch.
"""

import argparse
import multiprocessing
import resource
import sys
import time
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

LIMIT, ROWS, BATCH = 128, 128, 16


def classifier(layers: int, width: int):
    """A random Llama under a linear head."""
    import torch

    from runner.evaluation.base_models import config_from
    from runner.evaluation.llama import Llama
    from runner.finetuning.classifier import Classifier

    values = {
        "model_type": "llama", "vocab_size": 16000, "hidden_size": width, "intermediate_size": 8 * width // 3, "num_hidden_layers": layers,
        "num_attention_heads": width // 64, "num_key_value_heads": width // 64, "tie_word_embeddings": True,
    }  # fmt: skip
    model = Llama(config_from(values, Path("config.json")))
    torch.manual_seed(0)
    tensors = {
        name: torch.randn(each.shape) * 0.02 for name, each in model.state_dict().items() if name != "lm_head.weight"
    }
    return Classifier(model.assign(tensors), 3, head="linear")


def lengths() -> list[int]:
    """Of texts: log-normal around 30 tokens, at most `LIMIT`."""
    chooser = Random(0)
    return [min(LIMIT, max(6, round(chooser.lognormvariate(3.4, 0.45)))) for _ in range(ROWS)]


def steps(scope: str, layers: int, width: int, count: int, *, limit: bool = False) -> tuple[float, float]:
    """Seconds of CPU of `count` steps, and the peak memory of the process in MiB."""
    import torch
    from torch.nn.functional import cross_entropy

    from runner.finetuning.rows import EpochBatches, TokenRows
    from runner.finetuning.scope import choose, groups

    model = classifier(layers, width).requires_grad_(False)
    trained = choose(model, scope, (), ())
    for parameter in (*trained.values(), *model.head_parameters().values()):
        parameter.requires_grad_(True)
    rows = TokenRows(ids=[[7] * length for length in lengths()], labels=[i % 3 for i in range(ROWS)])
    source = EpochBatches(rows, size=BATCH, accumulation=1, seed=0)
    optimizer = torch.optim.AdamW(groups(model, list(trained.values()), rate=1e-4, backbone_scale=0.1, decay=0.01))
    start = time.process_time()
    for _ in range(count):
        batch = source.next()
        ids, mask = batch.ids, batch.mask
        if limit:
            ids, mask = (torch.nn.functional.pad(each, (0, LIMIT - each.shape[1])) for each in (ids, mask))
        cross_entropy(model(ids, mask).logits, batch.labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Print the two ratios."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    given = parser.parse_args()
    sizes = given.layers, given.width
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        (_, head), (_, whole) = (pool.apply(steps, (scope, *sizes, 2)) for scope in ("head", "all"))
        print(f"peak memory: head {head:,.0f} MiB, all {whole:,.0f} MiB: {head / whole:.2f}")
        longest, _ = pool.apply(steps, ("head", *sizes, ROWS // BATCH), {"limit": False})
        limit, _ = pool.apply(steps, ("head", *sizes, ROWS // BATCH), {"limit": True})
        print(
            f"CPU of an epoch: to the longest row {longest:.1f} s, to {LIMIT} {limit:.1f} s: {limit / longest:.1f} times"
        )


if __name__ == "__main__":
    main()
