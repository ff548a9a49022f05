"""`task=train` goes on from a merge: with its layers, with one of them, with one more."""

import json
from pathlib import Path

import pytest
import torch

from runner import cli
from tests.conftest import write_base

COMMON = (
    "task=train", "train.np_rank=2", "train.num_ranks=2", "train.modulation=dual", "train.save_every=100",
    "train.warmup_steps=1", "train.sequence_length=16", "train.batch_size=2", "tracker=none", "data=text",
)  # fmt: skip
TRAINED_B = 6


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> Path:
    """A base, a text, and two runs of one layer each: A of layer 0 at step 4, B of layer 2 at step 6."""
    root = tmp_path_factory.mktemp("scene")
    write_base(root / "base")
    (root / "text.txt").write_text("\n\n".join(f"The {word} sat on the mat, {word}." for word in "abcdefghijkl" * 4))
    given = [f"base={root}/base", f"data.path={root}/text.txt"]
    for name, layer, steps in (("a", 0, 4), ("b", 2, TRAINED_B)):
        words = [f"train.layers=[{layer}]", f"train.max_steps={steps}", f"hydra.run.dir={root}/{name}"]
        assert cli.run([*COMMON, *given, *words]) == 0
    return root


@pytest.fixture(scope="module")
def merged(scene) -> Path:
    sources = f"merge.sources=[{scene}/a/checkpoint-4,{scene}/b/checkpoint-{TRAINED_B}]"
    words = ["task=merge", sources, f"merge.output={scene}/merged", "tracker=none", f"hydra.run.dir={scene}/merging"]
    assert cli.run(words) == 0
    return scene / "merged"


def moments(checkpoint: Path) -> dict[str, dict]:
    """The optimizer's entries by key."""
    weights = torch.load(checkpoint / "npt_weights.pt", weights_only=True)
    state = torch.load(checkpoint / "training_state.pt", weights_only=True)["optimizer_state_dict"]["state"]
    return {name: state[index] for index, name in enumerate(weights) if index in state}


def short(scene: Path, merged: Path, layers: str, *more: str) -> list[str]:
    """The command of the guide: layers, checkpoint, steps; the rest is as the checkpoint has it."""
    data = ("data=text", f"data.path={scene}/text.txt")
    return [
        "task=train",
        *data,
        f"train.layers={layers}",
        f"train.resume_from={merged}",
        "train.max_steps=50000",
        *more,
    ]


def stopped(monkeypatch, after: int) -> None:
    """Let a training end after so many steps, as if it had been interrupted."""
    from runner.training import loop

    taken = iter(range(1, after + 1))

    class Asked(list):
        def __bool__(self):
            return next(taken, after) == after

    class Stop:
        def __enter__(self):
            return Asked()

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(loop, "asked_to_stop", Stop)


def test_the_guides_command_goes_on_with_both_layers(run, scene, merged, monkeypatch):
    stopped(monkeypatch, 1)
    before = moments(merged)
    assert {entry["step"].item() for entry in before.values()} == {4.0, float(TRAINED_B)}
    done = run(*short(scene, merged, "[0,2]"))
    assert (done.code, done.err) == (130, "")
    resumed, ckpt = done.result["resumed"], Path(done.result["ckpt"])
    assert (resumed["layers_taken"], resumed["layers_new"], resumed["layers_kept"]) == ([0, 2], [], [])
    assert (resumed["start_step"], resumed["tensors_without_moments"]) == (0, 0)
    assert "not all trained to one step" in resumed["because"]
    after = moments(ckpt)
    assert set(after) == set(before)
    for name, entry in after.items():
        assert entry["step"].item() == before[name]["step"].item() + 1
    config = json.loads((ckpt / "config.json").read_text())
    assert (config["np_rank"], config["num_ranks"], config["modulation"], config["max_steps"]) == (2, 2, "dual", 50000)
    assert ckpt.name == "checkpoint-1"


def test_one_layer_is_trained_and_the_other_stays(run, scene, merged, monkeypatch):
    stopped(monkeypatch, 1)
    done = run(*short(scene, merged, "[2]"))
    resumed, ckpt = done.result["resumed"], Path(done.result["ckpt"])
    assert (resumed["layers_taken"], resumed["layers_kept"], resumed["start_step"]) == ([2], [0], TRAINED_B)
    weights, before = (torch.load(path / "npt_weights.pt", weights_only=True) for path in (ckpt, merged))
    assert list(weights) == list(before)
    for name, tensor in weights.items():
        assert torch.equal(tensor, before[name]) == name.startswith("layer_0_"), name
    own, old = moments(ckpt), moments(merged)
    for name in own:
        changed = 0 if name.startswith("layer_0_") else 1
        assert own[name]["step"].item() == old[name]["step"].item() + changed
    assert torch.load(ckpt / "multi_layer_state.pt", weights_only=True)["layers_to_train"] == [2]

    dropped = run(*short(scene, merged, "[2]", "train.keep_layers=false"))
    assert dropped.result["resumed"]["layers_dropped"] == [0]
    left = torch.load(Path(dropped.result["ckpt"]) / "npt_weights.pt", weights_only=True)
    assert {name.split("_")[1] for name in left} == {"2"}


def test_one_more_layer_starts_anew(run, scene, merged, monkeypatch):
    refused = run(*short(scene, merged, "[0,1,2]"))
    assert refused.code == 2
    assert "has no NPT layers 1" in refused.err
    stopped(monkeypatch, 1)
    done = run(*short(scene, merged, "[0,1,2]", "train.new_layers=true", "train.init=xavier", "train.init_scale=0.01"))
    resumed, ckpt = done.result["resumed"], Path(done.result["ckpt"])
    assert (resumed["layers_taken"], resumed["layers_new"], resumed["start_step"]) == ([0, 2], [1], 0)
    assert resumed["tensors_without_moments"] == 2 * 3 * 2
    entries = moments(ckpt)
    assert {
        name: entry["step"].item() for name, entry in entries.items() if name.startswith("layer_1_")
    } == dict.fromkeys([name for name in entries if name.startswith("layer_1_")], 1.0)
    weights = torch.load(ckpt / "npt_weights.pt", weights_only=True)
    assert weights["layer_1_np.W_a_up_gate.0"].abs().max() <= 0.01 + 1e-4  # after one step of rate 0
    assert any("layers 1 are not in" in text for text in done.result["findings"])


def test_the_schedule_starts_where_it_is_said(run, scene, merged, monkeypatch):
    stopped(monkeypatch, 1)
    done = run(*short(scene, merged, "[0,2]", "train.start_step=100"))
    assert done.result["resumed"]["start_step"] == 100
    assert Path(done.result["ckpt"]).name == "checkpoint-101"


def test_weights_alone_are_gone_on_from_where_a_step_is_given(run, scene, merged, monkeypatch, tmp_path):
    """As after a merge by the original, whose optimizer state is that of one source."""
    import shutil

    copy = shutil.copytree(merged, tmp_path / "copy")
    (copy / "training_state.pt").unlink()
    refused = run(*short(scene, copy, "[0,2]"))
    assert (refused.code, len(refused.err.splitlines())) == (2, 1)
    assert "no training_state.pt to go on from" in refused.err
    stopped(monkeypatch, 1)
    done = run(*short(scene, copy, "[0,2]", "train.start_step=0", "train.np_rank=2"))
    assert done.code == 130
    assert done.result["resumed"]["tensors_with_moments"] == 0

    state = torch.load(merged / "training_state.pt", weights_only=True)
    one = {index: state["optimizer_state_dict"]["state"][index] for index in range(12)}
    state["optimizer_state_dict"] = {"state": one, "param_groups": [{"params": list(range(12)), "lr": 1e-3}]}
    torch.save(state, copy / "training_state.pt")
    again = run(*short(scene, copy, "[0,2]"))
    assert again.code == 130
    assert again.result["resumed"]["tensors_with_moments"] == 0
    assert any(
        "the optimizer's state is for 12 tensors, the weights are 24" in text for text in again.result["findings"]
    )
