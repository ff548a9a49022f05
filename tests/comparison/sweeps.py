"""Sweep directories as jobs leave them, without running any."""

import json
from pathlib import Path
from typing import Any

import yaml


def metrics(mse: float | None, cosine: float | None = 0.97, **more: Any) -> dict[str, Any]:
    """The figures of a diagnose result that the comparison shows."""
    kl = None if mse is None else mse / 5
    quantiles = {f"kl_{name}": kl and kl * factor for name, factor in {"p50": 0.2, "p90": 2, "p99": 9}.items()}
    shares = {"top1": 0.9, "top5": 0.8, "scale": 0.97, "magnitude_share": 0.1}
    return {"mse": mse, "cosine": cosine, "kl": kl, "kl_max": kl and kl * 12, **quantiles, **shares, **more}


def result(ckpt: str, mse: float | None, *, tier: str = "quick", **more: Any) -> dict[str, Any]:
    """A finished diagnose of one NPT checkpoint; a full tier has figures by layer."""
    full = {"mse": mse, "cosine": 0.98, "kl": 0.01} if tier == "full" else {}
    return {
        "task": "diagnose", "status": "ok", "ckpt": ckpt, "base": "/models/base", "reference": "/models/base",
        "step": int(ckpt.rpartition("-")[2]), "family": "npt", "format": "npt_delta", "tier": tier,
        "metrics": metrics(mse),
        "per_prompt": [{"prompt": p, "tokens": 5, **metrics(mse)} for p in ("The capital of France is", "2 + 2 equals")],
        "layers": [{"layer": i, "modulation": "triple", "np_rank": 4, "num_ranks": 1, **full} for i in (1, 2)],
        "verdict": verdict(mse), "timing": {"open": 0.1, "logits": 0.4}, **more,
    }  # fmt: skip


def verdict(mse: float | None) -> dict[str, Any]:
    """A verdict whose words fit the mse, roughly."""
    good = mse is not None and mse < 0.1
    return {
        "status": "good" if good else "poor", "cosine_status": "excellent", "progress": 90 if good else 10,
        "remaining": "Fine-tuning needed (<1k steps)", "readiness": "basic" if good else "early",
        "reason": f"mse {mse}", "recommendation": "Continue training.",
    }  # fmt: skip


def write_job(sweep: Path, number: int, tag: str, found: dict[str, Any] | None, **config: Any) -> Path:
    """A job's folder: its config, its log, and its result where it has one."""
    folder = sweep / f"{number}_{tag}"
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "config.yaml").write_text(yaml.safe_dump({"task": "diagnose", "dtype": "float32", **config}))
    (folder / "runner.log").write_text("")
    if found is not None:
        (folder / "result.json").write_text(json.dumps(found))
    return folder


def write_sweep(sweep: Path, mses: dict[int, float | None], *, run: str = "/runs/a", tier: str = "quick") -> Path:
    """A sweep over the checkpoints of one run: step → mse."""
    for number, (step, mse) in enumerate(mses.items()):
        found = result(f"{run}/checkpoint-{step}", mse, tier=tier)
        write_job(sweep, number, f"checkpoint-{step}", found, ckpt=run, step=step, tier={"name": tier})
    return sweep
