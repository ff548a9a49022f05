"""Training into a run directory, and going on from one of its checkpoints through the files."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from runner.errors import CheckpointError, ConfigError, DivergedError
from runner.evaluation.base_models import load_base
from runner.evaluation.placement import Placement
from runner.families.npt import EquivalenceSettings
from runner.families.npt import training as equivalence
from runner.families.npt.training import train_run
from runner.files.staging import verify


@pytest.fixture
def saved_base(their_base, tmp_path):
    their_base.save_pretrained(tmp_path / "base")
    return load_base(None, tmp_path / "base", Placement(device="cpu"), llama=True)


def trained(directory: Path, base, batches, settings, **options) -> list[Path]:
    return train_run(directory, base, batches, settings, base_name="../../base", **options)[1]


def changed(settings: EquivalenceSettings, **values) -> EquivalenceSettings:
    return EquivalenceSettings(**{**vars(settings), **values})


def test_going_on_from_the_files_gives_the_same_files(saved_base, batches, settings, tmp_path):
    whole = trained(tmp_path / "whole", saved_base, batches, settings)
    assert [path.name for path in whole] == ["checkpoint-10", "checkpoint-20"]
    assert all(verify(path) == [] for path in whole)
    (resumed,) = trained(tmp_path / "resumed", saved_base, batches, settings, resume_from=whole[0])
    for file in ("npt_weights.pt", "training_state.pt", "multi_layer_state.pt", "config.json"):
        one, other = (hashlib.sha256((path / file).read_bytes()).hexdigest() for path in (whole[1], resumed))
        assert one == other, file


def test_the_config_names_the_base_and_the_settings(saved_base, batches, settings, tmp_path):
    *_, last = trained(tmp_path / "run", saved_base, batches, settings)
    config = json.loads((last / "config.json").read_text())
    assert config["model_name"] == "../../base"
    assert (config["batch_size"], config["max_steps"], config["learning_rate"]) == (2, 20, settings.learning_rate)


@pytest.mark.parametrize("value", [float("nan"), 1e30])
def test_weights_that_are_not_finite_or_give_no_finite_loss_are_not_saved(
    saved_base, batches, settings, tmp_path, value, monkeypatch
):
    """The loss of a step is that of the weights before it: the last step's own have never been run."""
    trained_parameters = []
    prepare = equivalence.optimizer_and_schedule

    def remember(parameters, *rest):
        trained_parameters.extend(parameters)
        return prepare(parameters, *rest)

    @torch.no_grad()
    def spoil(step, losses):
        if step == 20:
            for parameter in trained_parameters:
                parameter.fill_(value)

    monkeypatch.setattr(equivalence, "optimizer_and_schedule", remember)
    with pytest.raises(DivergedError) as raised:
        trained(tmp_path / "run", saved_base, batches, settings, on_step=spoil)
    assert raised.value.exit_code == 1
    assert str(raised.value).endswith(f"the last good checkpoint is {tmp_path / 'run' / 'checkpoint-10'}")
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["checkpoint-10"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layers": (0, 1)}, "must be the same"),
        ({"np_rank": 4}, "must be the same"),
        ({"modulation": "dual"}, "must be the same"),
        ({"max_steps": 10}, "at step 10 already"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(saved_base, batches, settings, tmp_path, values, message):
    first, _ = trained(tmp_path / "run", saved_base, batches, settings)
    with pytest.raises(ConfigError, match=message):
        trained(tmp_path / "other", saved_base, batches, changed(settings, **values), resume_from=first)
    assert not (tmp_path / "other").exists()


def test_a_checkpoint_without_a_state_is_refused(saved_base, batches, settings, tmp_path):
    first, _ = trained(tmp_path / "run", saved_base, batches, settings)
    (first / "training_state.pt").unlink()
    with pytest.raises(CheckpointError, match=r"no training_state\.pt to go on from"):
        trained(tmp_path / "other", saved_base, batches, settings, resume_from=first)
    torch.save({"global_step": 10, "optimizer_state_dict": None}, first / "training_state.pt")
    with pytest.raises(CheckpointError, match="not all of them are there"):
        trained(tmp_path / "other", saved_base, batches, settings, resume_from=first)


def test_more_steps_than_planned_go_on_with_the_new_plan(saved_base, batches, settings, tmp_path):
    first, _ = trained(tmp_path / "run", saved_base, batches, settings)
    moved = shutil.copytree(first, tmp_path / "elsewhere" / "checkpoint-10")
    longer = changed(settings, max_steps=30)
    paths = trained(tmp_path / "longer", saved_base, batches, longer, resume_from=moved)
    assert [path.name for path in paths] == ["checkpoint-20", "checkpoint-30"]
