"""The demonstration, much smaller: the same bytes each time, also after a kill; trained once, opened like any run."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from rich.console import Console

from runner import load
from runner.checkpoints.runs import find_run
from runner.families.npt.settings import EquivalenceSettings
from runner.training import demo
from runner.training.demo import DemoSettings, ensure_demo
from runner.training.language_model import LanguageModelSettings
from tests.conftest import ROOT

SETTINGS = DemoSettings(
    base=LanguageModelSettings(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=24,
        num_layers=3,
        num_heads=2,
        max_steps=4,
        warmup_steps=1,
        batch_size=16,
        packed_length=64,
        packed_rows=4,
    ),
    npt=EquivalenceSettings(
        layers=(1, 2), np_rank=2, num_ranks=2, max_steps=60, save_every=10, warmup_steps=4, batch_size=2
    ),
    packed_rows=4,
)


def hashes(run: Path) -> dict[str, str]:
    # A kill may leave an empty lock behind: the next writer of that name takes it away.
    files = sorted(path for path in run.rglob("*") if path.is_file() and not path.name.endswith(".lock"))
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return ensure_demo(tmp_path_factory.mktemp("cache"), settings=SETTINGS)


def test_a_run_directory_in_the_layout_of_the_format(run):
    found = find_run(run)
    assert found.steps == [10, 20, 30, 40, 50, 60]
    assert found.ignored == ("base",)
    for step, path in found.checkpoints:
        names = {entry.name for entry in path.iterdir()}
        assert names >= {"npt_weights.pt", "training_state.pt", "multi_layer_state.pt", "config.json"}
        state = torch.load(path / "training_state.pt", weights_only=True)
        assert state["global_step"] == step
        assert set(torch.load(path / "multi_layer_state.pt", weights_only=True)["layers_to_train"]) == {1, 2}


def test_its_checkpoints_open_over_its_base_and_differ(run):
    ids = torch.tensor([[1, 5, 6, 7]])
    first, last = (load(run, step=step, device="cpu")(ids).logits for step in (10, 60))
    assert first.shape == (1, 4, 300)
    assert not torch.equal(first, last)


def test_the_same_bytes_again_whatever_the_threads(run, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    again = ensure_demo(tmp_path, settings=SETTINGS)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)
    assert again.name == run.name
    assert hashes(again) == hashes(run)


def test_nothing_is_trained_twice(run, monkeypatch):
    monkeypatch.setattr(demo, "_build_base", lambda *_: pytest.fail("trained again"))
    assert ensure_demo(run.parent, settings=SETTINGS) == run


def test_other_settings_and_seeds_have_directories_of_their_own(run, monkeypatch):
    monkeypatch.setattr(demo, "_build_base", lambda target, *_: target.mkdir(parents=True))
    monkeypatch.setattr(demo, "_train_npt", lambda *_: None)
    other = DemoSettings(base=SETTINGS.base, npt=SETTINGS.npt, packed_rows=5)
    runs = {ensure_demo(run.parent, settings=SETTINGS, seed=1), ensure_demo(run.parent, settings=other), run}
    assert len(runs) == 3


def test_a_killed_training_goes_on_to_the_same_bytes(run, tmp_path):
    """SIGKILL once the second checkpoint is there; what is unfinished is not taken for the run."""
    code = (
        "from pathlib import Path; from tests.training.test_demo import SETTINGS, ensure_demo, demo; import time\n"
        "bar = demo.step_bar\n"
        "demo.train_run = (lambda whole: lambda *a, on_step, **o: whole(*a, on_step=lambda s, f: time.sleep(0.02), **o))"
        "(demo.train_run)\n"
        f"ensure_demo(Path({str(tmp_path)!r}), settings=SETTINGS)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    unfinished = tmp_path / f"{run.name}.unfinished"
    deadline = time.monotonic() + 60
    while not (unfinished / "checkpoint-20").is_dir() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / run.name).exists()
    kept = (unfinished / "checkpoint-20").stat().st_ino
    resumed = ensure_demo(tmp_path, settings=SETTINGS)
    assert (resumed / "checkpoint-20").stat().st_ino == kept
    assert hashes(resumed) == hashes(run)
    assert not unfinished.exists()


def test_one_trains_while_another_waits(run, tmp_path, monkeypatch):
    builds = []
    build = demo._build_base
    monkeypatch.setattr(demo, "_build_base", lambda *args: (builds.append(1), time.sleep(0.3), build(*args)))
    consoles = [Console(file=open(os.devnull, "w"), record=True) for _ in range(2)]  # noqa: SIM115, PTH123
    with ThreadPoolExecutor() as pool:
        both = list(pool.map(lambda console: ensure_demo(tmp_path, settings=SETTINGS, progress=console), consoles))
    assert both[0] == both[1]
    assert len(builds) == 1
    texts = sorted(console.export_text() for console in consoles)
    assert "Another process is training" in texts[0]
    assert "Training the demonstration" in texts[1]
    assert hashes(both[0]) == hashes(run)
