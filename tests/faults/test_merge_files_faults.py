"""The same faults as in test_merge_faults.py, where several files in several directories are written: merged experts."""

import shutil
from collections import Counter

import pytest

from runner.files.staging import verify
from tests.faults.test_merge_faults import EXITS, FAULTS, injected, manifest, names, places, words, zygote
from tests.machine import SLOW
from tests.merge.moe_sources import write_moe

__all__ = ["zygote"]  # a fixture
pytestmark = [pytest.mark.fault, pytest.mark.timeout(1800 * SLOW)]


@pytest.fixture
def experts(tmp_path, base):
    """Two sources of one expert each, and what their files hold."""
    paths = [write_moe(tmp_path / name, base, experts=1, seed=seed) for seed, name in enumerate("ab")]
    return {file: file.read_bytes() for path in paths for file in path.rglob("*") if file.is_file()}


def test_any_fault_at_any_call_leaves_no_output_or_a_whole_one(zygote, experts, tmp_path):
    new = tmp_path / "new"
    out = new / "deep" / "out"
    line = words(tmp_path, "pt")
    calls = places(zygote, tmp_path, line)
    assert {place.call for place in calls} >= {"write", "fsync", "renameat2", "mkdir"}
    wanted = manifest(out)
    outcomes: Counter[str] = Counter()
    for place in calls:
        for fault in ("killed", "failing"):
            shutil.rmtree(new)
            code, said = zygote.run(tmp_path, line, injected(place, FAULTS[fault].format(n=place.number)))
            where = f"{fault} at {place}: exit {code}, {said!r}"
            assert code in EXITS[fault], where
            if code == 1:
                (message,) = said.splitlines()
                assert message.startswith("runner: error: "), where
            assert manifest(out) in ((wanted,) if code == 0 else (None, wanted)), where
            assert not out.exists() or verify(out) == [], where
            outcomes[f"{fault}: {'whole' if out.exists() else 'absent'}"] += 1
            if fault == "killed":  # what it left is swept by the next merge, which works
                code, said = zygote.run(tmp_path, words(tmp_path, "pt", force=True))
                assert code == 0, (where, said)
                assert manifest(out) == wanted, where
                assert names(out.parent) == ["out"], where
            new.mkdir(exist_ok=True)
    assert {file: file.read_bytes() for file in experts} == experts
    print(f"{sum(outcomes.values())} runs over {len(calls)} calls:", dict(outcomes))
    assert sum(outcomes.values()) == 2 * len(calls) > 60
