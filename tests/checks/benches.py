"""Benches over tiny checkpoints, and what the full tier's checks of a model say of them."""

import argparse
import shutil
from dataclasses import fields
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file, save_file

from runner.checks.check import checks_for, run_checks
from runner.checks.context import CheckContext
from runner.config import TestConfig
from runner.installation import config_directory
from runner.run import _typed, setup

# Those that look at a model, whatever the tier lists beside them.
MODEL_CHECKS = (
    "model", "forward", "save", "router", "skills", "roundtrip", "routing", "convert", "batch", "modes", "control",
    "fidelity", "layers", "progressive", "generation", "gradients", "optimizer_step",
)  # fmt: skip
QUALITY = {"fidelity", "layers", "progressive", "generation"}


@cache
def _groups() -> SimpleNamespace:
    """The full tier, the prompts and the thresholds, as the command line builds them."""
    setup()
    with initialize_config_dir(config_dir=str(config_directory()), version_base="1.3"):
        typed: Any = _typed(compose("config", overrides=["tier=full", "ckpt=none"]))
    return SimpleNamespace(**{field.name: getattr(typed, field.name) for field in fields(typed)})


def bench_of(path: Path, scratch: Path, *, base: Path | None = None, **values: Any) -> CheckContext:
    """A bench on the checkpoint at `path`; `values` take the place of the config's."""
    groups = _groups()
    common = {name: getattr(groups, name) for name in ("family", "format", "data", "tier", "verdict")}
    scratch.mkdir(parents=True)
    return CheckContext(
        config=TestConfig(
            **{"task": "test", "ckpt": str(path), "base": str(base) if base else None, **common, **values}
        ),
        shows=SimpleNamespace(directory=scratch, track=lambda items, what, total=None: iter(items)),
        path=path,
        scratch=scratch,
    )


def rows_of(bench: CheckContext, names: tuple[str, ...] = MODEL_CHECKS) -> dict[str, dict[str, Any]]:
    """The rows of these checks by name, as far as they belong to the checkpoint's family."""
    rows = run_checks(checks_for(bench, names), bench)
    return {row["name"]: row for row in rows}


def failing(rows: dict[str, dict[str, Any]]) -> list[str]:
    """The names of the checks that failed."""
    return [name for name, row in rows.items() if row["status"] == "fail"]


def write_npt_full(path: Path, base: Path, base_name: str | None = None) -> Path:
    """The base with single NPT layers, and gates that permanent updates changed."""
    generator = torch.Generator().manual_seed(3)
    tensors = load_file(base / "model.safetensors")
    inner, hidden = tensors["model.layers.0.mlp.gate_proj.weight"].shape
    for i in range(3):
        gate = tensors[f"model.layers.{i}.mlp.gate_proj.weight"]
        tensors[f"model.layers.{i}.original_gate_weight"] = gate * 0.9
        for name, shape in {"A_proj": (2, hidden), "B_model": (hidden, 2), "B_ffn": (inner, 2)}.items():
            tensors[f"model.layers.{i}.adapter.{name}.weight"] = torch.randn(shape, generator=generator) * 0.3
    shutil.copytree(base, path)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    arguments = argparse.Namespace(model_name=base_name or str(base), modulation_scale=0.5)
    torch.save({"step": 7, "args": arguments, "adapter_config": {"r": 2}}, path / "training_info.pt")
    return path
