"""A format of a user's own: one module and one YAML, and everything works on it."""

import pytest
import torch

from tests.conftest import npt_tensors

MODULE = """
from runner.checkpoints.checkpoint import Checkpoint, CheckpointFormat, Listing, NptLayer

FILE = "toy.pt"

def matches(listing: Listing):
    return "toy.pt is there" if FILE in listing.entries else None

def open_toy(listing: Listing):
    weights = listing.weights(FILE)
    (r, d), f = weights.infos["down"].shape[::-1], weights.infos["b"].shape[1]
    keys = {"gate": {"W_down": ("down",), "W_a_up": ("a",), "W_b_up": ("b",)}}
    layer = NptLayer(layer=1, modulation="single", np_rank=r, num_ranks=1, hidden_size=d, intermediate_size=f,
                     parameters=sum(i.numel for i in weights.infos.values()), keys=keys)
    unknown = tuple(set(weights.infos) - {"down", "a", "b"})
    return Checkpoint(path=listing.path, format="toy", family="npt", evidence="toy.pt", weights=weights, layers=(layer,),
                      unknown=unknown, step=7)

FORMATS = (CheckpointFormat(name="toy", family="npt", matches=matches, open=open_toy, describe=lambda c: {"toy": True}),)
"""
YAML = "_target_: runner.config.Format\nname: toy\nmodule: toy_format\n"


@pytest.fixture
def toy(tmp_path, monkeypatch, base):
    """A module on the path, a YAML in a config directory, a checkpoint."""
    (tmp_path / "toy_format.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "conf" / "format").mkdir(parents=True)
    (tmp_path / "conf" / "format" / "toy.yaml").write_text(YAML)
    tensors = npt_tensors(base, {1: ("single", 3, 1)})
    (tmp_path / "ckpt").mkdir()
    names = {"down": "layer_1_np.W_down", "a": "layer_1_np.W_a_up", "b": "layer_1_np.W_b_up"}
    torch.save({new: tensors[old] for new, old in names.items()}, tmp_path / "ckpt" / "toy.pt")
    torch.save(tensors, tmp_path / "plain.pt")
    return tmp_path


def test_a_format_of_ones_own(toy, run, base):
    words = ["--config-dir", str(toy / "conf"), "format=toy", f"ckpt={toy / 'ckpt'}"]
    outcome = run(*words, f"base={base}")
    assert outcome.code == 0, outcome.err
    result = outcome.result
    assert (result["format"], result["step"]) == ("toy", 7)
    assert result["metrics"] == run(f"ckpt={toy / 'plain.pt'}", f"base={base}").result["metrics"]
    assert run(*words, "task=inspect").result["toy"] is True


def test_without_its_yaml_it_is_unknown(toy, run, base):
    outcome = run(f"ckpt={toy / 'ckpt'}", "format=toy", f"base={base}")
    assert outcome.code == 2
    assert "format=toy is no format" in outcome.err
