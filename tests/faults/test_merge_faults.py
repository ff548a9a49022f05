"""Kills, interrupts, full disks and I/O errors at every call of a merge that changes the disk.

strace injects them, one a run: `pytest -m fault`. Whatever happens, the output is absent, or whole and verified; the
sources are as they were; and the next merge works and leaves nothing else behind.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from runner.files.staging import verify
from tests.conftest import ROOT
from tests.machine import SLOW
from tests.merge.sources import write_source

pytestmark = [pytest.mark.fault, pytest.mark.timeout(1800 * SLOW)]
CALLS = ("write", "fsync", "fdatasync", "rename", "renameat2", "mkdir")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Place:
    """The `number`-th call of `call` on `path` in one thread of the merge."""

    call: str
    path: str
    number: int


class Zygote:
    """The other end of tests/faults/zygote.py."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "faults" / "zygote.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT,
        )  # fmt: skip

    def say(self, line: str) -> None:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def run(self, cwd: Path, words: list[str], strace: list[str] | None = None) -> tuple[int, str]:
        """One command line, with strace attached before it starts: its exit code (-9: killed) and what it printed."""
        self.say(json.dumps({"cwd": str(cwd), "words": words, "log": str(self.log)}))
        number = self.process.stdout.readline().strip()
        tracer = None
        if strace is not None:
            tracer = subprocess.Popen(["strace", "-f", "-p", number, *strace], stderr=subprocess.PIPE, text=True)
            attached = tracer.stderr.readline()
            assert "attached" in attached, attached
        self.say("go")
        code = int(self.process.stdout.readline())
        if tracer is not None:
            tracer.wait()
            tracer.stderr.close()
        return code, self.log.read_text()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture(scope="module")
def zygote(tmp_path_factory):
    if not shutil.which("strace"):
        pytest.skip("strace is not installed")
    started = Zygote(tmp_path_factory.mktemp("zygote") / "log")
    yield started
    started.close()


@pytest.fixture
def sources(tmp_path):
    """Two sources, and what their files hold."""
    for seed, (name, layer) in enumerate((("a", 1), ("b", 2))):
        write_source(tmp_path / name, {layer: ("single", 2, 2)}, seed=seed, step=10 * (seed + 1))
    return {file: file.read_bytes() for name in "ab" for file in (tmp_path / name).iterdir()}


def words(folder: Path, form: str, force: bool = False) -> list[str]:
    return [
        "task=merge", "tracker=none", "merge.sources=[a,b]", "merge.output=new/deep/out", f"merge.format={form}",
        f"merge.force={str(force).lower()}", f"hydra.run.dir={folder / 'log'}",
    ]  # fmt: skip


def places(zygote: Zygote, folder: Path, line: list[str]) -> list[Place]:
    """Every call of a healthy merge that changes the disk below new/, once for each number it has in its thread."""
    trace = folder / "trace"
    code, said = zygote.run(folder, line, ["-y", "-e", f"trace={','.join(CALLS)}", "-o", str(trace)])
    assert code == 0, said
    found: Counter[tuple[str, str, str]] = Counter()
    calls = []
    for text in trace.read_text().splitlines():
        match = re.match(r"(\d+) +(\w+)\((.*)", text)
        if not match or match[2] not in CALLS:
            continue
        thread, call, arguments = match.groups()
        path = re.search(r"^\d+<([^>]*)>" if call in ("write", "fsync", "fdatasync") else r'"([^"]*)"', arguments)
        if path and f"{folder}/new" in path[1]:
            found[thread, call, path[1]] += 1
            calls.append(Place(call, path[1], found[thread, call, path[1]]))
    return list(dict.fromkeys(calls))


def injected(place: Place, what: str) -> list[str]:
    return ["-o", "/dev/null", "-P", place.path, "-e", f"trace={place.call}", "-e", f"inject={place.call}:{what}"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


FAULTS = {
    "killed": "signal=KILL:when={n}",
    "interrupted": "signal=INT:when={n}",
    "full": "error=ENOSPC:when={n}+",
    "failing": "error=EIO:when={n}",
}
EXITS = {"killed": (-9,), "interrupted": (130,), "full": (0, 1), "failing": (0, 1)}
# Some 180 runs in all: each of some 23 calls for each of these; tensors are copied by the kernel (test_merge_models_faults.py).
SWEEPS = [
    ("pt", False, ("killed", "interrupted", "full", "failing")),
    ("pt", True, ("killed", "failing")),
    ("safetensors", False, ("killed", "full")),
]


@pytest.mark.parametrize(("form", "replacing", "faults"), SWEEPS, ids=["new", "replacing", "safetensors"])
def test_any_fault_at_any_call_leaves_no_output_or_a_whole_one(form, replacing, faults, zygote, sources, tmp_path):
    new, kept = tmp_path / "new", tmp_path / "kept"
    out = new / "deep" / "out"
    line = words(tmp_path, form, force=replacing)
    if replacing:
        assert zygote.run(tmp_path, [*words(tmp_path, form), "merge.layers=[1]"])[0] == 0
        shutil.copytree(new, kept)
    calls = places(zygote, tmp_path, line)
    assert {place.call for place in calls} >= {"write", "fsync", "renameat2", "rename" if replacing else "mkdir"}
    wanted = manifest(out)
    before = manifest(kept / "deep" / "out")
    outcomes: Counter[str] = Counter()
    for place in calls:
        for fault in faults:
            shutil.rmtree(new)
            if replacing:
                shutil.copytree(kept, new)
            code, said = zygote.run(tmp_path, line, injected(place, FAULTS[fault].format(n=place.number)))
            where = f"{fault} at {place}: exit {code}, {said!r}"
            assert code in EXITS[fault], where
            if code in (1, 130):
                (message,) = said.splitlines()
                assert message.startswith("runner: error: " if code == 1 else "runner: interrupted"), where
            standing = [path for path in (out.parent.iterdir() if out.parent.exists() else ()) if path.name[0] != "."]
            assert all(verify(path) == [] for path in standing), where
            now = manifest(out)
            assert now == wanted if code == 0 else now in (before, wanted), where
            outcomes[f"{fault}: {'new' if now == wanted else 'old' if now else 'absent'}"] += 1
            if fault == "killed":  # what it left is swept by the next merge, which works
                assert zygote.run(tmp_path, words(tmp_path, form, force=True))[0] == 0, where
                assert manifest(out) == wanted, where
                assert names(out.parent) == ["out"], where
            new.mkdir(exist_ok=True)
    assert {file: file.read_bytes() for file in sources} == sources
    print(f"{sum(outcomes.values())} runs over {len(calls)} calls:", dict(outcomes))
    assert sum(outcomes.values()) == len(calls) * len(faults) > 40


def manifest(out: Path) -> bytes | None:
    """What is said to stand there; None where nothing does."""
    return (out / "MANIFEST.json").read_bytes() if out.exists() else None
