"""The factored rank-k update against one that materialises v_a and v_b: time and peak memory.

    python tests/benchmarks/factored_mlp.py [--tokens 512] [--hidden 1024] [--inner 2816] [--rank 64]

Each case runs in a process of its own, so that its peak is its own; prints ratios taken in this one run.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def measure(kind: str, k: int, tokens: int, hidden: int, inner: int, rank: int) -> dict[str, float]:
    """Seconds of one gate update over [tokens, hidden], and the peak memory above that of the inputs, in MiB."""
    import torch

    from runner.families.npt.model import RankKUpdate

    torch.manual_seed(0)
    update = RankKUpdate(torch.randn(k, hidden, rank), torch.randn(k, rank, hidden), torch.randn(k, rank, inner))
    attention, x = torch.randn(tokens, hidden), torch.randn(tokens, hidden)

    def naive() -> torch.Tensor:
        s = (attention @ update.w_down).unflatten(-1, (k, rank))
        v_a = torch.einsum("...kr,krd->...kd", s, update.w_a_up.unflatten(0, (k, rank)))
        v_b = torch.einsum("...kr,krf->...kf", s, update.w_b_up.unflatten(0, (k, rank)))
        return ((v_a * x.unsqueeze(-2)).sum(-1, keepdim=True) * v_b).sum(-2)

    run = naive if kind == "naive" else lambda: update(attention, x)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    with torch.inference_mode():
        for _ in range(5):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"seconds": statistics.median(times), "mib": peak / 1024}


def main() -> None:
    """Print the table for k = 4, 8, 32."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("tokens", 512), ("hidden", 1024), ("inner", 2816), ("rank", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    given = vars(parser.parse_args())
    case = given.pop("case")
    if case:
        kind, k = case.split(":")
        print(json.dumps(measure(kind, int(k), **given)))
        return
    sizes = [f"--{name}={value}" for name, value in given.items()]
    print(
        f"{given}\n{'k':>3} {'factored':>10} {'naive':>10} {'time ratio':>11} {'factored':>11} {'naive':>11} {'memory ratio':>13}"
    )
    for k in (4, 8, 32):
        found = {
            kind: json.loads(subprocess.run(
                [sys.executable, __file__, f"--case={kind}:{k}", *sizes], capture_output=True, text=True, check=True
            ).stdout)
            for kind in ("factored", "naive")
        }  # fmt: skip
        a, b = found["factored"], found["naive"]
        print(
            f"{k:>3} {a['seconds'] * 1e3:>7.1f} ms {b['seconds'] * 1e3:>7.1f} ms {a['seconds'] / b['seconds']:>11.3f} "
            f"{a['mib']:>7.1f} MiB {b['mib']:>7.1f} MiB {a['mib'] / max(b['mib'], 1e-9):>13.3f}"
        )


if __name__ == "__main__":
    main()
