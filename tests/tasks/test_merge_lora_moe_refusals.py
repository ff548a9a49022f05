"""What `task=merge` refuses of lora_moe checkpoints: one line, exit code 2, nothing written."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.conftest import write_base
from tests.lora_files import edit_adapter, edit_json
from tests.merging.moe_sources import write_moe
from tests.tasks.test_merge import check, merge


@pytest.fixture
def pair(workdir, base):
    """Three experts of rank 2, and two of rank 3 that are further."""
    return write_moe(Path("a"), base, experts=3, rank=2), write_moe(Path("b"), base, seed=2, step=300)


def nan(path):
    edit_adapter(
        path, 1, lambda tensors: {name: t * float("nan") if "q_proj" in name else t for name, t in tensors.items()}
    )


def skills_of_another_size(path):
    torch.save({0: torch.zeros(7)}, path / "skill_library.pt")


def damaged_skills(path):
    raw = bytearray((path / "skill_library.pt").read_bytes())
    raw[raw.index(torch.full((32,), 21.0).numpy().tobytes()) + 5] ^= 8
    (path / "skill_library.pt").write_bytes(raw)


DAMAGE = {
    "NaN": (nan, "experts.expert_1.*q_proj.*: NaN or Inf; such weights are not merged"),
    "skills of another size": (skills_of_another_size, "b: its skills are embeddings of size 7, those of a of 32"),
    "a flipped bit": (damaged_skills, r"b/skill_library.pt: record .* is damaged: its CRC"),
    "a missing expert": (lambda path: shutil.rmtree(path / "peft_adapters" / "expert_1"), "config.json says 2 experts"),
    "no router": (lambda path: (path / "router.safetensors").unlink(), "b: has no router"),
    "other experts": (lambda path: edit_json(path / "config.json", num_experts=4), "they must be the same"),
    "half an expert": (
        lambda path: edit_adapter(path, 0, lambda tensors: {n: t for n, t in tensors.items() if "lora_A" in n}),
        "missing keys|none of its",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_sources(case, run, pair):
    damage, message = DAMAGE[case]
    damage(Path("b"))
    check(merge(run, "a", "b"), message)
    assert sorted(path.name for path in Path().iterdir()) == ["a", "b", "outputs"]


def test_refusals(run, pair, base):
    write_base(Path("wide"), hidden=64)
    write_moe(Path("c"), Path("wide"), base_name="x")
    for words, message in {
        ("merge.sources=[a,./a]",): "a is given twice",
        ("merge.sources=[a,{path: b, experts: [2]}]",): "b: has no expert 2; it has 0 to 1",
        ("merge.sources=[a,{path: b, layers: [2]}]",): "b: a lora_moe is merged by experts, not by layers",
        ("merge.sources=[a,{path: b, experts: [1,1]}]",): "names an expert twice",
        ("merge.sources=[a,{path: b, expert: [1]}]",): "'expert' is unknown; did you mean 'experts'",
        ("merge.sources=[a,b]", "merge=linear"): "merge=linear: the experts of lora_moe checkpoints are united",
        ("merge.sources=[a,b]", "merge=average"): "merge=average: the experts of lora_moe checkpoints are united",
        ("merge.sources=[a,b]", "merge.drop=[1]"): "merge.layers and merge.drop are for NPT layers",
        ("merge.sources=[a,c]",): "c: its router reads a hidden size of 64, that of a 32; they stand on different base",
        ("merge.sources=[a,b]", "merge.output=b/out"): "equal to or inside the input b",
    }.items():
        output = [] if any("output" in word for word in words) else ["merge.output=out"]
        check(run("task=merge", *words, *output), message)
        assert sorted(path.name for path in Path().iterdir()) == ["a", "b", "c", "outputs", "wide"]
