"""Benches over tiny checkpoints, and what the full tier's checks of a model say of them."""

from dataclasses import fields
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hydra import compose, initialize_config_dir

from runner.checks.bench import Bench
from runner.checks.catalogue import checks_for
from runner.checks.check import run_checks
from runner.confdir import config_directory
from runner.config import TestConfig
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


def bench_of(path: Path, scratch: Path, *, base: Path | None = None, **values: Any) -> Bench:
    """A bench on the checkpoint at `path`; `values` take the place of the config's."""
    groups = _groups()
    common = {name: getattr(groups, name) for name in ("family", "format", "data", "tier", "verdict")}
    scratch.mkdir(parents=True)
    return Bench(
        config=TestConfig(
            **{"task": "test", "ckpt": str(path), "base": str(base) if base else None, **common, **values}
        ),
        context=SimpleNamespace(directory=scratch, track=lambda items, what, total=None: iter(items)),
        path=path,
        scratch=scratch,
    )


def rows_of(bench: Bench, names: tuple[str, ...] = MODEL_CHECKS) -> dict[str, dict[str, Any]]:
    """The rows of these checks by name, as far as they belong to the checkpoint's family."""
    rows = run_checks(checks_for(bench.checkpoint.family, names), bench)
    return {row["name"]: row for row in rows}


def failing(rows: dict[str, dict[str, Any]]) -> list[str]:
    """The names of the checks that failed."""
    return [name for name, row in rows.items() if row["status"] == "fail"]
