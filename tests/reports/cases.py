"""Sweeps of every kind that a page has to show."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.comparison.sweeps import result, write_job, write_sweep

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&amp;$x$ {{ 7*7 }} \u2028 %{y} ünï"


def plain(path: Path) -> Path:
    return write_sweep(path, {500 * i: 0.9 / i for i in range(1, 9)})


def two_tiers_and_runs(path: Path) -> Path:
    number = 0
    for run, factor in (("/runs/a", 1.0), ("/runs/b", 1.7)):
        for tier in ("quick", "full"):
            for step in range(1000, 9000, 1000):
                noise = random.Random(step + len(tier)).uniform(0.9, 1.1)
                layers = [{"layer": i, "mse": factor * 400 / step / (i + 1) * noise} for i in range(8)]
                found = result(f"{run}/checkpoint-{step}", factor * 900 / step * noise, tier=tier)
                found |= {"layers": layers} if tier == "full" else {}
                write_job(path, number, "x", found, ckpt=run, step=step, tier={"name": tier})
                number += 1
    return path


def failures(path: Path) -> Path:
    two_tiers_and_runs(path)
    for number in range(40, 52):
        error = {"type": "CheckpointError", "message": "npt_weights.pt: cut off after 1,024 bytes; copy it again"}
        write_job(path, number, "x", {"task": "diagnose", "status": "error", "ckpt": "/runs/a", "error": error})
    write_job(path, 60, "x", None, ckpt="/runs/a", step=9000)
    (path / "sweep.json").write_text('{"jobs": [{"directory": "70_never", "overrides": ["ckpt=/runs/a"]}]}')
    return path


def only_failures(path: Path) -> Path:
    write_job(path, 0, "x", None)
    return path


def one_point(path: Path) -> Path:
    return write_sweep(path, {100: 0.4}, tier="full")


def without_steps(path: Path) -> Path:
    for number, name in enumerate(("merged", "base-ft", "x" * 90)):
        found = result("/m/checkpoint-1", 0.1 * (number + 1)) | {"ckpt": f"/m/{name}", "step": None}
        write_job(path, number, name[:20], found)
    write_job(path, 3, "merge", {"task": "merge", "status": "ok", "ckpt": "/m/out", "sources": {"1": "/a"}})
    return path


def without_verdict(path: Path) -> Path:
    for number, step in enumerate(range(100, 800, 100)):
        text = {"ppl": 30 - step / 100, "ppl_reference": 20.0, "tokens": 100}
        found = result(f"/gpt/checkpoint-{step}", 5.0 - step / 200, verdict=None, layers=[])
        found |= {"family": "gpt", "metrics": found["metrics"] | {"text": text}}
        write_job(path, number, "x", found)
    return path


def not_finite(path: Path) -> Path:
    write_sweep(path, {100: 0.5, 200: None, 300: 0.0, 400: 1e30, 500: None}, tier="full")
    folder = path / "1_checkpoint-200" / "result.json"
    folder.write_text(folder.read_text().replace('"mse": null', '"mse": NaN'))
    return path


def checks_only(path: Path) -> Path:
    for number, overall in enumerate(("READY", "NOT_READY")):
        rows = [{"name": "load", "status": "pass"}, {"name": "keys", "status": "fail", "details": "x is missing"}]
        write_job(path, number, "x", {"task": "test", "status": "ok", "ckpt": f"/runs/a/checkpoint-{number + 1}00",
                                      "step": 100 * (number + 1), "tier": "full", "checks": rows, "overall": overall})  # fmt: skip
    return path


def hostile(path: Path) -> Path:
    for number in range(3):
        found: dict[str, Any] = result(f"/runs/{HOSTILE.replace('/', '∕')}/checkpoint-{number + 1}00", 0.3)
        prompts = [{"prompt": HOSTILE, "mse": 0.3}, {"prompt": 5, "mse": "x"}]
        found |= {"tier": HOSTILE, "findings": [HOSTILE, 3], "per_prompt": prompts, "format": HOSTILE}
        found["layers"] = [{"layer": HOSTILE, "mse": 0.2}, {"layer": 1, "mse": True}]
        found["verdict"] = found["verdict"] | {
            "reason": HOSTILE,
            "readiness": HOSTILE,
            "status": ["x"],
            "progress": HOSTILE,
        }
        write_job(path, number, "a'b\"c#d?e", found, **{HOSTILE: number, "ckpt": HOSTILE, "dtype": HOSTILE * number})
    error = {"task": HOSTILE, "status": "error", "ckpt": HOSTILE, "error": {"type": HOSTILE, "message": HOSTILE}}
    write_job(path, 9, "javascript:alert(1)", error)
    return path


def many(path: Path) -> Path:
    """200 checkpoints of a full tier."""
    for number in range(200):
        step = 100 * (number + 1)
        noise = random.Random(step).uniform(0.92, 1.08)
        layers = [{"layer": i, "mse": 60 / step / (i + 1) * noise} for i in range(16)]
        found = result(f"/runs/a/checkpoint-{step}", (40 / step**0.8 + 0.02) * noise, tier="full", layers=layers)
        write_job(path, number, f"checkpoint-{step}", found, ckpt="/runs/a", step=step, tier={"name": "full"})
    return path


def many_runs(path: Path) -> Path:
    """Nine runs whose long names differ in the middle."""
    for number in range(9):
        run = f"/exp/llama-3.2-1b_npt_triple_rank64_layer{number}_lr1e-4_bs32_seed{number}/checkpoints"
        for step in (1000, 2000, 3000):
            found = result(f"{run}/checkpoint-{step}", (number + 2) * 100 / step)
            write_job(path, 3 * number + step // 1000 - 1, "x", found, ckpt=run, step=step, tier={"name": "quick"})
    return path


CASES: dict[str, Callable[[Path], Path]] = {
    case.__name__: case
    for case in (plain, two_tiers_and_runs, failures, only_failures, one_point, without_steps, without_verdict,
                 not_finite, checks_only, hostile, many, many_runs)
}  # fmt: skip
