"""What `task=merge` refuses of lora_moe checkpoints: one line, exit code 2, nothing written."""

import shutil
from pathlib import Path

import pytest
import torch

from runner.errors import CheckpointError, ConfigError
from tests.conftest import write_base
from tests.lora_files import edit_adapter, edit_json
from tests.merge.moe_sources import gathered, write_moe
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


BAD_BYTES = {
    "NaN": (nan, "experts.expert_1.*q_proj.*: NaN or Inf; such weights are not merged"),
    "a flipped bit": (damaged_skills, r"b/skill_library.pt: record .* is damaged: its CRC"),
}
DAMAGE = {
    "skills of another size": (skills_of_another_size, "b: its skills are embeddings of size 7, those of a of 32"),
    "a missing expert": (lambda path: shutil.rmtree(path / "peft_adapters" / "expert_1"), "config.json says 2 experts"),
    "no router": (lambda path: (path / "router.safetensors").unlink(), "b: has no router"),
    "other experts": (lambda path: edit_json(path / "config.json", num_experts=4), "they must be the same"),
    "half an expert": (
        lambda path: edit_adapter(path, 0, lambda tensors: {n: t for n, t in tensors.items() if "lora_A" in n}),
        "missing keys|none of its",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_sources(case, pair):
    damage, message = DAMAGE[case]
    damage(Path("b"))
    with pytest.raises(CheckpointError, match=message):
        gathered(["a", "b"])


@pytest.mark.parametrize("case", BAD_BYTES)
def test_bad_bytes(case, run, pair):
    """What headers do not tell is found before, or while, the output is written."""
    damage, message = BAD_BYTES[case]
    damage(Path("b"))
    check(merge(run, "a", "b"), message)
    assert sorted(path.name for path in Path().iterdir()) == ["a", "b", "outputs"]


REFUSED = {
    "the same twice": (["a", "./a"], {}, "a is given twice"),
    "an unknown expert": (["a", {"path": "b", "experts": [2]}], {}, "b: has no expert 2; it has 0 to 1"),
    "layers of experts": (["a", {"path": "b", "layers": [2]}], {}, "b: a lora_moe is merged by experts, not by layers"),
    "an expert twice": (["a", {"path": "b", "experts": [1, 1]}], {}, "names an expert twice"),
    "a wrong key": (["a", {"path": "b", "expert": [1]}], {}, "'expert' is unknown; did you mean 'experts'"),
    "linear": (["a", "b"], {"rule": "linear"}, "merge=linear: the experts of lora_moe checkpoints are united"),
    "average": (["a", "b"], {"rule": "average"}, "merge=average: the experts of lora_moe checkpoints are united"),
    "drop": (["a", "b"], {"drop": [1]}, "merge.layers and merge.drop are for NPT layers"),
    "another size": (["a", "c"], {}, "c: its router reads a hidden size of 64, that of a 32; they stand on different"),
}


def test_refusals(pair, base):
    write_base(Path("wide"), hidden=64)
    write_moe(Path("c"), Path("wide"), base_name="x")
    for case, (sources, options, message) in REFUSED.items():
        with pytest.raises((CheckpointError, ConfigError), match=message) as error:
            gathered(sources, **options)
        assert "\n" not in str(error.value), case


def test_an_unknown_expert_from_the_command_line(run, pair):
    check(merge(run, "a", "{path: b, experts: [2]}"), "b: has no expert 2; it has 0 to 1")
    assert sorted(path.name for path in Path().iterdir()) == ["a", "b", "outputs"]
