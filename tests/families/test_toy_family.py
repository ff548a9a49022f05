"""A family of a user's own: checkpoint.py, model.py and one YAML, and the tasks work on it."""

import pytest
import torch
from safetensors.torch import load_file, save_file

CHECKPOINT = """
from dataclasses import dataclass

from runner.checkpoints.checkpoint import Checkpoint, CheckpointFormat, tensor_readers
from runner.families.family import Family

TABLE = "log_counts"


def weights_file(listing):
    return next((name for name in ("bigram.pt", "bigram.safetensors") if name in listing.entries), None)


def matches(listing):
    name = weights_file(listing)
    return None if name is None else f"{name}: a table of log counts"


def open_bigram(listing):
    weights = listing.weights(weights_file(listing))
    unknown = tuple(set(weights.infos) - {TABLE})
    return Checkpoint(path=listing.path, format="bigram", family="bigram", evidence=matches(listing), weights=weights,
                      unknown=unknown, missing=() if TABLE in weights.infos else (TABLE,))


def describe(checkpoint):
    return {"vocab_size": checkpoint.weights.infos[TABLE].shape[0]}


FORMATS = (
    CheckpointFormat(name="bigram", family="bigram", matches=matches, open=open_bigram, describe=describe),
)


@dataclass(frozen=True, kw_only=True)
class Bigram(Family):
    name: str = "bigram"
    sharpness: float = 1.0

    format_modules = ("bigram.checkpoint",)
    needs_tokenizer = False

    def build(self, checkpoint, base, placement):
        from bigram.model import build

        checkpoint.require_complete()
        return build(checkpoint.weights.read(TABLE) * self.sharpness, placement)

    def convert(self, checkpoint, wanted, target):
        from bigram.model import write

        if wanted.to == "hf":
            return super().convert(checkpoint, wanted, target)
        return lambda directory: {".": write(directory, tensor_readers(checkpoint.weights), wanted.to)}
"""
MODEL = """
from dataclasses import dataclass

import torch
from safetensors.torch import save_file
from torch import nn

from runner.evaluation.placement import torch_device


@dataclass(frozen=True)
class Config:
    vocab_size: int


@dataclass(frozen=True)
class Output:
    logits: torch.Tensor


class BigramModel(nn.Module):
    def __init__(self, table):
        super().__init__()
        self.config = Config(len(table))
        self.table = nn.Parameter(table, requires_grad=False)

    def forward(self, input_ids, attention_mask=None):
        return Output(self.table[input_ids])


def build(table, placement):
    return BigramModel(table).to(torch_device(placement.device)).eval()


def write(directory, read, to):
    tensors = {name: get() for name, get in read.items()}
    save = save_file if to == "safetensors" else torch.save
    save(tensors, directory / f"bigram.{to}")
    return read
"""
YAML = "_target_: bigram.checkpoint.Bigram\nname: bigram\nsharpness: 1.0\n"


@pytest.fixture
def words(tmp_path, monkeypatch):
    """The three files, two checkpoints `one` and `other` of random tables, and what puts the config on the line."""
    (tmp_path / "bigram").mkdir()
    (tmp_path / "bigram" / "__init__.py").touch()
    (tmp_path / "bigram" / "checkpoint.py").write_text(CHECKPOINT)
    (tmp_path / "bigram" / "model.py").write_text(MODEL)
    (tmp_path / "conf" / "family").mkdir(parents=True)
    (tmp_path / "conf" / "family" / "bigram.yaml").write_text(YAML)
    monkeypatch.syspath_prepend(str(tmp_path))
    for seed, name in enumerate(("one", "other")):
        (tmp_path / name).mkdir()
        table = torch.randn(50, 50, generator=torch.Generator().manual_seed(seed))
        save_file({"log_counts": table}, tmp_path / name / "bigram.safetensors")
    return ["--config-dir", str(tmp_path / "conf"), "ckpt=one"]


@pytest.mark.parametrize("chosen", [[], ["family=bigram"]])
def test_diagnose_against_another_one(words, chosen, run):
    outcome = run(*words, *chosen, "reference=other", "tier=full")
    assert outcome.code == 0, outcome.err
    result = outcome.result
    one, other = (load_file(f"{name}/bigram.safetensors")["log_counts"] for name in ("one", "other"))
    ids = torch.tensor(result["generation"][0]["prompt_tokens"])
    assert result["per_prompt"][0]["mse"] == pytest.approx(((one[ids] - other[ids]) ** 2).mean().item(), rel=1e-5)
    assert (result["family"], result["format"]) == ("bigram", "bigram")
    assert result["generation"][0]["tokens"][0] == one[ids[-1]].argmax()
    assert run(*words, *chosen, "reference=one").result["metrics"]["mse"] == 0


def test_its_settings_are_keys_of_the_command_line(words, run):
    assert run(*words, "family=bigram", "family.sharpness=3", "reference=one").result["metrics"]["mse"] > 1
    assert "family.sharp" in (unknown := run(*words, "family=bigram", "family.sharp=3")).err
    assert unknown.code == 2
    assert run(*words, "family=npt").err.count("is of the family bigram") == 1


def test_a_sweep_over_both(words, run):
    outcome = run("-m", *words[:2], "ckpt=one,other", "reference=one")
    assert outcome.code == 0, outcome.err
    assert "one: mse 0.0000" in outcome.out
    assert "other: mse 2.0" in outcome.out


def test_inspect(words, run):
    result = run(*words, "task=inspect").result
    assert (result["family"], result["vocab_size"], result["parameters"]) == ("bigram", 50, 2500)


def test_convert_there_and_back(words, run):
    config, there = words[:2], "convert.to=pt"
    assert run(*words, "task=convert", there, "convert.output=there").code == 0
    assert run(*config, "ckpt=there", "task=convert", "convert.to=safetensors", "convert.output=back").code == 0
    assert torch.equal(*(load_file(f"{name}/bigram.safetensors")["log_counts"] for name in ("one", "back")))
    refused = run(*words, "task=convert", "convert.to=hf", "convert.output=hf")
    assert refused.code == 2
    assert "bigram" in refused.err


def test_what_a_family_lacks_it_says(words, run):
    refused = run(*words, "task=convert", "convert.to=pt", "convert.vocab_size=10", "convert.output=cut")
    assert (refused.code, "belongs to GPT checkpoints" in refused.err) == (2, True)
    refused = run(*words, "family.device_map=auto", "reference=other")
    assert (refused.code, "runs on one device" in refused.err) == (2, True)


def test_without_its_yaml_it_is_unknown(words, run):
    refused = run("ckpt=one", "reference=other")
    assert (refused.code, "any other known format" in refused.err) == (2, True)


def test_the_tiers_of_the_test(words, run):
    """The checks of every model run on it; what only other families have is left out."""
    quick = run(*words, "task=test", "tier=quick")
    assert quick.code == 0, quick.out + quick.err
    full = run(*words, "task=test", "tier=full")
    assert full.code == 0, full.out + full.err
    assert (full.result["family"], full.result["format"]) == ("bigram", "bigram")
    statuses = {row["name"]: row["status"] for row in full.result["checks"]}
    assert {name: statuses.get(name) for name in ("loading", "finite", "model", "forward", "batch")} == dict.fromkeys(
        ("loading", "finite", "model", "forward", "batch"), "pass"
    )
