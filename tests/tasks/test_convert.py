"""`task=convert`: there and back gives identical tensors; what comes out computes what went in."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

import runner
from runner.checkpoints.detect import open_checkpoint
from runner.files.staging import verify
from tests.conftest import MIXED, npt_tensors


def tensors_of(path) -> dict[str, torch.Tensor]:
    weights = open_checkpoint(Path(path)).weights
    return {name: weights.read(name).clone() for name in weights.infos}


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def convert(run, ckpt, to: str, output: str, *words: str):
    return run("task=convert", f"ckpt={ckpt}", f"convert.to={to}", f"convert.output={output}", *words)


def test_npt_there_and_back(run, checkpoint, base):
    assert convert(run, checkpoint, "safetensors", "there").code == 0
    assert convert(run, "there", "pt", "back").code == 0
    assert_same(tensors_of("there"), npt_tensors(base, MIXED))
    assert_same(tensors_of("back"), npt_tensors(base, MIXED))
    assert verify(Path("there")) == verify(Path("back")) == []
    assert runner.inspect("there")["step"] == 100
    metrics = [run(f"ckpt={path}").result["metrics"] for path in (checkpoint, "there", "back")]
    assert metrics[0] == metrics[1] == metrics[2]
    assert convert(run, checkpoint, "safetensors", "again").code == 0
    names = ("npt_weights.safetensors", "MANIFEST.json")
    assert [hashlib.sha256((Path("there") / n).read_bytes()).digest() for n in names] == [
        hashlib.sha256((Path("again") / n).read_bytes()).digest() for n in names
    ]


def test_a_relative_base_is_found_from_the_new_place(run, checkpoint, base, workdir):
    (checkpoint / "config.json").write_text(json.dumps({"model_name": "near"}))
    Path(checkpoint / "near").symlink_to(base)
    assert convert(run, checkpoint, "safetensors", "elsewhere/there").code == 0
    assert run("ckpt=elsewhere/there").code == 0


@pytest.mark.parametrize("name", ["small", "medium"])
def test_gpt_there_and_back(name, run, gpts):
    source = gpts(name)
    assert convert(run, source, "safetensors", "there").code == 0
    assert convert(run, "there", "pt", "back").code == 0
    assert_same(tensors_of("there"), tensors_of(source))
    assert_same(tensors_of("back"), tensors_of(source))
    assert runner.inspect("back")["code_sha256"] == runner.inspect(source)["code_sha256"]
    ids = torch.arange(1, 40)[None]
    with torch.inference_mode():
        assert torch.equal(runner.load("there")(ids).logits, runner.load(source)(ids).logits)


def test_vocabulary_cut(run, gpts):
    source = gpts("small")
    assert convert(run, source, "safetensors", "cut", "convert.vocab_size=500").code == 0
    assert runner.inspect("cut")["vocab_size"] == 500
    ids = torch.arange(1, 40)[None]
    with torch.inference_mode():
        torch.testing.assert_close(runner.load("cut")(ids).logits, runner.load(source)(ids).logits[..., :500])
    assert "only padding" in convert(run, source, "safetensors", "more", "convert.vocab_size=300").err


@pytest.mark.parametrize("name", ["single_file", "updated_base", "pytorch_bin", "sharded_no_tokenizer"])
def test_npt_full_taken_apart(name, run, golden):
    source = golden(f"npt_full/{name}")
    assert convert(run, source, "hf", "apart").code == 0
    model, whole = runner.load("apart/adapters"), runner.load(source)
    ids = torch.arange(3, 30)[None]
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, whole(ids).logits, atol=1e-4, rtol=1e-4)
    assert runner.inspect("apart/base")["format"] == "hf"
    assert runner.inspect("apart/adapters")["step"] == runner.inspect(source)["step"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["convert.to=onnx"], "choose safetensors, pt or hf"),
        (["convert.to=hf"], "takes an npt_full apart"),
        (["convert.vocab_size=7"], "belongs to GPT checkpoints"),
        (["convert.output=null"], "convert"),
    ],
)
def test_wrong_wishes(words, message, run, checkpoint):
    outcome = run("task=convert", f"ckpt={checkpoint}", "convert.output=out", *words)
    assert (outcome.code, len(outcome.err.splitlines())) == (2, 1)
    assert message in outcome.err
    assert not Path("out").exists()


def test_output_is_never_an_input_or_lost(run, checkpoint):
    before = {file.name: file.read_bytes() for file in checkpoint.iterdir()}
    assert convert(run, checkpoint, "pt", str(checkpoint)).code == 2
    assert convert(run, checkpoint, "pt", str(checkpoint), "convert.force=true").code == 2
    assert convert(run, checkpoint, "pt", str(checkpoint / "inside")).code == 2
    assert {file.name: file.read_bytes() for file in checkpoint.iterdir()} == before
    assert convert(run, checkpoint, "pt", "out").code == 0
    assert convert(run, checkpoint, "pt", "out").code == 2
    assert convert(run, checkpoint, "safetensors", "out", "convert.force=true").code == 0
    assert Path("out/npt_weights.safetensors").exists()
