"""Outputs: absent or complete and verified, whoever dies, whoever else writes, whatever stands there."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from runner.errors import CheckpointError, RunnerError, printable
from runner.files import atomic as renames
from runner.files.file_type import sha256_of
from runner.files.staging import staged, verify
from tests.machine import LIMIT

REPOSITORY = Path(__file__).parents[2]


def write(target: Path, content: str = "weights", **options: object) -> None:
    """An output of two files, one in a folder."""
    with staged(target, **options) as partial:  # type: ignore[arg-type]
        (partial / "weights.bin").write_text(content)
        (partial / "inner").mkdir()
        (partial / "inner" / "config.json").write_text("{}")


def interrupt(target: Path, action: Callable[[], object], **options: object) -> None:
    """Write one file, then do `action`."""
    with staged(target, **options) as partial:  # type: ignore[arg-type]
        (partial / "a").write_text("a")
        action()


def fail(error: BaseException) -> Callable[[], None]:
    def action() -> None:
        raise error

    return action


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_read_back_is_held_against_the_hash_that_the_writer_knew(tmp_path: Path) -> None:
    write(tmp_path / "good", hashes={"weights.bin": hashlib.sha256(b"weights").hexdigest()})
    assert verify(tmp_path / "good") == []
    with pytest.raises(RunnerError, match=r"read back is not what was written: .*weights.bin was changed"):
        write(tmp_path / "bad", "torn in flight", hashes={"weights.bin": hashlib.sha256(b"weights").hexdigest()})
    assert names(tmp_path) == ["good"]


def test_what_is_read_back_is_shown_to_the_writers_own_watcher_which_can_refuse_it(tmp_path: Path) -> None:
    seen = []

    def refuse(offset: int, content: memoryview) -> None:
        seen.append((offset, bytes(content)))
        if not content:
            raise RunnerError("not equal to the sources")

    with pytest.raises(RunnerError, match="not equal to the sources"):
        write(tmp_path / "out", watchers=lambda partial: {"weights.bin": refuse})
    assert seen == [(0, b"weights"), (7, b"")]
    assert names(tmp_path) == []


def test_a_file_that_reads_back_otherwise_is_named_before_what_a_watcher_says(tmp_path: Path) -> None:
    def refuse(offset: int, content: memoryview) -> None:
        raise RunnerError("not equal to the sources")

    with pytest.raises(RunnerError, match=r"read back is not what was written: .*weights.bin was changed"):
        write(tmp_path / "out", hashes={"weights.bin": "0" * 64}, watchers=lambda partial: {"weights.bin": refuse})
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["merged", "a b=c,[d]", "newline\nname", "émoji 🙂", "*?"])
def test_an_output_appears_whole_and_alone(name: str, tmp_path: Path) -> None:
    target = tmp_path / "new" / "parents" / name
    write(target, manifest={"recipe": {"layers": [1, 3]}})
    assert verify(target) == []
    assert names(target.parent) == [name]
    manifest = json.loads((target / "MANIFEST.json").read_text())
    assert set(manifest) == {"digest", "files", "recipe", "versions"}
    entry = manifest["files"]["weights.bin"]
    assert entry == {"size": 7, "sha256": sha256_of(target / "weights.bin")}


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    manifests = []
    for name in ("a", "b"):
        with staged(tmp_path / name, manifest={"recipe": {"b": 1, "a": 2}}) as partial:
            torch.save({"weight": torch.arange(10.0)}, partial / "weights.pt")
        manifests.append((tmp_path / name / "MANIFEST.json").read_bytes())
    assert manifests[0] == manifests[1]


def test_nothing_is_at_the_target_while_it_is_written(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with staged(target) as partial:
        assert partial.parent == tmp_path
        assert partial.name.startswith(".out.partial-")
        assert not target.exists()
        (partial / "a").write_text("a")
    assert target.is_dir()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_nothing(error: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(error):
        interrupt(tmp_path / "out", fail(error()))
    assert names(tmp_path) == []


def test_an_exception_while_replacing_keeps_the_old(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    with pytest.raises(ValueError, match="stop"):
        interrupt(tmp_path / "out", fail(ValueError("stop")), replace=True)
    assert names(tmp_path) == ["out"]
    assert verify(tmp_path / "out") == []


def test_every_changed_byte_is_found(tmp_path: Path) -> None:
    target = tmp_path / "out"
    write(target, "weights", manifest={"recipe": {"note": "é"}})
    for path in (target / "weights.bin", target / "inner" / "config.json", target / "MANIFEST.json"):
        healthy = path.read_bytes()
        for place in range(len(healthy)):
            for flip in (1, 0x20, 0x80):
                path.write_bytes(healthy[:place] + bytes([healthy[place] ^ flip]) + healthy[place + 1 :])
                assert len(verify(target)) == 1, (path.name, place, flip)
        for changed in (healthy + b"\n", healthy[:-1], b""):
            path.write_bytes(changed)
            assert verify(target), (path.name, changed[-10:])
        path.write_bytes(healthy)
    assert verify(target) == []


def test_missing_added_and_linked_files_are_found(tmp_path: Path) -> None:
    target = tmp_path / "out"
    write(target)
    (target / "weights.bin").rename(target / "extra\x1b")
    assert verify(target) == [f"{target}: weights.bin is missing", rf"{target}: extra\x1b is not in the manifest"]
    (target / "extra\x1b").rename(target / "weights.bin")
    (target / "link").symlink_to(target / "weights.bin")
    assert "link or special file" in verify(target)[0]
    (target / "link").unlink()
    (target / "MANIFEST.json").unlink()
    assert "MANIFEST.json: missing" in verify(target)[0]
    with pytest.raises(CheckpointError, match="no such directory"):
        verify(tmp_path / "nowhere")


def existing(folder: Path) -> tuple[Path, dict[str, object]]:
    (folder / "out").mkdir()
    return folder / "out", {}


def a_file(folder: Path) -> tuple[Path, dict[str, object]]:
    (folder / "out").write_text("mine")
    return folder / "out", {"replace": True}


def a_link(folder: Path) -> tuple[Path, dict[str, object]]:
    (folder / "elsewhere").mkdir()
    (folder / "out").symlink_to(folder / "elsewhere")
    return folder / "out", {"replace": True}


def a_dangling_link(folder: Path) -> tuple[Path, dict[str, object]]:
    (folder / "out").symlink_to(folder / "nowhere")
    return folder / "out", {}


def the_input(folder: Path) -> tuple[Path, dict[str, object]]:
    (folder / "source").mkdir()
    return folder / "source", {"replace": True, "inputs": [folder / "source"]}


def the_input_by_another_name(folder: Path) -> tuple[Path, dict[str, object]]:
    (folder / "source" / "deep").mkdir(parents=True)
    (folder / "alias").symlink_to(folder / "source")
    return folder / "alias" / "deep", {"replace": True, "inputs": [folder / "source" / "deep"]}


def inside_an_input(folder: Path) -> tuple[Path, dict[str, object]]:
    (folder / "source").mkdir()
    return folder / "source" / "new" / "out", {"inputs": [folder / "source"]}


def around_an_input(folder: Path) -> tuple[Path, dict[str, object]]:
    (folder / "out").mkdir()
    (folder / "out" / "weights.pt").write_text("x")
    return folder / "out", {"replace": True, "inputs": [folder / "out" / "weights.pt"]}


def no_input(folder: Path) -> tuple[Path, dict[str, object]]:
    return folder / "out", {"inputs": [folder / "none"]}


def too_large(folder: Path) -> tuple[Path, dict[str, object]]:
    return folder / "out", {"expected_bytes": 1 << 60}


def below_a_file(folder: Path) -> tuple[Path, dict[str, object]]:
    (folder / "file").write_text("x")
    return folder / "file" / "out", {}


REFUSED: dict[str, tuple[Callable[[Path], tuple[Path, dict[str, object]]], str]] = {
    "existing": (existing, "exists already"),
    "a file": (a_file, "a file stands where"),
    "a link": (a_link, "symbolic link"),
    "a dangling link": (a_dangling_link, "symbolic link"),
    "the input": (the_input, "equal to or inside the input"),
    "the input by another name": (the_input_by_another_name, "equal to or inside the input"),
    "inside an input": (inside_an_input, "equal to or inside the input"),
    "around an input": (around_an_input, "the output holds the input"),
    "no input": (no_input, "no such input"),
    "too large": (too_large, "MB free"),
    "below a file": (below_a_file, "not a directory"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_outputs_are_left_as_they_are(case: str, tmp_path: Path) -> None:
    make, expected = REFUSED[case]
    target, options = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match=expected):
        write(target, **options)
    assert sorted(tmp_path.rglob("*")) == before


def test_replacing_swaps_and_removes_what_we_wrote(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    write(tmp_path / "out", "new", replace=True)
    assert (tmp_path / "out" / "weights.bin").read_text() == "new"
    assert names(tmp_path) == ["out"]
    assert verify(tmp_path / "out") == []


@pytest.mark.parametrize("ours", [True, False])
def test_replacing_keeps_what_someone_else_wrote(ours: bool, tmp_path: Path) -> None:
    if ours:
        write(tmp_path / "out", "old")
    else:
        (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("precious")
    write(tmp_path / "out", "new", replace=True)
    assert verify(tmp_path / "out") == []
    kept = next(path for path in tmp_path.iterdir() if path.name != "out")
    assert kept.name.startswith("out.old-")
    assert (kept / "notes.txt").read_text() == "precious"


def test_without_renameat2_the_outcome_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renames, "_function", lambda: None)
    write(tmp_path / "out", "old")
    with pytest.raises(CheckpointError, match="exists already"):
        write(tmp_path / "out", "new")
    write(tmp_path / "out", "new", replace=True)
    assert (tmp_path / "out" / "weights.bin").read_text() == "new"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("system_call", [True, False])
def test_a_target_that_appears_meanwhile_is_left_alone(
    system_call: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not system_call:
        monkeypatch.setattr(renames, "_function", lambda: None)
    with pytest.raises(CheckpointError, match="appeared while"):
        interrupt(tmp_path / "out", (tmp_path / "out").mkdir)
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == []


def test_a_second_writer_is_told_and_others_are_not_disturbed(tmp_path: Path) -> None:
    with staged(tmp_path / "out") as partial:
        (partial / "a").write_text("a")
        with pytest.raises(CheckpointError, match="another process is writing it"):
            write(tmp_path / "out")
        write(tmp_path / "other")
        assert (partial / "a").exists()
    assert names(tmp_path) == ["other", "out"]


def test_eight_writers_at_once_leave_one_sound_output(tmp_path: Path) -> None:
    outcomes: list[str] = []
    start = threading.Barrier(8)

    def attempt(place: int) -> None:
        start.wait()
        try:
            write(tmp_path / "out", f"writer {place}")
            outcomes.append("won")
        except CheckpointError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=attempt, args=(place,)) for place in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count("won") == 1
    assert len(outcomes) == 8
    assert verify(tmp_path / "out") == []
    assert names(tmp_path) == ["out"]


def test_stale_leftovers_are_swept_and_nothing_else(tmp_path: Path) -> None:
    for name in (".out.partial-0123abcd", ".gone.partial-0123abcd", ".out.partial-notours", "out.partial-0123abcd"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("x")
    (tmp_path / ".out.replaced-0123abcd").mkdir()
    (tmp_path / ".out.replaced-0123abcd" / "notes.txt").write_text("precious")
    write(tmp_path / "out")
    left = names(tmp_path)
    kept = next(name for name in left if name.startswith("out.old-"))
    assert (tmp_path / kept / "notes.txt").read_text() == "precious"
    assert sorted(left) == sorted([".out.partial-notours", kept, "out", "out.partial-0123abcd"])


def test_a_disk_error_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunnerError, match=r"not written: .*No space left"):
        interrupt(tmp_path / "out", fail(OSError(28, "No space left on device")))
    assert names(tmp_path) == []


class FailsOnce:
    """Stands for a function of `os`: call number `place` fails as a broken disk does."""

    def __init__(self, function: Callable[..., object], place: int) -> None:
        self.function, self.left = function, place

    def __call__(self, *arguments: object, **options: object) -> object:
        self.left -= 1
        if self.left == -1:
            raise OSError(5, "Input/output error")
        return self.function(*arguments, **options)


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("call", ["fsync", "mkdir", "rename", "unlink", "open"])
def test_an_error_of_the_disk_at_any_call_leaves_the_old_or_the_new(
    call: str, replace: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(renames, "_function", lambda: None)
    failures = 0
    for place in range(30):
        target = tmp_path / str(place) / "out"
        target.parent.mkdir()
        if replace:
            write(target, "old")
        failing = FailsOnce(getattr(os, call), place)
        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing)
            try:
                write(target, "new", replace=replace)
            except RunnerError:
                failures += 1
        standing = [path for path in target.parent.iterdir() if path.name.startswith("out")]
        assert all(verify(path) == [] for path in standing)
        assert len(standing) >= replace
        write(target, "new", replace=True)
        assert (target / "weights.bin").read_text() == "new"
        if failing.left >= 0:
            break
    assert failures
    assert failing.left >= 0, "more calls than the test tries"


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="needs root, to mount a small disk")
@pytest.mark.parametrize(
    ("disk", "writer"),
    [
        ("size=2m", "torch.save(state, partial / 'w.pt')"),
        ("size=2m", "save_file(state, partial / 'w.st')"),
        ("ro", "torch.save(state, partial / 'w.pt')"),
    ],
)
def test_a_full_or_read_only_disk_is_one_line_and_leaves_nothing(disk: str, writer: str, tmp_path: Path) -> None:
    code = f"""
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from runner.files.staging import staged
from runner.errors import RunnerError
folder = Path(sys.argv[1])
state = {{"a": torch.ones(1 << 20)}}
try:
    with staged(folder / "out") as partial:
        {writer}
except RunnerError as error:
    print(type(error).__name__, error, sorted(folder.iterdir()))
"""
    mount = f'mount -t tmpfs -o {disk} none "$1" && exec "$2" -c "$3" "$1"'
    run = subprocess.run(
        ["unshare", "-m", "sh", "-c", mount, "sh", tmp_path, sys.executable, code],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        check=False,
        timeout=LIMIT,
    )
    if "unshare" in run.stderr or "mount:" in run.stderr:
        pytest.skip("this machine does not let a test mount a small disk")
    assert run.stdout.startswith("RunnerError"), run.stderr
    assert "not written" in run.stdout
    assert run.stdout.rstrip().endswith("[]")


KILLED = """
import sys
from pathlib import Path
from runner.files.staging import staged
target = Path(sys.argv[1])
for turn in range(10_000):
    print(turn, flush=True)
    with staged(target, replace=True) as partial:
        for place in range(5):
            (partial / f"{place}.bin").write_bytes(bytes([turn % 256]) * 20_000)
"""


def test_a_kill_at_any_moment_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    target = tmp_path / "out"
    moments = random.Random(0)
    found = 0
    for _ in range(40):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, target], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
        )
        assert process.stdout is not None
        for turn in range(moments.randint(1, 3)):
            assert process.stdout.readline() == f"{turn}\n"
        time.sleep(moments.uniform(0.0, 0.04))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert verify(target) == [] if target.exists() else True
        found += target.exists()
    assert found
    write(target, "at last", replace=True)
    assert verify(target) == []
    assert names(tmp_path) == ["out"], [printable(path) for path in tmp_path.iterdir()]
