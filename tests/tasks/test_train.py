"""The page of `task=train`, on the tiny demonstration's base."""

from types import SimpleNamespace

import pytest
import torch

from runner import load
from runner.config import TrainConfig
from runner.data.text import Data
from runner.errors import ConfigError, ModelError
from runner.families.npt import Npt, TrainSettings
from runner.families.npt.demo import make_demo
from runner.tasks import train
from runner.tasks.context import Context
from tests.training.test_demo import SETTINGS


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_demo(tmp_path_factory.mktemp("demo"), settings=SETTINGS) / "base"


@pytest.fixture
def rows():
    return []


@pytest.fixture
def context(tmp_path, rows):
    return Context(directory=tmp_path / "run", tracker=SimpleNamespace(log=rows.append), quiet=True)


def config(base, data="world", path=None, **train_values):
    values = {"layers": [0, 2], "np_rank": 2, "max_steps": 24, "save_every": 12, "warmup_steps": 2, **train_values}
    return TrainConfig(
        task="train",
        base=str(base),
        family=Npt(),
        data=Data(name=data, prompts=("a",), layer_prompt="a", path=path),
        train=TrainSettings(**values),
    )


def test_it_leaves_checkpoints_that_open_and_logs_what_it_does(base, context, rows):
    result = train.run(config(base), context)
    paths = [context.directory / f"checkpoint-{step}" for step in (12, 24)]
    assert result.details["checkpoints"] == [str(path) for path in paths]
    assert (result.status, result.step, result.ckpt) == ("ok", 24, str(paths[1]))
    assert set(result.metrics) == {"loss", "logits", "gradient_norm", "layer_0", "layer_2"}
    assert [row["train/step"] for row in rows] == [10, 20, 24]
    assert rows[-1]["train/loss"] == result.metrics["loss"]
    ids = torch.tensor([[1, 7, 8]])
    models = [load(path, device="cpu") for path in paths]
    assert set(models[0].npt_layers) == {0, 2}
    assert not torch.equal(models[0](ids).logits, models[1](ids).logits)


def test_it_goes_on_from_the_last_checkpoint_of_a_run(base, context, tmp_path):
    train.run(config(base), context)
    elsewhere = Context(directory=tmp_path / "more", tracker=context.tracker, quiet=True)
    result = train.run(config(base, resume_from=str(context.directory), max_steps=36), elsewhere)
    assert result.details["checkpoints"] == [str(tmp_path / "more" / "checkpoint-36")]


def test_it_trains_on_a_text_file(base, context, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The capital of France is Paris.\n\nOne line.\n\n" + "Many words in a row. " * 50)
    result = train.run(config(base, data="text", path=str(text), sequence_length=16), context)
    assert result.status == "ok"


def test_data_without_text_is_refused(base, context):
    with pytest.raises(ConfigError, match="data=prompts has no text to train on"):
        train.run(config(base, data="prompts"), context)


def test_a_layer_beyond_the_base_is_refused(base, context):
    with pytest.raises(ModelError, match="layers 0 to 2, not 7"):
        train.run(config(base, layers=[7]), context)
    assert not context.directory.exists()
