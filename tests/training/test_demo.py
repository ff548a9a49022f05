"""The recipe of the demonstration, much smaller: the same bytes each time; its run opens like any other."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from runner import load
from runner.checkpoints.runs import find_run
from runner.errors import CheckpointError
from runner.families.npt.settings import EquivalenceSettings
from runner.training import demo
from runner.training.demo import DemoSettings, make_demo
from runner.training.language_model import LanguageModelSettings

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
    files = sorted(path for path in run.rglob("*") if path.is_file())
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_demo(tmp_path_factory.mktemp("demo"), settings=SETTINGS)


def test_a_run_directory_in_the_layout_of_the_format(run):
    found = find_run(run)
    assert found.steps == [10, 20, 30, 40, 50, 60]
    assert found.ignored == ("base",)
    for step, path in found.checkpoints:
        names = {entry.name for entry in path.iterdir()}
        assert names >= {"npt_weights.pt", "training_state.pt", "multi_layer_state.pt", "config.json"}
        state = torch.load(path / "training_state.pt", weights_only=True)
        assert state["global_step"] == step
        assert ("optimizer_state_dict" in state) == (step == 60)
        assert set(torch.load(path / "multi_layer_state.pt", weights_only=True)["layers_to_train"]) == {1, 2}


def test_its_checkpoints_open_over_its_base_and_differ(run):
    ids = torch.tensor([[1, 5, 6, 7]])
    first, last = (load(run, step=step, device="cpu")(ids).logits for step in (10, 60))
    assert first.shape == (1, 4, 300)
    assert not torch.equal(first, last)


def test_the_same_bytes_again_whatever_the_threads(run, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    again = make_demo(tmp_path, settings=SETTINGS)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)
    assert hashes(again) == hashes(run)


def test_a_run_that_is_there_is_refused(run):
    before = hashes(run)
    with pytest.raises(CheckpointError, match="exists"):
        make_demo(run.parent, settings=SETTINGS)
    assert hashes(run) == before


def test_what_it_shows_is_told_by_step(run):
    told = demo.figures(run, settings=SETTINGS)
    assert [row["step"] for row in told["steps"]] == [10, 20, 30, 40, 50, 60]
    assert {"mse", "cosine", "kl", "top1", "status", "readiness"} <= set(told["steps"][0])
    assert told["settings"]["npt"]["np_rank"] == 2
    assert json.loads(json.dumps(told))["seed"] == 0


def test_no_operation_of_it_is_one_of_bfloat16(tmp_path):
    """CPUs without such instructions take twenty times as long."""
    seen: set[torch.dtype] = set()

    class Dtypes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            seen.update(x.dtype for x in tree_leaves((args, result)) if isinstance(x, torch.Tensor))
            return result

    short = replace(SETTINGS, npt=replace(SETTINGS.npt, max_steps=10))
    with Dtypes():
        make_demo(tmp_path, settings=short)
    assert torch.float32 in seen
    assert torch.bfloat16 not in seen
