"""Which layer comes from where: conflicts, choices, refusals, all before a tensor is read."""

import json
import re
from pathlib import Path

import pytest
import torch

from runner.errors import CheckpointError, ConfigError, RunnerError
from runner.merge.spec import MergeSpec
from tests.merge.sources import ONE, THREE, layer_plan, write_source


def plan(tmp_path, *sources, **options):
    spec = MergeSpec(name="test", sources=list(sources), **options)
    paths = [tmp_path / source.path for source in spec.sources]
    return layer_plan(spec, paths)


def taken(found):
    return {layer.layer.layer: [source.path.name for source in layer.sources] for layer in found.layers}


@pytest.fixture
def three(tmp_path):
    """a: layers 1 and 2; b: 2 and 3; c: 2."""
    kinds = {1: ("single", 2, 1), 2: ("dual", 2, 2), 3: ("triple", 3, 1)}
    for name, layers, step in (("a", (1, 2), 300), ("b", (2, 3), 100), ("c", (2,), 200)):
        write_source(tmp_path / name, {layer: kinds[layer] for layer in layers}, seed=step, step=step)
    return tmp_path


@pytest.mark.parametrize(
    ("on_conflict", "layer_2"),
    [("first", ["b"]), ("last", ["c"]), ("newest", ["a"]), ("average", ["b", "a", "c"])],
)
def test_conflicts(on_conflict, layer_2, three):
    found = plan(three, "b", "a", "c", on_conflict=on_conflict)
    assert taken(found) == {1: ["a"], 2: layer_2, 3: ["b"]}
    (conflict,) = found.conflicts
    assert (conflict["layer"], [Path(path).name for path in conflict["sources"]]) == (2, ["b", "a", "c"])
    assert f"layer 2 is in {three}/b and {three}/a and {three}/c: " in found.findings[0]


def test_layers_of_each_source_and_of_the_whole(three):
    chosen = plan(three, {"path": "a", "layers": [1]}, {"path": "b", "layers": [3]}, "c", on_conflict="error")
    assert taken(chosen) == {1: ["a"], 2: ["c"], 3: ["b"]}
    assert chosen.conflicts == ()
    assert taken(plan(three, "a", "b", layers=[1, 3], on_conflict="error")) == {1: ["a"], 3: ["b"]}
    assert taken(plan(three, "a", "b", drop=[2], on_conflict="error")) == {1: ["a"], 3: ["b"]}
    assert taken(plan(three, "a", drop=[1])) == {2: ["a"]}


def test_names_are_canonical_and_ascending(three):
    found = plan(three, "b", "a")
    names = [tensor.name for tensor in found.tensors]
    assert names[:3] == ["layer_1_np.W_down", "layer_1_np.W_a_up", "layer_1_np.W_b_up"]
    assert names[3:6] == ["layer_2_np.W_down_gate.0", "layer_2_np.W_down_gate.1", "layer_2_np.W_a_up_gate.0"]
    assert names[-1] == "layer_3_np.W_b_up_down"
    assert sum(layer.layer.parameters for layer in found.layers) == sum(t.tensor.numel for t in found.tensors)


REFUSED = {
    "overlap under error": (["a", "b"], {"on_conflict": "error"}, "layer 2 is in .*a and .*b; choose layers"),
    "a layer that a source lacks": ([{"path": "a", "layers": [7]}], {}, "a: has no NPT layer 7; it has 1, 2"),
    "a layer that none has": (["a", "b"], {"layers": [1, 9]}, "merge.layers: no source has layer 9; there are 1, 2, 3"),
    "a drop that none has": (["a"], {"drop": [9]}, "merge.drop: no source has layer 9"),
    "nothing left": (["c"], {"drop": [2]}, "no layer is left"),
    "the same twice": (["a", "b", "../{here}/a"], {}, "is given twice"),
    "interpolating three": (["a", "b", "c"], {"rule": "linear"}, "give two sources, not 3"),
    "interpolating other layers": (["a", "c"], {"rule": "slerp"}, "c: has no layer 1, which .*a has"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case, three):
    sources, options, message = REFUSED[case]
    sources = [s.format(here=three.name) if isinstance(s, str) else s for s in sources]
    with pytest.raises((ConfigError, CheckpointError), match=message):
        plan(three, *sources, **options)


@pytest.mark.parametrize("options", [{"on_conflict": "average"}, {"rule": "linear"}, {"rule": "slerp"}])
@pytest.mark.parametrize("kind", [("triple", 2, 4), ("triple", 3, 3), ("dual", 2, 3)])
def test_only_layers_of_one_kind_are_combined(kind, options, tmp_path):
    write_source(tmp_path / "a", ONE)
    write_source(tmp_path / "b", {1: kind})
    with pytest.raises(CheckpointError, match=r"layer 1 is triple, r 2, k 3 in .* and .* needs the same kind"):
        plan(tmp_path, "a", "b", **options)


def test_newest_needs_steps(tmp_path):
    write_source(tmp_path / "a", ONE)
    write_source(tmp_path / "b", ONE, step=None, seed=1)
    with pytest.raises(CheckpointError, match="b: reports no step"):
        plan(tmp_path, "a", "b", on_conflict="newest")


def test_layers_for_other_sizes_stand_on_another_base(tmp_path):
    from tests.merge.sources import weights_of

    write_source(tmp_path / "a", ONE)
    write_source(tmp_path / "b", {}, weights=weights_of(THREE, hidden=32), base=None)
    with pytest.raises(CheckpointError, match="different base models"):
        plan(tmp_path, "a", "b")


def test_dtypes_that_differ_are_said(tmp_path):
    write_source(tmp_path / "a", ONE)
    write_source(tmp_path / "b", ONE, seed=1, dtype=torch.bfloat16)
    found = plan(tmp_path, "a", "b", on_conflict="average")
    assert any("layer 1 is stored as bfloat16 and float32: it is written as float32" in said for said in found.findings)


def test_a_checkpoint_of_another_format_is_named(tmp_path, base):
    write_source(tmp_path / "a", ONE)
    with pytest.raises(CheckpointError, match="No NPT layers to merge: its format is hf"):
        plan(tmp_path, "a", str(base))


def write_base(directory, weights: bytes, **config):
    from safetensors.torch import save_file

    directory.mkdir()
    values = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, **config}
    (directory / "config.json").write_text(json.dumps(values))
    save_file({"w": torch.tensor(list(weights), dtype=torch.uint8)}, directory / "model.safetensors")


def test_bases_under_two_names(tmp_path):
    """The same weights: said. Other weights: refused. Not at hand: said. Both checked against the layers' sizes."""
    write_source(tmp_path / "a", ONE, base="one")
    write_source(tmp_path / "b", THREE, base="two", seed=1)
    assert any("not both at hand" in said for said in plan(tmp_path, "a", "b").findings)
    write_base(tmp_path / "one", b"abc")
    write_base(tmp_path / "two", b"abc")
    assert any("which hold the same weights" in said for said in plan(tmp_path, "a", "b").findings)
    (tmp_path / "two" / "model.safetensors").unlink()
    (tmp_path / "two" / "config.json").unlink()
    (tmp_path / "two").rmdir()
    write_base(tmp_path / "two", b"abd")
    with pytest.raises(CheckpointError, match=r"one \(.*a\) and two \(.*b\), whose weights differ"):
        plan(tmp_path, "a", "b")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_size": 32}, "hidden_size 16, but its base .* has 32"),
        ({"num_hidden_layers": 3}, "only the layers 0 to 2"),
    ],
)
def test_a_base_that_the_layers_do_not_fit(config, message, tmp_path):
    write_source(tmp_path / "b", THREE, base="one")
    write_base(tmp_path / "one", b"abc", **config)
    with pytest.raises(RunnerError, match=message):
        plan(tmp_path, "b")


SPECS = {
    "rule": ({"rule": "slrp"}, "merge.rule=slrp is unknown; did you mean 'slerp'?"),
    "on_conflict": ({"on_conflict": "frist"}, "did you mean 'first'?"),
    "format": ({"format": "pth"}, "merge.format=pth is unknown; did you mean 'pt'?"),
    "verify": ({"verify": "function"}, "did you mean 'functional'?"),
    "t": ({"t": 1.5}, "merge.t=1.5: give a number from 0"),
    "force": ({"force": "yes"}, "merge.force=yes: choose true or false"),
    "layers": ({"layers": ["a"]}, r"merge.layers=\['a'\]: give layer numbers"),
    "layers twice": ({"layers": [1, 1]}, "names a layer twice"),
    "negative": ({"drop": [-1]}, "give layer numbers"),
    "a source's key": ({"sources": [{"path": "a", "layer": [1]}]}, "'layer' is unknown; did you mean 'layers'?"),
    "a source": ({"sources": [{"layers": [1]}]}, "neither a path nor"),
    "an empty source": ({"sources": ["a", ""]}, "a source without a path; give the checkpoints to merge, as"),
    "a source without a path": ({"sources": [{"path": None}]}, "a source without a path"),
    "no layer of a source": ({"sources": [{"path": "a", "layers": []}]}, "layers of a: an empty list takes nothing"),
    "no expert": ({"sources": [{"path": "a", "experts": []}]}, "experts of a: an empty list takes nothing"),
}


@pytest.mark.parametrize("case", SPECS)
def test_wrong_specs(case):
    options, message = SPECS[case]
    with pytest.raises(ConfigError) as error:
        MergeSpec(name="x", **options)
    assert re.search(re.escape(message) if "?" in message else message, str(error.value)), error.value


def test_a_spec_reads_paths_and_layers_in_every_spelling():
    spec = MergeSpec(name="x", sources=["a", {"path": "b", "layers": 3}, {"path": 7}], layers=3)
    assert [(source.path, source.layers) for source in spec.sources] == [("a", None), ("b", (3,)), ("7", None)]
    assert spec.layers == (3,)
    assert MergeSpec(name="x", sources="a b").sources[0].path == "a b"
