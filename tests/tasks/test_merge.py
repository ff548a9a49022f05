"""`task=merge` from the command line to a checkpoint that every other task reads."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from runner.files.staging import verify
from runner.tracking.rows import eval_row, summary
from tests.conftest import golden_numbers, npt_tensors, write_npt
from tests.merge.sources import (
    ONE,
    THREE,
    same,
    second_spelling,
    state_of,
    weights_in,
    weights_of,
    write_source,
)


@pytest.fixture
def pair(workdir):
    """Two trainings of one layer each, in the current directory."""
    return write_source(Path("a/checkpoint-100"), ONE), write_source(Path("b"), THREE, seed=1, step=300)


def merge(run, *sources, output="out", **options):
    words = [f"merge.{key}={value}" for key, value in options.items()]
    return run("task=merge", f"merge.sources=[{','.join(map(str, sources))}]", f"merge.output={output}", *words)


def test_two_layers_become_one_checkpoint(run, pair):
    outcome = merge(run, "a", "b")
    assert (outcome.code, outcome.err) == (0, "")
    result = outcome.result
    assert (result["task"], result["status"], result["step"]) == ("merge", "ok", 300)
    assert result["expected_layers"] == result["found_layers"] == [1, 3]
    assert (result["keys"], result["parameters"]) == (54, sum(t.numel() for t in weights_in(Path("out")).values()))
    assert result["sources"] == {"1": "a/checkpoint-100", "3": "b"}
    assert result["conflicts"] == []
    assert result["verification"] == {"structure": "pass", "bytes": "pass", "functional": "skipped"}
    for line in ("Expected Layers: [1, 3]", "Found Layers: [1, 3]", "Keys: 54 of"):
        assert sum(text.startswith(line) for text in outcome.out.splitlines()) == 1
    assert verify(Path("out")) == []
    weights = weights_in(Path("out"))
    assert list(weights) == [*weights_in(pair[0]), *weights_in(pair[1])]
    assert all(torch.equal(weights[name], t) for source in pair for name, t in weights_in(source).items())


def test_what_lies_beside_the_weights(run, pair):
    merge(run, "a", "b")
    state, multi = state_of(Path("out")), torch.load("out/multi_layer_state.pt", weights_only=True)
    info = {
        "merged_from": ["a/checkpoint-100", "b"],
        "merged_layers": [1, 3],
        "layer_sources": {1: "a/checkpoint-100", 3: "b"},
        "layer_steps": {1: 100, 3: 300},
    }
    assert (state["global_step"], state["batch_count"], state["merge_info"]) == (300, 600, info)
    assert state["scheduler_state_dict"]["last_epoch"] == 300
    assert (multi["layers_to_train"], multi["layer_weights"]) == ([1, 3], {1: 1.0, 3: 2.0})
    config = json.loads(Path("out/config.json").read_text())
    assert (config["seed"], config["learning_rate"]) == (0, 1e-3)
    assert config["merge_info"] == json.loads(json.dumps(info))
    summed = json.loads(Path("out/merge_summary.json").read_text())
    assert (summed["merged_layers"], summed["checkpoint_keys"], summed["global_step"]) == ([1, 3], 54, 300)
    assert summed["layer_sources"] == {"1": "a/checkpoint-100", "3": "b"}
    assert set(summed["sha256"]) >= {"a/checkpoint-100/npt_weights.pt", "b/training_state.pt", "b/config.json"}
    manifest = json.loads(Path("out/MANIFEST.json").read_text())
    assert manifest["inputs"] == summed["sha256"]
    assert manifest["recipe"]["sources"] == [{"path": "a"}, {"path": "b"}]


def test_the_joint_figures_of_the_golden_layers(run, golden):
    """The two layers of which each was trained alone, together: the figures of the program that defined the format."""
    names = ["triple_rank8_layer1", "triple_rank8_layer3"]
    outcome = merge(run, *(golden(f"npt/{name}") for name in names), verify="functional")
    expected = golden_numbers("npt")["_merged"]
    result = outcome.result
    assert result["verification"] == dict.fromkeys(("structure", "bytes", "functional"), "pass")
    assert result["metrics"]["mse"] == pytest.approx(expected["avg_mse"], rel=1e-4)
    assert result["metrics"]["cosine"] == pytest.approx(expected["avg_cosine"], abs=1e-5)
    assert [row["mse"] for row in result["per_prompt"]] == pytest.approx(expected["mse"], rel=1e-4)
    assert "MSE Loss: 2.633901" in outcome.out
    assert run("ckpt=out").result["metrics"] == result["metrics"]
    assert summary(result)["merge/layers"] == [1, 3]
    assert {"eval/mse", "checkpoint/step"} <= set(eval_row(result, result["step"]))


def test_the_order_of_sources_does_not_change_the_weights(run, pair):
    merge(run, "a", "b", output="ab")
    merge(run, "b", "a", output="ba")
    assert Path("ab/npt_weights.pt").read_bytes() == Path("ba/npt_weights.pt").read_bytes()
    for name in ("optimizer_state_dict", "scheduler_state_dict", "global_step"):
        assert same(state_of(Path("ab"))[name], state_of(Path("ba"))[name])


def test_the_same_recipe_gives_the_same_bytes(run, pair):
    merge(run, "a", "b", output="one/x")
    merge(run, "a", "b", output="two/x")
    for file in Path("one/x").iterdir():
        assert file.read_bytes() == (Path("two/x") / file.name).read_bytes(), file.name


@pytest.mark.parametrize("form", ["pt", "safetensors"])
def test_merging_in_two_steps_is_merging_at_once(form, run, pair):
    write_source(Path("c"), {2: ("dual", 3, 1), 5: ("single", 2, 2)}, seed=2, step=200)
    merge(run, "a", "b", "c", output="once", format=form)
    merge(run, "a", "b", output="first", format=form)
    merge(run, "first", "c", output="then", format=form)
    name = f"npt_weights.{form}"
    assert Path("then", name).read_bytes() == Path("once", name).read_bytes()
    assert same(state_of(Path("then")), state_of(Path("once")))
    assert Path("then/multi_layer_state.pt").read_bytes() == Path("once/multi_layer_state.pt").read_bytes()
    assert Path("then/config.json").read_bytes() == Path("once/config.json").read_bytes()


def test_an_identical_duplicate_merges_to_itself_with_a_warning(run, pair):
    shutil.copytree("b", "copy")
    outcome = merge(run, "b", "copy")
    assert outcome.code == 0
    assert "layer 3 is in b and copy: that of b is taken (merge.on_conflict=first)" in outcome.result["findings"]
    assert outcome.result["conflicts"][0]["sources"] == ["b", "copy"]
    assert same(weights_in(Path("out")), weights_in(Path("b")))
    assert same(state_of(Path("out"))["optimizer_state_dict"], state_of(Path("b"))["optimizer_state_dict"])
    check(merge(run, "b", "copy", output="other", on_conflict="error"), "layer 3 is in b and copy; choose layers")
    assert not Path("other").exists()
    merge(run, "b", "copy", output="mean", on_conflict="average")
    assert same(weights_in(Path("mean")), weights_in(Path("b")))


def test_both_spellings_and_mixed_kinds_go_in_and_the_first_comes_out(run, workdir):
    write_source(Path("a"), {}, weights=second_spelling(weights_of({2: ("dual", 2, 2), 0: ("single", 3, 1)})))
    write_source(Path("b"), {1: ("triple", 4, 5)}, seed=1, base=None)
    assert merge(run, "b", "a").code == 0
    names = list(weights_in(Path("out")))
    assert [name for name in names if name.startswith("layer_0")] == [
        f"layer_0_np.W_{m}" for m in ("down", "a_up", "b_up")
    ]
    assert {name.split(".")[0] for name in names} == {"layer_0_np", "layer_1_np", "layer_2_np"}
    result = run("task=inspect", "ckpt=out").result
    kinds = [(r["layer"], r["modulation"], r["np_rank"], r["num_ranks"]) for r in result["layers"]]
    assert kinds == [(0, "single", 3, 1), (1, "triple", 4, 5), (2, "dual", 2, 2)]


def test_safetensors_out_holds_the_same(run, pair):
    merge(run, "a", "b", output="pt")
    merge(run, "a", "b", output="st", format="safetensors")
    assert not Path("st/npt_weights.pt").exists()
    assert same(
        dict(sorted(load_file("st/npt_weights.safetensors").items())), dict(sorted(weights_in(Path("pt")).items()))
    )
    assert same(state_of(Path("st")), state_of(Path("pt")))
    assert run("task=diff", "ckpt=st", "reference=pt").result["identical"]


def test_newest_compares_the_steps_of_the_layers_and_not_of_what_they_were_merged_into(run, pair):
    """Layer 1 was trained to step 100 and merged with one of step 300: a layer 1 of step 200 is newer."""
    write_source(Path("c"), ONE, seed=2, step=200)
    assert merge(run, "a", "b", output="ab").code == 0
    assert merge(run, "ab", "c", on_conflict="newest").code == 0
    assert merge(run, "a", "b", "c", output="once", on_conflict="newest").code == 0
    expected = Path("once/npt_weights.pt").read_bytes()
    assert Path("out/npt_weights.pt").read_bytes() == expected
    assert torch.equal(
        weights_in(Path("out"))["layer_1_np.W_down_gate.0"], weights_in(Path("c"))["layer_1_np.W_down_gate.0"]
    )
    assert json.loads(Path("out/merge_summary.json").read_text())["layer_steps"] == {"1": 200, "3": 300}


def test_interpolation_between_two_steps(run, workdir):
    for name, seed in (("checkpoint-1", 1), ("checkpoint-2", 2)):
        write_source(Path("run") / name, ONE, seed=seed, step=seed)
    a, b = (weights_in(Path("run") / f"checkpoint-{i}") for i in (1, 2))
    sources = ("run/checkpoint-1", "run/checkpoint-2")
    for rule in ("linear", "slerp"):
        words = [f"merge.sources=[{','.join(sources)}]", f"merge.output={rule}", "merge.t=0.25", f"merge={rule}"]
        outcome = run("task=merge", *words)
        assert outcome.result["layers"][0]["how"] == rule
        assert json.loads(Path(rule, "MANIFEST.json").read_text())["recipe"]["t"] == 0.25
    linear, slerp = weights_in(Path("linear")), weights_in(Path("slerp"))
    assert all(torch.equal(linear[name], (0.75 * a[name].double() + 0.25 * b[name].double()).float()) for name in a)
    norms = [[torch.linalg.vector_norm(w[name]) for name in a] for w in (slerp, linear)]
    assert all(x > y for x, y in zip(*norms, strict=True))


def test_dry_run_says_what_would_be_done_and_writes_nothing(run, pair):
    outcome = merge(run, "a", "b", dry_run="true")
    assert outcome.code == 0
    assert "Would Write: " in outcome.out
    assert not Path("out").exists()
    result = outcome.result
    assert (result["expected_layers"], result["found_layers"]) == ([1, 3], None)
    assert set(result["verification"].values()) == {"skipped"}
    assert "ckpt" not in result


def test_force_swaps_what_the_runner_wrote(run, pair):
    merge(run, "a", "b")
    first = Path("out/npt_weights.pt").read_bytes()
    write_source(Path("c"), {2: ("single", 2, 1)})
    check(merge(run, "a", "c"), "out: exists already")
    assert Path("out/npt_weights.pt").read_bytes() == first
    assert merge(run, "a", "c", force="true").result["found_layers"] == [1, 2]
    assert sorted(p.name for p in Path().iterdir()) == ["a", "b", "c", "out", "outputs"]
    assert run("task=verify", "ckpt=out").code == 0


def test_force_keeps_what_others_wrote_and_says_where(run, pair):
    Path("out").mkdir()
    Path("out/notes.txt").write_text("mine")
    findings = merge(run, "a", "b", force="true").result["findings"]
    (kept,) = Path().glob("out.old-*")
    assert (kept / "notes.txt").read_text() == "mine"
    assert f"what stood at {Path('out').absolute()} before is kept as {kept.name}" in findings


def test_a_layer_of_several_sources_equals_none_and_that_is_said(run, base, tmp_path):
    for seed in (1, 2):
        write_npt(tmp_path / str(seed), npt_tensors(base, {1: ("dual", 2, 2)}, seed=seed), base=base)
    words = ("merge=average", "merge.sources=[1,2]", "merge.output=out", "merge.verify=functional")
    outcome = run("task=merge", *words)
    assert (
        "Verified functional: pass (it runs; layer 1: computed from several sources, so equal to none)" in outcome.out
    )
    assert "Verified structure: pass (reads back with layer 1, as planned)" in outcome.out


def test_the_base_is_found_from_the_output(run, base, tmp_path):
    """A relative name that led from the sources to their base leads there from the merged checkpoint, and diagnose runs."""
    (tmp_path / "runs").mkdir()
    shutil.copytree(base, tmp_path / "runs" / "base")
    for name, layer in (("a", 1), ("b", 2)):
        path = write_npt(tmp_path / "runs" / name, npt_tensors(base, {layer: ("dual", 2, 2)}, seed=layer))
        (path / "config.json").write_text('{"model_name": "../base"}')
    outcome = merge(run, "runs/a", "runs/b", output="deep/er/out", verify="functional")
    assert outcome.code == 0, outcome.err
    assert json.loads(Path("deep/er/out/config.json").read_text())["model_name"] == "../../../runs/base"
    merge(run, "runs/a", "runs/b", output="runs/out")
    assert json.loads(Path("runs/out/config.json").read_text())["model_name"] == "../base"
    result = run("ckpt=runs/out").result
    assert result["metrics"] == outcome.result["metrics"]
    assert result["base"] == str(tmp_path / "runs" / "base")


def test_functional_verification_finds_a_layer_that_computes_something_else(run, base, tmp_path, monkeypatch):
    """The byte comparison is switched off, and a wrong layer slips in: its logits give it away."""
    from runner.merge import lazy_tensor

    for name, layer in (("a", 1), ("b", 2)):
        write_npt(tmp_path / name, npt_tensors(base, {layer: ("dual", 2, 2)}, seed=layer), base=base)
    original = lazy_tensor.from_source

    def wrong(source, info):
        piece = original(source, info)
        if "layer_2_np.W_b_up_up.1" not in info.name:
            return piece
        return lazy_tensor.LazyTensor(
            origin="", dtype_name=piece.dtype_name, shape=piece.shape, parts=lambda: (p * 1.01 for p in piece.parts())
        )

    monkeypatch.setattr(lazy_tensor, "from_source", wrong)
    monkeypatch.setattr("runner.merge.verify.comparisons", lambda *_: {})
    outcome = merge(run, "a", "b", verify="functional")
    assert outcome.code == 1
    assert re.search("layer 2 alone gives other logits than in b", outcome.err), outcome.err
    assert not Path("out").exists()
    assert outcome.result["status"] == "error"


def test_demo(run, workdir):
    outcome = run("task=merge", "merge=demo")
    assert outcome.code == 0, outcome.err
    result = outcome.result
    assert result["verification"] == dict.fromkeys(("structure", "bytes", "functional"), "pass")
    assert (result["found_layers"], result["step"]) == ([1, 2], 2500)
    assert any("random weights" in finding for finding in result["findings"])
    assert run("task=verify", f"ckpt={result['output']}").code == 0


def test_a_spec_of_the_users_own(run, pair):
    """A file in a folder of theirs, and the one that the project gives to copy."""
    Path("mine/merge").mkdir(parents=True)
    text = "defaults: [layers, _self_]\nname: my_spec\nsources: [{path: a, layers: [1]}, b]\noutput: out\non_conflict: error\n"
    Path("mine/merge/my_spec.yaml").write_text(text)
    assert run("--config-dir", "mine", "task=merge", "merge=my_spec").result["found_layers"] == [1, 3]
    check(run("task=merge", "merge=layer11_layer13"), "experiments/layer11/checkpoint-22000: no such file or directory")
    check(run("task=merge", "merge=layer"), "did you mean 'layers'")


def test_a_spec_that_is_no_yaml(run, pair):
    Path("conf/merge").mkdir(parents=True)
    Path("conf/merge/mine.yaml").write_text("sources: [a\n")
    outcome = run("--config-dir", "conf", "task=merge", "merge=mine")
    assert outcome.code == 2
    assert re.fullmatch(r"runner: error: not valid YAML: .*mine.yaml., line 1.*\n", outcome.err)


@pytest.mark.parametrize("name", ["a b", "a,b", "a=b", "[a]", "{a}", "it's", "é,[x]=1"])
def test_awkward_paths(name, run, workdir):
    write_source(Path(name), ONE)
    write_source(Path("b"), THREE)
    outcome = merge(run, name, "b", output=f"out {name}")
    assert outcome.code == 0, outcome.err
    assert outcome.result["sources"] == {"1": name, "3": "b"}
    if not set(name) & set(",{}'[]"):
        chosen = merge(run, f"{{path: {name}, layers: [1]}}", "b", output="other")
        assert chosen.result["sources"] == {"1": name, "3": "b"}
    spelled = '"' + name + '"'
    assert merge(run, f"{{path: {spelled}, layers: [1]}}", "b", output="quoted").code == 0


def test_moments_that_are_not_finite_are_said(run, pair):
    state = state_of(Path("b"))
    state["optimizer_state_dict"]["state"][2]["exp_avg"][0, 0] = float("nan")
    torch.save(state, "b/training_state.pt")
    findings = merge(run, "a", "b").result["findings"]
    assert "b: exp_avg of layer_3_np.W_down_gate.2: NaN or Inf, written as it is" in findings


def test_foreign_objects_in_a_state_become_plain_and_are_said(run, pair):
    import argparse

    state = state_of(Path("b"))
    torch.save({**state, "args": argparse.Namespace(lr=1e-3, out=Path("x"))}, "b/training_state.pt")
    findings = merge(run, "a", "b").result["findings"]
    assert "b: args was a argparse.Namespace; its plain content is written" in findings
    assert state_of(Path("out"))["args"] == {"lr": 1e-3, "out": "x"}


def test_tensors_in_unusual_places(run, pair):
    """As settings of an optimizer, weights of layers, steps of a curriculum; and half a surrogate pair in a config."""
    state = state_of(Path("a/checkpoint-100"))
    state["optimizer_state_dict"]["param_groups"][0]["betas"] = (torch.tensor([0.5, 0.25]), 0.999)
    torch.save(state, "a/checkpoint-100/training_state.pt")
    multi = {"layer_weights": {1: torch.tensor(0.5)}, "curriculum_schedule": [{"until_step": torch.tensor([1, 2])}]}
    torch.save(multi, "a/checkpoint-100/multi_layer_state.pt")
    Path("a/checkpoint-100/config.json").write_text('{"model_name": "base", "note": "\\ud800"}')
    outcome = merge(run, "a", "b")
    assert (outcome.code, outcome.err) == (0, "")
    said = "optimizer group 0: betas is [[0.5, 0.25], 0.999] in a"
    assert any(finding.startswith(said) for finding in outcome.result["findings"])
    written = torch.load("out/multi_layer_state.pt", weights_only=True)
    assert same(written["layer_weights"], {1: torch.tensor(0.5), 3: 2.0})
    assert json.loads(Path("out/config.json").read_text())["note"] == "\ud800"


def test_nothing_of_a_state_is_cut_or_lost(run, pair):
    """What inspect would shorten, and what pickle's protocol 2 spells as a function's call."""
    import argparse

    import numpy as np

    inside = argparse.Namespace(
        long=list(range(500)), text="x" * 5000, tensor=torch.arange(3), state="s", deep={1: [[[[[[[1]]]]]]]}
    )
    rows = np.arange(6.0).reshape(2, 3)
    beside = {"raw": b"ab\xff", "complex": 1 + 2j, "args": inside, "arrays": [rows, np.asfortranarray(rows)]}
    torch.save({**state_of(Path("b")), **beside}, "b/training_state.pt")
    outcome = merge(run, "a", "b")
    assert (outcome.code, outcome.err) == (0, "")
    state = state_of(Path("out"))
    assert (state["raw"], state["complex"]) == (b"ab\xff", 1 + 2j)
    assert same(state["args"], vars(inside))
    assert all(torch.equal(array, torch.from_numpy(rows)) for array in state["arrays"])
    assert "b: arrays[0] was a numpy.ndarray; it is written as a tensor" in outcome.result["findings"]


def check(outcome, message):
    """One line, exit code 2, and nothing written but the log and the result of the run."""
    assert outcome.code == 2, (outcome.code, outcome.err)
    (line,) = outcome.err.splitlines()
    assert line.startswith("runner: error: ")
    assert re.search(message, line), line
    assert outcome.out == ""


def no_weights(path):
    (path / "npt_weights.pt").unlink()
    (path / "config.json").unlink()


def with_nan(path):
    weights = weights_in(path)
    weights["layer_3_np.W_a_up_up.1"][1, 3] = float("inf")
    torch.save(weights, path / "npt_weights.pt")


def other_k(path):
    weights = weights_in(path)
    weights["layer_3_np.W_down_up.3"] = weights["layer_3_np.W_down_up.0"]
    torch.save(weights, path / "npt_weights.pt")


def flipped(path):
    raw = bytearray((path / "npt_weights.pt").read_bytes())
    raw[raw.index(weights_in(path)["layer_3_np.W_down_up.1"].numpy().tobytes()) + 5] ^= 8
    (path / "npt_weights.pt").write_bytes(raw)


def damaged_state(path):
    raw = (path / "training_state.pt").read_bytes()
    (path / "training_state.pt").write_bytes(raw[: len(raw) // 2])


DAMAGE = {
    "no npt weights": (no_weights, "b: No NPT layers found"),
    "Inf": (with_nan, "b.*layer_3_np.W_a_up_up.1: NaN or Inf; such weights are not merged"),
    "different k within one layer": (other_k, "missing keys .*W_a_up_up.3"),
    "a flipped bit": (flipped, r"b/npt_weights.pt: record npt_weights/data/\d+ .* is damaged: its CRC"),
    "half a training state": (damaged_state, "training_state.pt: truncated"),
    "an empty config": (lambda path: (path / "config.json").write_text(""), "config.json: an empty file"),
    "a base that is no name": (
        lambda path: (path / "config.json").write_text('{"model_name": 5}'),
        "b: model_name is 5, not the name of a base model",
    ),
    "nothing there": (shutil.rmtree, "b: no such file or directory"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_sources(case, run, pair):
    damage, message = DAMAGE[case]
    damage(Path("b"))
    before = {file: file.read_bytes() for file in Path().rglob("*") if file.is_file()}
    check(merge(run, "a", "b"), message)
    left = {file: file.read_bytes() for file in Path().rglob("*") if file.is_file() and file.parts[0] != "outputs"}
    assert left == before


def test_refused_outputs_and_options(run, pair):
    Path("link").symlink_to("nowhere")
    Path("run/checkpoint-1").mkdir(parents=True)
    Path("run/checkpoint-2").mkdir()
    before = sorted(Path().rglob("*"))
    for words, message in {
        ("merge.sources=[a,b]", "merge.output=b/out"): "equal to or inside the input b",
        ("merge.sources=[a,b]", "merge.output=b", "merge.force=true"): "equal to or inside the input b",
        ("merge.sources=[a,b]", "merge.output=link"): "link: a symbolic link cannot be an output",
        ("merge.sources=[a,b]", "merge.output=a"): "a: exists already",
        ("merge.sources=[a,b]",): "merge.output is needed",
        ("merge.output=out",): "merge.sources is needed",
        ("merge.sources=[a,./a]", "merge.output=out"): "given twice",
        ("merge.sources=[a,{path:b,layers:[4]}]", "merge.output=out"): "b: has no NPT layer 4; it has 3",
        ("merge.sources=[a,b]", "merge.output=out", "merge.layers=[1,4]"): "no source has layer 4",
        (
            "merge.sources=[a,run]",
            "merge.output=out",
        ): "run is a run of 2 checkpoints; name one of them, as run/checkpoint-2",
        ("merge.sources=[a,b]", "merge.output=out", "merge.on_conflict=frist"): "did you mean 'first'",
        ("merge.sources=[a,b]", "merge.output=out", "merge.frmat=pt"): "frmat",
        ("ckpt=a", "merge.sources=[a,b]", "merge.output=out"): "ckpt belongs to task=",
        ("merge.sources=[a,b]", "merge.output=out", "merge.verify=functional"): "base model 'base'",
    }.items():
        check(run("task=merge", *words), message)
        assert sorted(p for p in Path().rglob("*") if p.parts[0] != "outputs") == before, words


def test_output_needs_space(run, pair, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    check(merge(run, "a", "b"), "out: needs .* MB, .* has 0 MB free")
    assert not Path("out").exists()
