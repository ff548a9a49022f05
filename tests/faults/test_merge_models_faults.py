"""The same faults as in test_merge_faults.py, where a whole model in shards is computed and copied: hf."""

import shutil
from collections import Counter
from pathlib import Path

import pytest

from runner.files.staging import verify
from tests.faults import test_merge_faults as faults
from tests.faults.test_merge_faults import EXITS, FAULTS, injected, manifest, names, places, zygote
from tests.machine import SLOW
from tests.merge.mergekit_figures import random_models, write_models

__all__ = ["zygote"]  # a fixture
pytestmark = [pytest.mark.fault, pytest.mark.timeout(1800 * SLOW)]


def words(folder: Path, force: bool = False) -> list[str]:
    return [
        "task=merge", "tracker=none", "merge=slerp", "merge.sources=[a,b]", "merge.output=new/deep/out",
        "merge.shard_size=5e-6", f"merge.force={str(force).lower()}", f"hydra.run.dir={folder / 'log'}",
    ]  # fmt: skip


def test_any_fault_at_any_call_leaves_no_output_or_a_whole_one(zygote, tmp_path):
    write_models(tmp_path, random_models())
    before = {file: file.read_bytes() for name in "ab" for file in (tmp_path / name).iterdir()}
    new = tmp_path / "new"
    out = new / "deep" / "out"
    line = words(tmp_path)
    calls = places(zygote, tmp_path, line)
    assert {place.call for place in calls} >= {"write", "fsync", "renameat2", "mkdir"}
    assert len(list(out.glob("model-*.safetensors"))) > 1
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
            new.mkdir(exist_ok=True)
    # What kills left is swept by the next merge, which works.
    code, said = zygote.run(tmp_path, words(tmp_path, force=True))
    assert code == 0, said
    assert manifest(out) == wanted
    assert names(out.parent) == ["out"]
    assert {file: file.read_bytes() for file in before} == before
    print(f"{sum(outcomes.values())} runs over {len(calls)} calls:", dict(outcomes))
    assert sum(outcomes.values()) == 2 * len(calls) > 40


@pytest.mark.parametrize("fault", ["killed", "full"])
def test_a_fault_while_the_kernel_copies(fault, zygote, tmp_path, monkeypatch):
    """Records of 600 kB, which are copied from file to file."""
    import torch

    from tests.merge.sources import write_source

    monkeypatch.setattr(faults, "CALLS", (*faults.CALLS, "copy_file_range"))
    for name, layer in (("a", 1), ("b", 3)):
        weights = {f"layer_{layer}_np.{m}": torch.ones(s) for m, s in (
            ("W_down", (300, 500)), ("W_a_up", (500, 300)), ("W_b_up", (500, 300)))}  # fmt: skip
        write_source(tmp_path / name, {}, weights=weights, trained=0)
    line = faults.words(tmp_path, "pt")
    out = tmp_path / "new" / "deep" / "out"
    trace = tmp_path / "trace"
    code, said = zygote.run(tmp_path, line, ["-e", "trace=copy_file_range", "-o", str(trace)])
    assert code == 0, said
    count = trace.read_text().count("copy_file_range(")
    assert count >= 6
    wanted = manifest(out)
    for number in range(1, count + 1):
        shutil.rmtree(tmp_path / "new")
        what = FAULTS[fault].format(n=number)
        strace = ["-o", "/dev/null", "-e", "trace=copy_file_range", "-e", f"inject=copy_file_range:{what}"]
        code, said = zygote.run(tmp_path, line, strace)
        assert code == EXITS[fault][-1], (number, code, said)
        assert not out.exists()
        assert code != 1 or said.startswith("runner: error: ")
    assert zygote.run(tmp_path, line)[0] == 0
    assert manifest(out) == wanted
