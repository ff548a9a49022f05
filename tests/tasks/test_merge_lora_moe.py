"""`task=merge` of lora_moe checkpoints: every expert and every row of the routers, in the order of the sources."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from runner.errors import CheckpointError
from runner.files.staging import verify
from runner.tracking.rows import summary
from tests.conftest import write_base
from tests.lora_files import adapter_of, load_moe, older
from tests.merge.moe_sources import gathered, write_moe
from tests.tasks.test_merge import check, merge


@pytest.fixture
def pair(workdir, base):
    """Three experts of rank 2, and two of rank 3 that are further."""
    return write_moe(Path("a"), base, experts=3, rank=2), write_moe(Path("b"), base, seed=2, step=300)


def expert(path, index):
    return load_file(adapter_of(Path(path), index) / "adapter_model.safetensors")


def equal(a, b):
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def router(path):
    return load_file(Path(path) / "router.safetensors")


def skills_in(path):
    return {name: tensor[0].item() for name, tensor in torch.load(Path(path) / "skill_library.pt").items()}


def test_experts_are_united_in_the_order_of_the_sources(run, pair):
    outcome = merge(run, "a", "b")
    assert (outcome.code, outcome.err) == (0, "")
    result = outcome.result
    assert (result["format"], result["step"]) == ("lora_moe", 300)
    assert result["expected_experts"] == result["found_experts"] == [0, 1, 2, 3, 4]
    assert result["sources"] == {"0": "a", "1": "a", "2": "a", "3": "b", "4": "b"}
    assert result["verification"] == {"structure": "pass", "bytes": "pass", "functional": "skipped"}
    assert "Found Experts: [0, 1, 2, 3, 4]" in outcome.out.splitlines()
    origins = [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1)]
    for number, (source, own) in enumerate(origins):
        assert equal(expert("out", number), expert(source, own))
        config, theirs = (
            json.loads((adapter_of(Path(p), i) / "adapter_config.json").read_text())
            for p, i in (("out", number), (source, own))
        )
        assert config == theirs
    for name in ("gate.weight", "gate.bias"):
        assert torch.equal(router("out")[name], torch.cat([router("a")[name], router("b")[name]]))
    assert skills_in("out") == {0: 10.0, 1: 11.0, 2: 12.0, 3: 20.0, 4: 21.0}
    assert verify(Path("out")) == []
    assert result["keys"] == 5 * len(expert("a", 0)) + 2
    assert (
        result["parameters"]
        == sum(t.numel() for s, i in origins for t in expert(s, i).values()) + router("out")["gate.weight"].numel() + 5
    )
    described = run("task=inspect", "ckpt=out").result
    assert [adapter["ranks"] for adapter in described["adapters"]] == [[2], [2], [2], [3], [3]]
    shown = summary(result)
    assert (shown["merge/experts"], shown["merge/sources"]) == ([0, 1, 2, 3, 4], ["a", "b"])
    assert (shown["merge/keys"], shown["merge/parameters"]) == (result["keys"], result["parameters"])


def test_what_lies_beside_the_weights(run, pair, base):
    Path("b/optimizer.pt").write_bytes(b"x")
    findings = merge(run, "a", "b").result["findings"]
    assert "b: optimizer.pt not merged: training goes on with a fresh optimizer" in findings
    config = json.loads(Path("out/config.json").read_text())
    expected = {
        "num_experts": 5,
        "model_type": "dylora-moe",
        "base_model_name_or_path": str(base),
        "_dylora_checkpoint_step": 300,
    }
    assert {name: config[name] for name in expected} == expected
    info = config["merge_info"]
    assert info["merged_from"] == ["a", "b"]
    assert info["expert_sources"]["expert_4"] == {"path": "b", "expert": "expert_1"}
    summed = json.loads(Path("out/merge_summary.json").read_text())
    assert (summed["global_step"], summed["experts"][3]["source_expert"]) == (300, 0)
    assert summed["skills"]["4"] == {"path": "b", "skill": 1}
    manifest = json.loads(Path("out/MANIFEST.json").read_text())
    assert manifest["inputs"] == summed["sha256"]
    assert "b/peft_adapters/expert_1/expert_1/adapter_model.safetensors" in manifest["inputs"]


def test_the_joint_model_is_that_of_all_experts(run, pair, base):
    """Put together in memory from the sources' own models, it gives the same logits as the file."""
    merge(run, "a", "b")
    a, b, joint = load_moe(Path("a")), load_moe(Path("b")), load_moe(Path("out"))
    from runner.evaluation.base_models import load_base
    from runner.families.lora_moe.model import LoraMoeForCausalLM

    gates = tuple(torch.cat([getattr(m.router, name) for m in (a, b)]) for name in ("weight", "bias"))
    model = LoraMoeForCausalLM(load_base(None, base).model, (*a.adapters(), *b.adapters()), gates)
    ids = torch.arange(4, 40)[None]
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, joint(ids).logits)
        assert not torch.equal(a(ids).logits, joint(ids).logits)


def test_the_golden_checkpoints(run, golden):
    paths = [golden(f"moe/{name}") for name in ("two_experts", "three_experts_top2")]
    check(merge(run, *paths, verify="functional"), "base model 'base' lies neither")
    words = [f"merge.sources=[{','.join(map(str, paths))}]", "merge.output=out", "merge.verify=functional"]
    outcome = run("task=merge", *words, f"base={golden('npt/base')}")
    assert outcome.code == 0, outcome.err
    assert outcome.result["verification"]["functional"] == "pass"
    assert outcome.result["metrics"]["mse"] > 0
    assert outcome.result["base"] == str(golden("npt/base"))
    assert f"{paths[1]}: top_k is 2; 1 of {paths[0]}, the first, is kept" in outcome.result["findings"]
    assert list(torch.load("out/skill_library.pt")) == [0, 1, 2, 3]
    for number, (path, own) in enumerate([(paths[0], 0), (paths[0], 1), (paths[1], 0), (paths[1], 1), (paths[1], 2)]):
        assert equal(expert("out", number), expert(path, own))


def test_chosen_experts(run, pair):
    outcome = merge(run, "{path: a, experts: [2,0]}", "{path: b, experts: 1}")
    assert outcome.code == 0, outcome.err
    for number, (source, own) in enumerate([("a", 2), ("a", 0), ("b", 1)]):
        assert equal(expert("out", number), expert(source, own))
    rows = torch.cat([router("a")["gate.weight"][[2, 0]], router("b")["gate.weight"][[1]]])
    assert torch.equal(router("out")["gate.weight"], rows)
    assert skills_in("out") == {0: 12.0, 1: 10.0, 2: 21.0}
    recipe = json.loads(Path("out/MANIFEST.json").read_text())["recipe"]["sources"]
    assert recipe == [{"path": "a", "experts": [2, 0]}, {"path": "b", "experts": [1]}]


def test_fewer_experts_than_the_router_chose_of(base, workdir):
    write_moe(Path("a"), base, experts=3, top_k=3, temperature=1.5)
    planned = gathered([{"path": "a", "experts": [1, 2]}])
    config = planned.texts["config.json"]
    assert (config["top_k"], config["temperature"], config["num_experts"]) == (2, 1.5, 2)
    assert "top_k is 3 in a; with 2 experts, 2 is" in planned.findings


def test_merging_in_two_steps_is_merging_at_once(run, pair, base):
    write_moe(Path("c"), base, seed=3, experts=1)
    merge(run, "a", "b", "c", output="once")
    merge(run, "a", "b", output="first")
    merge(run, "first", "c", output="then")
    for file in (path for path in Path("once").rglob("*") if path.is_file()):
        if file.name not in ("MANIFEST.json", "merge_summary.json"):
            assert file.read_bytes() == (Path("then") / file.relative_to("once")).read_bytes(), file


def test_older_and_flat_layouts_go_in_and_the_nested_one_comes_out(run, pair):
    older(Path("a"))
    adapter = Path("b/peft_adapters/expert_0")
    for file in list((adapter / "expert_0").iterdir()):
        file.rename(adapter / file.name)
    (adapter / "expert_0").rmdir()
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    expected = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    outcome = merge(run, "a", "b")
    assert outcome.code == 0, outcome.err
    assert equal(expert("out", 3), expected)
    assert len(router("out")["gate.bias"]) == 5
    assert json.loads(Path("out/config.json").read_text())["num_experts"] == 5


@pytest.mark.parametrize(
    ("on_conflict", "value"), [("first", 10.0), ("last", 20.0), ("newest", 20.0), ("average", 15.0), ("error", None)]
)
def test_names_of_skills_that_collide(on_conflict, value, base, workdir):
    write_moe(Path("a"), base, skills=["code", 0])
    write_moe(Path("b"), base, seed=2, step=300, skills=["code", "law", 0])
    if value is None:
        with pytest.raises(CheckpointError, match="skill code is in a and b; rename one of them, or choose"):
            gathered(["a", "b"], on_conflict=on_conflict)
        return
    planned = gathered(["a", "b"], on_conflict=on_conflict)
    library = planned.tensor_files[-1].value
    found = {name: next(piece.parts())[0].item() for name, piece in library.items()}
    assert found == {"code": value, 0: 11.0, "law": 21.0, 1: 22.0}
    (conflict,) = planned.conflicts
    assert (conflict["skill"], conflict["sources"]) == ("code", ["a", "b"])
    assert any(finding.startswith("skill code is in a and b: ") for finding in planned.findings)


def test_the_same_experts_twice(run, pair):
    shutil.copytree("b", "copy")
    outcome = merge(run, "b", "copy")
    assert [conflict["expert"] for conflict in outcome.result["conflicts"]] == [2, 3]
    assert any("expert 2 is in b and copy: the same weights as expert 0" in f for f in outcome.result["findings"])
    check(merge(run, "b", "copy", output="other", on_conflict="error"), "expert_0 of copy is the same as expert_0 of b")
    assert not Path("other").exists()


def test_bases(run, base, workdir):
    """Another name of the same weights is said, other weights are refused, and a relative name leads there from the output."""
    shutil.copytree(base, "base")
    shutil.copytree(base, "twin")
    write_base(Path("other"), seed=5)
    for name, there in (("a", "../base"), ("b", "../twin"), ("c", "../other")):
        write_moe(Path(name), base, seed=ord(name), base_name=there)
    outcome = merge(run, "a", "b", output="deep/er/out", verify="functional")
    assert outcome.code == 0, outcome.err
    assert any("../base (a) and ../twin (b), which hold the same weights" in f for f in outcome.result["findings"])
    assert json.loads(Path("deep/er/out/config.json").read_text())["base_model_name_or_path"] == "../../../base"
    check(merge(run, "a", "c"), "../base .* and ../other .*, whose weights differ")


def test_routers_of_other_dtypes_are_said(run, pair):
    file = Path("b/router.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file)
    findings = merge(run, "a", "b").result["findings"]
    said = "the routers are stored as bfloat16 and float32: the joint one is written in a dtype that holds both"
    assert said in findings
    assert {tensor.dtype for tensor in router("out").values()} == {torch.float32}


def test_dry_run_writes_nothing(run, pair):
    outcome = merge(run, "a", "b", dry_run="true")
    assert outcome.code == 0
    assert "Would Write: " in outcome.out
    assert "found_experts" not in outcome.result
    assert not Path("out").exists()


def test_another_byte_is_found(run, pair, monkeypatch):
    """What is written differs from what was read: by the comparison of bytes, and where that is off by the logits."""
    from runner.merge import writer

    original = writer.write_safetensors

    def wrong(sink, value, metadata):
        from runner.merge.lazy_tensor import LazyTensor

        name = next((name for name in value if "layers.1" in name and "lora_B" in name), None)
        if name is not None and value[name].origin.startswith("b: experts.expert_1"):
            piece = value[name]
            value = {
                **value,
                name: LazyTensor(
                    origin="",
                    dtype_name=piece.dtype_name,
                    shape=piece.shape,
                    parts=lambda: (p * 1.01 for p in piece.parts()),
                ),
            }
        original(sink, value, metadata)

    monkeypatch.setattr(writer, "write_safetensors", wrong)
    outcome = merge(run, "a", "b")
    assert outcome.code == 1
    assert re.search("expert_4/adapter_model.safetensors: verification failed: .*lora_B", outcome.err), outcome.err
    monkeypatch.setattr("runner.merge.verify.comparisons", lambda *_: {})
    outcome = merge(run, "a", "b", verify="functional")
    assert outcome.code == 1
    assert re.search("expert 4 alone gives other logits than in b", outcome.err), outcome.err
    assert not Path("out").exists()
