"""Every hostile file through the command line: one line, exit 2, soon, within 2 GB, the input unchanged."""

import json
import os
import resource
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

from runner.__main__ import start
from runner.files.file_type import sha256_of
from tests.checkpoints.test_pickles import BOMBS, DAMAGED
from tests.checkpoints.test_tensors import INDEXES, SAFETENSORS
from tests.conftest import ROOT
from tests.machine import SLOW

DRIVER = """
import contextlib, io, json, resource, sys
from pathlib import Path
from runner import cli
import runner.tasks.diagnose
virtual = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (virtual + (1 << 30),) * 2)
for line in sys.stdin:
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        code = cli.run(json.loads(line))
    print("RESULT", json.dumps([code, errors.getvalue()]), flush=True)
"""
SINGLE = {"pickle": DAMAGED, "bomb": {name: (make, "") for name, make in BOMBS.items()}, "safetensors": SAFETENSORS}


def hashes(path: Path) -> dict[Path, str]:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {file: sha256_of(file) for file in files}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.fuzz
@pytest.mark.timeout(400 * SLOW)
def test_every_hostile_file(tmp_path, base):
    made: list[tuple[str, Path]] = []
    for kind, cases in SINGLE.items():
        for name, (make, _) in cases.items():
            folder = tmp_path / f"{kind}-{len(made)}"
            folder.mkdir()
            made.append((f"{kind}: {name}", make(folder)))
    for name, (make, _) in INDEXES.items():
        folder = tmp_path / f"index-{len(made)}"
        folder.mkdir()
        make(folder)
        shutil.copy(base / "config.json", folder)
        made.append((f"index: {name}", folder))
    before = [hashes(path) for _, path in made]
    lines = [["task=inspect", f"ckpt={path}", "tracker=none"] for _, path in made]
    lines += [
        [f"ckpt={path}", f"base={base}", "tracker=none"] for name, path in made if name.startswith(("bomb", "index"))
    ]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER], input="\n".join(map(json.dumps, lines)), cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    results = [json.loads(line.partition(" ")[2]) for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert len(results) == len(lines), (lines[len(results)], done.stderr[-1000:])
    for words, (code, errors) in zip(lines, results, strict=True):
        assert code == 2, (words, errors)
        assert len(errors.splitlines()) == 1, (words, errors)
        assert errors.startswith("runner: error: "), (words, errors)
        assert errors.rstrip("\n").isprintable(), (words, errors)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 2 << 20  # kilobytes
    assert [hashes(path) for _, path in made] == before


def test_an_interrupt_while_the_command_line_is_imported_is_one_line(monkeypatch, capsys):
    class Interrupted(types.ModuleType):
        def __getattr__(self, name: str) -> object:
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "runner.cli", Interrupted("runner.cli"))
    with pytest.raises(SystemExit) as end:
        start()
    assert end.value.code == 130
    assert capsys.readouterr().err == "runner: interrupted; what was finished is kept\n"
