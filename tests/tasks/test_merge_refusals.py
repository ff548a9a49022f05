"""What `task=merge` refuses: one line, exit code 2, and nothing written but the run's own log and result."""

from pathlib import Path

import pytest
import torch

from runner.errors import CheckpointError, ConfigError
from runner.installation import config_directory
from tests.gpt_files import random_state, script_file
from tests.merge.moe_sources import gathered, write_moe
from tests.merge.sources import ONE, THREE, same, weights_in, weights_of, write_source
from tests.merge.test_plan import write_base
from tests.tasks.test_merge import check, merge


@pytest.fixture
def sources(workdir, base):
    """NPT checkpoints of layer 1, 3, 1 again, 1 with other ranks, 1 on bases of other weights, sizes and depth; others."""
    write_source(Path("a"), ONE)
    write_source(Path("b"), THREE, seed=1)
    write_source(Path("again"), ONE, seed=2)
    write_source(Path("other_k"), {1: ("triple", 2, 4)}, seed=3)
    write_source(Path("other_size"), {}, weights=weights_of(THREE, hidden=32), base=None)
    for name, values, config in (
        ("one", b"abc", {}),
        ("two", b"abd", {}),
        ("flat", b"abc", {"num_hidden_layers": 1}),
        ("wide", b"abc", {"intermediate_size": 99}),
    ):
        write_base(Path(name), values, **config)
        write_source(Path(f"on_{name}"), ONE if name == "one" else THREE, base=f"../{name}")
    Path("far").mkdir()
    write_base(Path("far/one"), b"xyz")
    write_source(Path("far/b"), THREE, base="../one")
    script_file(Path("gpt.pt"), random_state("small", layers=6))
    write_moe(Path("moe"), base, experts=1)
    write_moe(Path("adrift"), base, experts=1, base_name="gone")
    Path("hf").symlink_to(base)
    Path("empty").mkdir()


REFUSED = {
    "a layer of two sources": ("a,again", "layer 1 is in a and again; choose layers", "merge.on_conflict=error"),
    "another k under average": ("a,other_k", "layer 1 is triple, r 2, k 3 in a and triple, r 2, k 4 in other_k: average", "merge.on_conflict=average"),
    "bases with other weights": ("on_one,on_two", r"../one \(on_one\) and ../two \(on_two\), whose weights differ"),
    "another base by hand": ("a,b", "has only the layers 0 to 0; give the right one as base=", "base=flat"),
    "a base to run on": ("a,b", "^runner: error: a: its base model 'base' lies neither", "merge.verify=functional"),
    "a base to plan with": ("a,b", "a: its base model 'base' lies", "merge.verify=functional", "merge.dry_run=true"),
    "experts without a base": ("adrift", "^runner: error: adrift: its base model 'gone' lies", "merge.verify=functional"),
    "a base that is nowhere": ("a,b", "base=./nowhere: no such directory", "base=./nowhere"),
    "a long name": ("a,b", "cannot be an output: File name too long", f"merge.output={'n' * 300}"),
    "an empty list": ("", r"a source without a path; give the checkpoints to merge, as \[A,B\]"),
    "no NPT weights: a model": ("a,hf", "a is npt_delta and hf is hf: checkpoints of different families"),
    "no NPT weights: an empty directory": ("a,empty", "empty: the directory is empty"),
    "NPT layers with a GPT": ("a,gpt.pt", "a is npt_delta and gpt.pt is gpt_small: checkpoints of different families"),
    "experts of NPT layers": ("a,{path: b, experts: [0]}", r"b: has no experts, it is an npt_delta; choose layers: \[…\]"),
}  # fmt: skip


def test_refused(run, sources):
    before = {file: file.read_bytes() for file in Path().rglob("*") if file.is_file()}
    for given, message, *words in REFUSED.values():
        check(run("task=merge", f"merge.sources=[{given}]", "merge.output=out", *words), message)
    left = {file: file.read_bytes() for file in Path().rglob("*") if file.is_file() and file.parts[0] != "outputs"}
    assert left == before
    assert not Path("out").exists()


UNPLANNED = {
    "another k under merge=average": ("a other_k", "average needs the same kind, rank and number", "average"),
    "another k under linear": ("a other_k", "linear needs the same kind, rank and number of ranks", "linear"),
    "other layers under average": ("a b", "b: has no layer 1, which a has; merge=average needs the same layers", "average"),
    "the average of one": ("a", "give two sources or more", "average"),
    "layers of other sizes": ("a other_size", "made for hidden size 32 .* different base models"),
    "one name for two bases": ("on_one far/b", r"../one \(on_one\) and ../one \(far/b\), whose weights differ"),
    "a base with fewer layers": ("on_one on_flat", "on_flat: has NPT layer 3, but its base flat has only the layers 0 to 0"),
    "a base of another size": ("on_one on_wide", "made for intermediate_size 24, but its base wide has 99"),
    "NPT layers with experts": ("a moe", "a is npt_delta and moe is lora_moe: checkpoints of different families"),
    "experts with a GPT": ("moe gpt.pt", "moe is lora_moe and gpt.pt is gpt_small: checkpoints of different families"),
    "experts with a model": ("moe hf", "moe is lora_moe and hf is hf: checkpoints of different families"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNPLANNED)
def test_refused_before_anything_is_written(case, sources):
    given, message, *rule = UNPLANNED[case]
    with pytest.raises((CheckpointError, ConfigError), match=message) as error:
        gathered(given.split(), **({"rule": rule[0]} if rule else {}))
    assert "\n" not in str(error.value)


def test_the_mean_of_npt_layers_by_shares(run, workdir):
    for seed in (1, 2, 3):
        write_source(Path(f"s{seed}"), ONE, seed=seed, step=100 * seed)
    outcome = run("task=merge", "merge=average", "merge.sources=[{path: s1, weight: 2},s2,s3]", "merge.output=out")
    assert outcome.code == 0, outcome.err
    a, b, c = (weights_in(Path(f"s{seed}")) for seed in (1, 2, 3))
    found = weights_in(Path("out"))
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, a[name] / 2 + b[name] / 4 + c[name] / 4)
    assert outcome.result["layers"][0]["how"] == "average"
    assert outcome.result["step"] == 300
    run("task=merge", "merge=average", "merge.sources=[s1,s2,s3]", "merge.output=equal")
    merge(run, "s1", "s2", "s3", on_conflict="average", output="conflict")
    assert same(weights_in(Path("equal")), weights_in(Path("conflict")))


def test_a_base_that_is_not_at_hand_is_said(run, sources):
    words = ("merge.sources=[a,b]", "merge.output=out", "merge.dry_run=true", "base=owner/model")
    findings = run("task=merge", *words).result["findings"]
    assert "base=owner/model is not at hand: whether the sources stand on it was not checked" in findings


def test_the_spec_to_copy(run, workdir):
    """conf/merge/layer11_layer13.yaml with paths of one's own is all that a merge needs."""
    text = (config_directory() / "merge" / "layer11_layer13.yaml").read_text()
    for layer, step in ((11, 22000), (13, 2500)):
        write_source(Path(f"runs/{layer}/checkpoint-{step}"), {layer: ("dual", 2, 2), 5: ("dual", 2, 2)}, step=step)
        text = text.replace(f"experiments/layer{layer}/", f"runs/{layer}/")
    Path("mine/merge").mkdir(parents=True)
    Path("mine/merge/mine.yaml").write_text(text.replace("verify: functional", "verify: bytes"))
    outcome = run("--config-dir", "mine", "task=merge", "merge=mine")
    assert outcome.code == 0, outcome.err
    assert outcome.result["sources"] == {"11": "runs/11/checkpoint-22000", "13": "runs/13/checkpoint-2500"}
    assert run("task=verify", "ckpt=experiments/merged_11_13").result["step"] == 22000
