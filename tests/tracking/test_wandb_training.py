"""The curves of a training in W&B: rows while it runs, under the names of the original's guide and our own."""

from pathlib import Path

import pytest
from wandb_reader import read_runs

from runner import cli
from tests.conftest import write_base

pytestmark = pytest.mark.slow


def test_the_curves_of_a_training(a_machine_of_its_own: Path) -> None:
    write_base(a_machine_of_its_own / "base")
    text = "\n\n".join(f"The {word} sat on the mat, {word}." for word in "abcdefghijkl" * 9)
    Path("text.txt").write_text(text)
    words = [
        "task=train", "base=base", "data=text", "data.path=text.txt", "train.layers=[0,2]", "train.np_rank=2",
        "train.max_steps=6", "train.warmup_steps=1", "train.sequence_length=16", "train.log_every=2",
        "train.curriculum='teacher:2,student:4'", "train.eval_every=3", "train.eval_fraction=0.3", "train.sample_every=6",
        "train.regularization_weight=0.01", "device=cpu", "tracker.mode=offline",
    ]  # fmt: skip
    assert cli.run(words) == 0
    (run,) = read_runs(a_machine_of_its_own)
    assert run.axes["loss/*"] == run.axes["train/*"] == run.axes["eval_loss/*"] == "train/step"
    rows = run.rows("loss/total", "train/step", "train/loss", "mlp_direct_loss/layer_2", "curriculum/stage_index")
    assert [row[1] for row in rows] == [2, 4, 6]
    assert all(row[0] == row[2] and row[3] > 0 for row in rows)
    assert [row[4] for row in rows] == [0, 1, 1]
    named = set().union(*(row for row in run.history))
    assert named >= {
        "loss/fidelity", "regularization/layer_0", "v_a_norm/layer_0", "v_b_norm/layer_2", "training/learning_rate",
        "training/grad_norm", "training/tokens", "training/tokens_per_second", "curriculum/attention_mixing_ratio",
        "curriculum/mlp_mixing_ratio",
    }  # fmt: skip
    evaluations = run.rows(
        "eval_loss/total", "train/step", "eval_loss/fidelity", "eval_mlp_direct_loss/layer_0", "eval/mse"
    )
    assert [row[1] for row in evaluations] == [3, 6]
    assert all(value > 0 for row in evaluations for value in row)
    assert run.rows("eval/mse", "checkpoint/step")[0][1] == 3
    table = run.table("tables/samples")
    assert table["columns"] == ["ckpt_step", "step", "prompt", "temperature", "text", "base_text"]
    assert len(table["data"]) == 6


def test_a_refused_training_leaves_no_run(a_machine_of_its_own: Path) -> None:
    assert cli.run(["task=train", "base=/no/such/base", "tracker.mode=offline"]) == 2
    assert read_runs(a_machine_of_its_own) == []
