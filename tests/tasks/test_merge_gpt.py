"""`task=merge` of GPT checkpoints: the mean of one architecture, and what lies on the way between two."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from runner.errors import CheckpointError, ConfigError
from runner.files.staging import verify
from runner.tracking.rows import eval_row, summary
from tests.gpt_files import opened, random_state, script_file
from tests.merge.moe_sources import gathered
from tests.tasks.test_merge import check, merge


@pytest.fixture
def pair(workdir):
    """Two of one architecture, the second further, its names without the compiler's prefix; some weights bfloat16."""
    states = [random_state("small", layers=6, seed=seed) for seed in (1, 2)]
    for state in states:
        state["embed.weight"] = state["embed.weight"].bfloat16()
    for name, step, prefix, state in zip("ab", (300, 500), ("_orig_mod.", ""), states, strict=True):
        script_file(Path(f"{name}.pt"), state, prefix=prefix, step=step, code=f"import {name}\n")
    return states


def written(directory="out"):
    return torch.load(Path(directory) / "model.pt", weights_only=True)


def test_the_mean_of_two(run, pair):
    outcome = run("task=merge", "merge=average", "merge.sources=[a.pt,b.pt]", "merge.output=out")
    assert (outcome.code, outcome.err) == (0, "")
    result, content = outcome.result, written()
    assert (result["format"], result["family"], result["step"]) == ("gpt_small", "gpt", 500)
    assert result["verification"] == {"structure": "pass", "bytes": "pass", "functional": "skipped"}
    assert result["found_layers"] == [0, 1, 2, 3, 4, 5]
    assert (content["step"], content["code"]) == (500, "import b\n")
    assert set(content) == {"step", "code", "model"}
    first, second = pair
    assert set(content["model"]) == set(first)
    for name, tensor in content["model"].items():
        expected = ((first[name].double() + second[name].double()) / 2).to(first[name].dtype)
        assert tensor.dtype == first[name].dtype
        assert torch.equal(tensor, expected), name
    said = "computed in float64 and rounded to the dtypes in which the weights are stored: bfloat16, float32"
    assert said in result["findings"]
    assert "the sources carry different training scripts; that of the furthest is kept" in result["findings"]
    assert verify(Path("out")) == []
    assert opened(Path("out"), "small").step == 500
    summed = json.loads(Path("out/merge_summary.json").read_text())
    rows = [(row["source"], row["weight"], row["step"], row["val_loss"]) for row in summed["averaged"]]
    assert rows == [("a.pt", 0.5, 300, 3.25), ("b.pt", 0.5, 500, 3.25)]
    assert set(summed["sha256"]) == {"a.pt", "b.pt"}
    shown = summary(result)
    assert (shown["merge/layers"], shown["merge/sources"]) == ([0, 1, 2, 3, 4, 5], ["a.pt", "b.pt"])


def test_shares_and_a_third(run, pair):
    script_file(Path("c.pt"), pair[0])
    sources = "[{path: a.pt, weight: 2},{path: b.pt, weight: 1},c.pt]"
    outcome = run(
        "task=merge", "merge=average", f"merge.sources={sources}", "merge.output=out", "merge.format=safetensors"
    )
    assert outcome.code == 0, outcome.err
    found = load_file("out/model.safetensors")
    for name, tensor in found.items():
        mean = (0.75 * pair[0][name].double() + 0.25 * pair[1][name].double()).to(tensor.dtype)
        torch.testing.assert_close(tensor, mean, rtol=1e-6 if tensor.dtype == torch.float32 else 1e-2, atol=1e-6)
    assert run("task=verify", "ckpt=out").result["step"] == 500
    recipe = json.loads(Path("out/MANIFEST.json").read_text())["recipe"]
    assert recipe["sources"][0] == {"path": "a.pt", "weight": 2.0}
    check(merge(run, "{path: a.pt, weight: 2}", "b.pt", output="other"), "weight is a source's share of an average")
    check(merge(run, "{path: a.pt, weight: 0}", "b.pt", output="other"), "give a number above 0")


@pytest.mark.parametrize("rule", ["linear", "slerp"])
def test_between_two(rule, run, pair):
    outcome = run("task=merge", f"merge={rule}", "merge.sources=[a.pt,b.pt]", "merge.output=out", "merge.t=0.25")
    assert outcome.result["how"] == rule
    found = written()["model"]
    for name, tensor in found.items():
        a, b = pair[0][name].double().flatten(), pair[1][name].double().flatten()
        weights = (0.75, 0.25)
        cosine = (a @ b / (a.norm() * b.norm())).clamp(-1, 1)
        if rule == "slerp" and abs(cosine) < 0.9995:
            angle = torch.arccos(cosine)
            weights = (torch.sin(0.75 * angle) / torch.sin(angle), torch.sin(0.25 * angle) / torch.sin(angle))
        expected = (weights[0] * a + weights[1] * b).to(tensor.dtype).reshape(tensor.shape)
        torch.testing.assert_close(tensor, expected, rtol=1e-2 if tensor.dtype == torch.bfloat16 else 1e-5, atol=1e-6)


@pytest.mark.parametrize("dialect", ["small", "medium"])
def test_the_mean_of_a_checkpoint_with_itself_is_itself(dialect, run, gpts):
    (file,) = gpts(dialect).glob("*val*.pt")
    shutil.copyfile(file, "copy.pt")
    outcome = merge(run, file, "copy.pt", verify="functional")
    assert outcome.code == 0, outcome.err
    result = outcome.result
    assert result["verification"] == dict.fromkeys(("structure", "bytes", "functional"), "pass")
    assert (result["metrics"]["mse"], result["reference"]) == (0.0, str(file))
    assert {"eval/mse", "checkpoint/step"} <= set(eval_row(result, result["step"]))
    source = opened(file, dialect)
    found = written()["model"]
    assert set(found) == set(source.details.keys)
    assert all(torch.equal(found[name], source.weights.read(name)) for name in found)
    assert any("they are averaged (merge=average)" in finding for finding in result["findings"])


def infinite(state):
    state["lm_head.weight"][3, 5] = float("inf")


def test_dtypes_that_differ_are_said(run, pair):
    state = {name: tensor.float() for name, tensor in pair[1].items()}
    script_file(Path("c.pt"), state)
    outcome = run("task=merge", "merge=average", "merge.sources=[a.pt,c.pt]", "merge.output=out")
    assert "some weights are stored as bfloat16 and float32: written as float32" in outcome.result["findings"]
    assert written()["model"]["embed.weight"].dtype == torch.float32


def test_scalars_padded_for_other_numbers_of_processes(run, pair):
    """The padding belongs to the training, not to the architecture."""
    state = random_state("small", layers=6, scalar_padding=4, seed=3)
    script_file(Path("c.pt"), state)
    outcome = run("task=merge", "merge=average", "merge.sources=[a.pt,c.pt]", "merge.output=out")
    assert "scalars are padded to 30 and 34 values: they are written without padding" in outcome.result["findings"]
    expected = (pair[0]["scalars"].double() + state["scalars"][:30].double()) / 2
    assert torch.equal(written()["model"]["scalars"], expected.float())


REFUSED = {
    "depth": (
        ["a.pt", "deep.pt"],
        {},
        "a.pt has num_layers 6, deep.pt num_layers 8: only",
    ),
    "vocabulary": (["a.pt", "wide.pt"], {}, "a.pt has vocab_size 24, head_rows 24, wide.pt vocab_size 32"),
    "the same twice": (["a.pt", "./a.pt"], {}, "a.pt is given twice"),
    "one alone": (["a.pt"], {}, "give two sources or more"),
    "t": (["a.pt", "b.pt"], {"rule": "slerp", "t": 2}, "merge.t=2: give a number from 0"),
    "three on an arc": (["a.pt", "b.pt", "deep.pt"], {"rule": "slerp"}, "give two sources, not 3"),
    "no conflict allowed": (["a.pt", "b.pt"], {"on_conflict": "error"}, "all layers in common; choose merge=average"),
    "layers of one": (["a.pt", {"path": "b.pt", "layers": [1]}], {}, "b.pt: a GPT checkpoint is averaged as a whole"),
    "layers of all": (["a.pt", "b.pt"], {"layers": [1]}, "are for NPT layers"),
}


def test_refusals(run, pair):
    script_file(Path("deep.pt"), random_state("small", layers=8))
    script_file(Path("wide.pt"), random_state("small", layers=6, vocab=32))
    script_file(Path("medium.pt"), random_state("medium"))
    infinite(pair[1])
    script_file(Path("inf.pt"), pair[1])
    shutil.copyfile("a.pt", "flipped.pt")
    raw = bytearray(Path("flipped.pt").read_bytes())
    raw[raw.index(pair[0]["lm_head.weight"].numpy().tobytes()) + 9] ^= 1
    Path("flipped.pt").write_bytes(raw)
    before = sorted(path.name for path in Path().iterdir())
    for case, (sources, options, message) in REFUSED.items():
        with pytest.raises((CheckpointError, ConfigError), match=message) as error:
            gathered(sources, **options)
        assert "\n" not in str(error.value), case
    for other, message in {
        "medium.pt": "a.pt is gpt_small, medium.pt gpt_medium: they compute different functions",
        "inf.pt": "lm_head.weight.*: NaN or Inf; such weights are not merged",
        "flipped.pt": "flipped.pt: record .* is damaged: its CRC",
    }.items():
        check(merge(run, "a.pt", other), message)
        assert sorted(path.name for path in Path().iterdir() if path.name != "outputs") == before


def test_another_byte_is_found(run, pair, monkeypatch):
    """One element of what is computed for the file differs from what is computed for the comparison."""
    from runner.merge import writer

    original = writer.write_torch_file

    def wrong(sink, folder, value):
        from runner.merge.lazy_tensor import LazyTensor

        piece = value["model"]["scalars"]
        other = LazyTensor(
            origin="", dtype_name=piece.dtype_name, shape=piece.shape, parts=lambda: (p + 1e-3 for p in piece.parts())
        )
        original(sink, folder, {**value, "model": {**value["model"], "scalars": other}})

    monkeypatch.setattr(writer, "write_torch_file", wrong)
    outcome = merge(run, "a.pt", "b.pt")
    assert outcome.code == 1
    assert re.search(r"model.pt: verification failed: model.scalars", outcome.err), outcome.err
    assert not Path("out").exists()
