"""The golden checkpoints pass every integrity check of the full tier."""

from dataclasses import replace

import pytest

from runner.checks.context import BUILT
from tests.checks.benches import MODEL_CHECKS, QUALITY, bench_of, rows_of
from tests.conftest import golden_folders

NAMES = ["npt/base", *(name for kind in ("npt", "npt_full", "moe") for name in golden_folders(kind))]
EXPECTED = {
    "npt": {"modes", "control"} | QUALITY,
    "npt_full": {"modes", "control"} | QUALITY,
    "gpt": {"convert"},
    "moe": {"router", "skills", "routing"},
    "hf": set(),
}
SHARED = {"model", "forward", "save", "roundtrip", "batch", "gradients", "optimizer_step"}


@pytest.mark.parametrize("name", NAMES)
def test_golden_checkpoints_pass(name, golden, tmp_path):
    kind = "hf" if name == "npt/base" else name.partition("/")[0]
    passes(kind, bench_of(golden(name), tmp_path / "scratch", base=None if kind == "hf" else golden("npt/base")))


@pytest.mark.parametrize("dialect", ["small", "medium"])
def test_gpts_pass(dialect, gpts, tmp_path):
    passes("gpt", bench_of(next(gpts(dialect).glob("best_state*.pt")), tmp_path / "scratch", base=None))


def passes(kind, bench):
    bench.config.tier = replace(bench.config.tier, sequence_length=128, new_tokens=2)
    names = tuple(name for name in bench.config.tier.checks if name != BUILT)
    assert set(MODEL_CHECKS) <= set(names)
    rows = rows_of(bench, names)
    assert set(MODEL_CHECKS) & set(rows) == SHARED | EXPECTED[kind]
    others = {name: row["details"] for name, row in rows.items() if row["status"] != "pass" and row["integrity"]}
    # The golden files came without a manifest, and safetensors have no CRCs.
    others.pop("hashes", None)
    assert others == {}
    assert rows["hashes"]["status"] in ("pass", "skipped")
    assert {name for name, row in rows.items() if not row["integrity"]} == EXPECTED[kind] & QUALITY
    scores = [row["score"] for row in rows.values() if not row["integrity"]]
    # Random weights: far from ready.
    assert not scores or sum(scores) / len(scores) <= 0.6
