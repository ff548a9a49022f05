"""The demonstration end to end: trained once for these tests, then diagnosed as a user does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """Where the demonstration is kept: $RUNNER_TEST_CACHE to train it once for many test runs."""
    return Path(os.environ.get("RUNNER_TEST_CACHE") or tmp_path_factory.mktemp("cache"))


def runner(directory: Path, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "runner", *words], cwd=directory, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.timeout(400)
def test_demonstration(cache, tmp_path):
    done = runner(tmp_path, f"cache={cache}", "tracker.mode=offline")
    assert done.returncode == 0, done.stderr
    result = json.loads(next((tmp_path / "outputs").glob("*/*/result.json")).read_text())
    assert result["verdict"]["status"] in ("good", "excellent"), result["metrics"]
    assert result["verdict"]["readiness"] in ("basic", "production")
    assert "MSE Loss:" in done.stdout
    assert list((tmp_path / "outputs" / "wandb").glob("offline-run-*"))

    sweep = runner(tmp_path, "-m", "step=all", f"cache={cache}", "tracker=none")
    assert sweep.returncode == 0, sweep.stderr
    curve = [
        json.loads(f.read_text())
        for f in sorted((tmp_path / "sweeps").glob("*/*/result.json"), key=lambda f: int(f.parent.name.split("_")[0]))
    ]
    steps = [row["step"] for row in curve]
    assert steps == sorted(steps)
    assert len(steps) >= 5
    assert curve[0]["verdict"]["status"] == "poor"
    assert curve[-1]["metrics"] == result["metrics"]
    table = [line.split() for line in sweep.stdout.splitlines() if line.startswith("checkpoint-")]
    assert [row[1] for row in table] == [str(step) for step in steps]

    full = runner(tmp_path, f"cache={cache}", "tracker=none", "tier=full", "output=full.json")
    assert full.returncode == 0, full.stderr
    result = json.loads((tmp_path / "full.json").read_text())
    assert result["verdict"]["readiness"] in ("basic", "production")
    assert all(layer["mse"] < 0.5 for layer in result["layers"])
