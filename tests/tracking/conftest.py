import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from server import Server, use

from runner.tracking import wandb as wandb_module
from runner.tracking.base import RunIdentity
from tests.machine import SLOW


@pytest.fixture(autouse=True)
def a_machine_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home directory, an empty current directory, no WANDB_* variable, a process that knows of no failure."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(here)
    monkeypatch.setattr(wandb_module, "_PROCESS", wandb_module._Process())
    monkeypatch.setattr(wandb_module, "_START_SECONDS", wandb_module._START_SECONDS * SLOW)
    return here


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A stand-in for W&B's server, to which runs go."""
    with Server() as server:
        use(server, monkeypatch)
        yield server


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "run7 é" / "checkpoint-2000"
    path.mkdir(parents=True)
    (path / "npt_weights.pt").write_bytes(b"weights")
    (path / "config.json").write_text("{}")
    return path


@pytest.fixture
def identity() -> RunIdentity:
    return RunIdentity(task="diagnose", run_name="run7", step=2000, series="sweep-1", family="npt", tier="full")


@pytest.fixture
def result(checkpoint: Path) -> dict[str, Any]:
    """A result as runner/results.py describes it, made by hand."""
    return {
        "task": "diagnose",
        "status": "ok",
        "ckpt": str(checkpoint),
        "step": 2000,
        "family": "npt",
        "format": "npt_delta",
        "tier": "full",
        "metrics": {"mse": 0.25, "cosine": 0.9, "kl": 0.125, "kl_p99": None, "top1": 0.75, "text": {"ppl": 3.5}},
        "per_prompt": [
            {"prompt": 'say "a, b"', "tokens": 5, "mse": 0.2, "cosine": 0.91},
            {"prompt": "2 + 2", "tokens": 4, "mse": 0.3, "cosine": None},
        ],
        "layers": [
            {"layer": 1, "modulation": "dual", "np_rank": 8, "mse": 0.05, "cosine": 0.99, "kl": 0.01},
            {"layer": 3, "modulation": "triple", "np_rank": 4, "mse": 0.2, "cosine": 0.95, "kl": 0.02},
        ],
        "verdict": {"status": "fair", "cosine_status": "moderate", "progress": 70, "readiness": "continue"},
    }
