"""A written merge is held against its sources: any other byte of any tensor, name, order or value is found."""

import pytest
import torch

from runner.errors import CheckpointError, RunnerError
from runner.families.npt.checkpoint import MERGE_SUMMARY
from runner.files.staging import read_back
from runner.merge.spec import MergeSpec
from runner.merge.verify import check_structure, comparisons
from runner.merge.writer import write_json_files, write_tensors
from runner.tasks.merge import plan
from tests.merge.sources import ONE, THREE, state_of, weights_in, write_source


@pytest.fixture
def written(tmp_path):
    """A directory as a merge writes it, and what it was written from."""
    a, b = write_source(tmp_path / "a", ONE), write_source(tmp_path / "b", THREE, seed=1)
    content = plan(MergeSpec(name="x", sources=[str(a), str(b)]), [a, b], None, tmp_path / "out")[1]
    out = tmp_path / "out"
    out.mkdir()
    assert write_tensors(out, content.tensor_files) == []
    write_json_files(out, {**content.texts, MERGE_SUMMARY: content.summary})
    return out, content


def check_bytes(out, content):
    for name, comparison in comparisons(out, content.tensor_files).items():
        read_back(out / name, comparison)


def change_weights(out, change):
    weights = weights_in(out)
    changed = change(weights)
    weights = changed if isinstance(changed, dict) else weights
    torch.save(weights, out / "npt_weights.pt")


def test_sound_output_passes(written):
    out, content = written
    assert content.read_back(check_structure(out, content))[0] == {"found_layers": [1, 3]}
    check_bytes(out, content)


@pytest.mark.parametrize("name", ["layer_1_np.W_down_gate.0", "layer_3_np.W_b_up_down.2"])
@pytest.mark.parametrize(
    "change", [lambda t: t.view(torch.uint8)[-1, -1:].bitwise_xor_(1), lambda t: t.mul_(-1), lambda t: t.zero_()]
)
def test_another_value_is_found(name, change, written):
    out, content = written
    change_weights(out, lambda weights: change(weights[name]))
    with pytest.raises(RunnerError, match=f"npt_weights.pt: verification failed: {name}"):
        check_bytes(out, content)


def test_the_sign_of_zero_is_a_difference(tmp_path):
    a = write_source(
        tmp_path / "a",
        ONE,
        weights={
            f"layer_1_np.{m}": torch.zeros(s) for m, s in (("W_down", (4, 1)), ("W_a_up", (1, 4)), ("W_b_up", (1, 6)))
        },
        trained=0,
    )
    content = plan(MergeSpec(name="x", sources=[str(a)]), [a], None, tmp_path / "out")[1]
    (tmp_path / "out").mkdir()
    write_tensors(tmp_path / "out", content.tensor_files)
    write_json_files(tmp_path / "out", {**content.texts, MERGE_SUMMARY: {}})
    change_weights(tmp_path / "out", lambda weights: {name: -t for name, t in weights.items()})
    with pytest.raises(RunnerError, match="verification failed"):
        check_bytes(tmp_path / "out", content)


STRUCTURES = {
    "a missing key": lambda w: w.pop("layer_1_np.W_down_gate.2"),
    "another layer": lambda w: {name.replace("_3_", "_2_"): t for name, t in w.items()},
    "another dtype": lambda w: {name: t.bfloat16() for name, t in w.items()},
    "another order": lambda w: dict(reversed(w.items())),
    "a layer too many": lambda w: {**w, **{n.replace("_3_", "_7_"): t for n, t in w.items() if "_3_" in n}},
}


@pytest.mark.parametrize("case", STRUCTURES)
def test_another_structure_is_found(case, written):
    out, content = written
    change_weights(out, STRUCTURES[case])
    with pytest.raises((RunnerError, CheckpointError)):
        check_structure(out, content)


STATES = {
    "a moment": lambda s: s["optimizer_state_dict"]["state"][30]["exp_avg"].view(-1)[0].add_(1),
    "a step": lambda s: s["optimizer_state_dict"]["state"][3]["step"].add_(1),
    "swapped": lambda s: s["optimizer_state_dict"]["state"].update({0: s["optimizer_state_dict"]["state"][1], 1: s["optimizer_state_dict"]["state"][0]}),
    "a setting": lambda s: s["optimizer_state_dict"]["param_groups"][0].update(lr=1e-2),
    "the order": lambda s: s["optimizer_state_dict"]["param_groups"][0]["params"].reverse(),
    "the global step": lambda s: s.update(global_step=1),
    "a key more": lambda s: s.update(more=1),
    "a list": lambda s: s["scheduler_state_dict"].update(base_lrs=(1e-3,)),
    "merge info": lambda s: s["merge_info"]["merged_layers"].append(5),
}  # fmt: skip


@pytest.mark.parametrize("case", STATES)
def test_another_training_state_is_found(case, written):
    out, content = written
    state = state_of(out)
    STATES[case](state)
    torch.save(state, out / "training_state.pt")
    with pytest.raises(RunnerError, match=r"training_state.pt: verification failed"):
        check_bytes(out, content)
