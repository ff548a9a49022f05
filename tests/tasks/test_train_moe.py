"""`task=train family=lora_moe` from the command line, on a tiny base."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from runner.config import TrainConfig
from runner.data.text import Data
from runner.families.lora_moe import LoraMoe, MoeTrainSettings
from runner.tasks import train
from runner.tasks.context import Context

TINY = ("train.max_steps=12", "train.save_every=6", "train.warmup_steps=2", "train.lora_r=2", "train.batch_size=4")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "colours.txt"
    path.write_text("A banana is yellow.\n\n" + "\n\n".join(f"The sky is blue, {i} times." for i in range(6)))
    return path


def words(base, text, *more):
    return ("task=train", "family=lora_moe", f"base={base}", "data=text", f"data.path={text}", *TINY, *more)


def test_what_it_leaves_opens_in_every_task(run, base, text):
    done = run(*words(base, text, "train.experts=3", "family.top_k=2"))
    assert (done.code, done.err) == (0, "")
    result = done.result
    assert (result["family"], result["format"], result["step"]) == ("lora_moe", "lora_moe", 12)
    assert result["skills"] == [{"name": "colours", "similarity": None, "is_new": True}]
    directory = Path(result["ckpt"]).parent
    assert result["checkpoints"] == [str(directory / f"checkpoint-{step}") for step in (6, 12)]
    assert sorted(result["metrics"])[:2] == ["balance", "cross_entropy"]
    merged = [file.name for file in directory.rglob("*") if file.name.startswith(("model", "pytorch_model"))]
    assert merged == []
    assert not list(directory.glob(".trainer*"))

    assert run("task=inspect", f"ckpt={directory}/checkpoint-12").code == 0
    known = json.loads(max(Path("outputs").rglob("result.json"), key=lambda p: p.stat().st_mtime_ns).read_text())
    assert (known["experts"], known["top_k"], known["layout"]) == (3, 2, "nested")
    assert (known["skills"]["ids"], known["pollution"]) == (["colours"], [])
    assert known["training"]["global_step"] == 12
    assert run("task=verify", f"ckpt={directory}/checkpoint-12").code == 0
    measured = run("task=diagnose", f"ckpt={directory}/checkpoint-12")
    assert measured.code == 0
    assert measured.result["metrics"]["mse"] > 0

    given = [word for word in words(base, text) if not word.startswith("base=")]  # its own base is the default
    again = run(*given, "train.experts=3", f"train.resume_from={directory}", "train.max_steps=14")
    assert again.code == 0
    assert [Path(path).name for path in again.result["checkpoints"]] == ["checkpoint-14"]
    assert again.result["skills"][0]["is_new"] is False
    assert again.result["findings"] == [
        "train.resume_from: goes on with max_steps 14 after 12: not what one uninterrupted training would have given"
    ]
    config = json.loads((Path(again.result["ckpt"]) / "config.json").read_text())
    assert (config["top_k"], config["num_experts"]) == (2, 3)


REFUSED = {
    "family=gpt": (["family=gpt"], "family=gpt cannot be trained; choose lora_moe or npt"),
    "family=auto": (["family=auto"], "family=auto cannot be trained"),
    "a key of the other family": (["train.experts=2"], "train.experts belongs to another family than the one chosen"),
    "the other way round": (["family=lora_moe", "train.layers=[1]"], "train.layers belongs to another family"),
    "train beside family": (["train=lora_moe"], "family=npt and train=lora_moe contradict each other"),
    "an unknown key": (["family=lora_moe", "train.expert=2"], "did you mean 'train.experts'?"),
    "experts in words": (["family=lora_moe", "train.experts=two"], "must be a whole number, at least 1, or auto"),
    "too many experts a token": (["family=lora_moe", "family.top_k=3"], "family.top_k=3: with train.experts=2"),
    "other features": (["family=lora_moe", "family.router_features=base"], "a checkpoint does not record them"),
    "no experts": (["family=lora_moe", "family.experts=false"], "a checkpoint does not record them"),
    "no text": (["family=lora_moe", "data=prompts"], "data=prompts has no text to train on"),
    "no such checkpoint": (["family=lora_moe", "train.resume_from=nowhere"], "nowhere: no such file or directory"),
    "a wrong number": (["family=lora_moe", "train.lora_r=0"], "train.lora_r=0: must be a whole number"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(run, base, case):
    given, message = REFUSED[case]
    done = run("task=train", f"base={base}", *given)
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert message in done.err


def test_another_kind_of_checkpoint_is_not_gone_on_from(run, base, checkpoint):
    done = run("task=train", "family=lora_moe", f"base={base}", f"train.resume_from={checkpoint}")
    assert done.code == 2
    assert len(done.err.splitlines()) == 1


def test_the_tracker_hears_of_it_while_it_runs(base, text, tmp_path):
    rows, seen = [], []

    def log(row):
        rows.append(row)
        seen.append((tmp_path / "run" / "checkpoint-12").exists())

    config = TrainConfig(
        task="train", base=str(base), family=LoraMoe(),
        data=Data(name="text", prompts=("a",), layer_prompt="a", path=str(text)),
        train=MoeTrainSettings(lora_r=2, max_steps=12, save_every=12, warmup_steps=1, batch_size=4),
    )  # fmt: skip
    torch.manual_seed(9)
    expected = torch.rand(3)
    torch.manual_seed(9)
    result = train.run(config, Context(directory=tmp_path / "run", tracker=SimpleNamespace(log=log), quiet=True))
    assert [row["train/step"] for row in rows] == [10, 12]
    assert seen == [False, False]
    assert rows[-1]["train/loss"] == result.metrics["loss"]
    assert torch.equal(torch.rand(3), expected)
