"""Damaged copies of every layout: exactly the check that should see it fails, and says why; all else passes or waits."""

import shutil
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from runner.checks.catalogue import checks_for
from runner.checks.check import run_checks
from runner.confdir import config_directory
from tests.checks.benches import bench_of, write_npt_full
from tests.checks.damages import TABLES
from tests.conftest import MIXED, npt_tensors, write_npt
from tests.gpt_files import random_state, script_file
from tests.lora_files import hashes, write_adapter, write_moe

CASES = [(layout, *case) for layout, table in TABLES.items() for case in table]
# The tier that opens the checkpoint named as ckpt= without a model.
MINIMAL = tuple(OmegaConf.load(config_directory() / "tier" / "minimal.yaml").checks[1:])


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory, base: Path) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("originals")
    return {
        "lora_moe": write_moe(root / "checkpoint-120", base, ranks=(3,) * 4, alphas=(6,) * 4),
        "npt_delta": write_npt(root / "checkpoint-100", npt_tensors(base, MIXED), base=base),
        "gpt": script_file(root / "state_step000300.pt", random_state("small")),
        "npt_full": write_npt_full(root / "full", base),
        "hf": Path(shutil.copytree(base, root / "model")),
        "peft": write_adapter(root / "adapter", base),
    }


def rows_of(path: Path, scratch: Path, **options: object) -> dict[str, dict]:
    bench = bench_of(path, scratch, **options)
    return {row["name"]: row for row in run_checks(checks_for(bench.family, MINIMAL), bench)}


def copy(original: Path, folder: Path) -> Path:
    target = folder / original.name
    return Path(shutil.copytree(original, target) if original.is_dir() else shutil.copy(original, target))


@pytest.mark.parametrize("layout", list(TABLES))
def test_the_undamaged_pass(layout, originals, tmp_path):
    rows = rows_of(originals[layout], tmp_path / "scratch")
    skipped = {name for name, row in rows.items() if row["status"] == "skipped"}
    assert {row["status"] for name, row in rows.items() if name not in skipped} == {"pass"}
    assert skipped <= {"hashes"}, "a safetensors checkpoint without a manifest has nothing to hold it against"


@pytest.mark.parametrize(
    ("layout", "what", "damage", "check", "message"), CASES, ids=lambda v: v if isinstance(v, str) else ""
)
def test_exactly_the_right_check_fails(layout, what, damage, check, message, originals, tmp_path):
    path = copy(originals[layout], tmp_path)
    damage(path)
    before = hashes(tmp_path)
    rows = rows_of(path, tmp_path / "scratch")
    assert {name: row["details"] for name, row in rows.items() if row["status"] == "fail"}.keys() == {check}
    assert message in rows[check]["details"]
    assert "internal error" not in rows[check]["details"]
    assert not {row["status"] for row in rows.values()} - {"pass", "fail", "skipped"}
    assert {file: hash for file, hash in hashes(tmp_path).items() if file in before} == before


def test_there_are_enough_of_them():
    assert len({(layout, what) for layout, what, *_ in CASES}) == len(CASES) >= 25
