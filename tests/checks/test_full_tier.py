"""The golden checkpoints pass every integrity check of the full tier."""

from dataclasses import replace

import pytest

from runner.checks.context import BUILT
from tests.checks.benches import MODEL_CHECKS, QUALITY, bench_of, rows_of
from tests.conftest import GOLDEN

FOLDERS = {
    kind: sorted(path for path in (GOLDEN / kind).iterdir() if path.is_dir() and path.name != "base")
    for kind in ("npt", "npt_full", "gpt", "moe")
    if GOLDEN.is_dir()
}
PATHS = [path for paths in FOLDERS.values() for path in paths] + ([GOLDEN / "npt" / "base"] if FOLDERS else [])
EXPECTED = {
    "npt": {"modes", "control"} | QUALITY,
    "npt_full": {"modes", "control"} | QUALITY,
    "gpt": {"convert"},
    "moe": {"router", "skills", "routing"},
    "hf": set(),
}
SHARED = {"model", "forward", "save", "roundtrip", "batch", "gradients", "optimizer_step"}


@pytest.mark.skipif(not PATHS, reason="the golden checkpoints (../shared/golden) are not on this machine")
@pytest.mark.parametrize("path", PATHS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_golden_checkpoints_pass(path, tmp_path):
    kind = "hf" if path.name == "base" else path.parent.name
    file = next(path.glob("best_state*.pt")) if kind == "gpt" else path
    bench = bench_of(file, tmp_path / "scratch", base=None if kind in ("gpt", "hf") else GOLDEN / "npt" / "base")
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
