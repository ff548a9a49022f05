"""How long the tiers take on the built-in bases, and what share of the full tier's memory the minimal one needs.

    python tests/benchmarks/tier_time.py [megabytes]

Goals: quick 3 s, minimal 30 s, full 60 s on two cores; on a base of at least 400 MB the peak of minimal, less what the
imports take, at most 60 % of full's. Each run is a process of its own.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GOALS = {"quick": 3, "minimal": 30, "full": 60}
# The peak from /proc: that of getrusage is inherited from the process that started this one.
IMPORTS = "import torch, transformers, runner.families.npt.save; from runner.checks.memory import peak_bytes"


def run(folder: Path, *words: str) -> tuple[float, int, dict]:
    """Seconds, exit code and result of one command line."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "runner", "task=test", "tracker=none", f"hydra.run.dir={folder}", *words]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, check=False)
    seconds = time.perf_counter() - start
    result = json.loads((folder / "result.json").read_text()) if (folder / "result.json").is_file() else {}
    return seconds, done.returncode, result


def imports_alone() -> int:
    """The peak of a process that only imports what a tier with models does, in bytes."""
    code = f"{IMPORTS}; print(peak_bytes())"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, check=True
    )
    return int(done.stdout)


def write_base(folder: Path, megabytes: int) -> Path:
    """A random Llama of about this size in float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, vocabulary = 1024, 8192
    a_layer = 4 * hidden * hidden + 3 * hidden * 4 * hidden
    layers = max(2, round((megabytes * 1e6 / 4 - 2 * vocabulary * hidden) / a_layer))
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=8, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def peak(result: dict) -> int:
    """The highest peak of all checks, in bytes."""
    return max(check["peak_bytes"] for check in result["checks"])


def main() -> None:
    """Print both tables."""
    megabytes = int(sys.argv[1]) if len(sys.argv) > 1 else 450
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print("tier     family    seconds  goal  exit  peak MB")
        for family in ("auto", "lora_moe", "gpt"):
            for tier, goal in GOALS.items():
                if tier == "quick" and family != "auto":
                    continue
                seconds, code, result = run(folder / f"{tier}_{family}", f"tier={tier}", f"family={family}")
                print(f"{tier:8} {family:8} {seconds:8.1f} {goal:5} {code:5} {peak(result) / 1e6:8.0f}", flush=True)
        alone = imports_alone()
        print(f"\nimports alone {alone / 1e6:.0f} MB; a base of about {megabytes} MB")
        base = write_base(folder / "base", megabytes)
        for family in ("npt", "lora_moe"):
            rows = {}
            for tier in ("minimal", "full"):
                words = (f"tier={tier}", f"family={family}", f"base={base}")
                seconds, code, rows[tier] = run(folder / f"large_{tier}_{family}", *words)
                estimate = rows[tier].get("estimated_peak_bytes", 0) / 1e6
                print(
                    f"{family:8} {tier:8} {seconds:6.1f} s, exit {code}, peak {peak(rows[tier]) / 1e6:.0f} MB"
                    + (f", estimated {estimate:.0f} MB" if estimate else ""),
                    flush=True,
                )
            ratio = (peak(rows["minimal"]) - alone) / (peak(rows["full"]) - alone)
            print(f"{family:8} minimal / full, without the imports: {ratio:.2f} (goal 0.60)")


if __name__ == "__main__":
    main()
