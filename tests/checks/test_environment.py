"""What is said of the machine: found in sources and metadata, and wrong where they say so."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from runner.checks import environment
from runner.errors import CheckpointError
from runner.files.safetensors_header import read_header
from tests.checkpoints.hostile import entry, safetensors


def package(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.mkdir(parents=True)
        (path / "config.py").write_text(text)
    return root


def test_features_are_read_from_the_source(tmp_path):
    plain = package(tmp_path / "plain", tuners__lora="class LoraConfig:\n    pass\n# attach_router is not here\n")
    assert environment.peft_features(plain) == {
        "LoRA": True, "X-LoRA": False, "MoE LoRA config": False, "attach_router": False,
    }  # fmt: skip
    rich = package(
        tmp_path / "rich",
        tuners__lora="class LoraConfig:\n    def attach_router(self):\n        pass\n",
        tuners__xlora="class XLoraConfig:\n    pass\n",
        tuners__moe="class MoELoraConfig:\n    pass\n",
    )
    assert set(environment.peft_features(rich).values()) == {True}


def test_the_installed_peft_offers_lora_and_no_router_of_experts():
    root = environment.package_directory("peft")
    assert root is not None
    assert environment.peft_features(root)["LoRA"]


def test_a_peft_without_lora_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "package_directory", lambda name: tmp_path)
    assert environment.peft(None).status == "fail"


@pytest.mark.parametrize(("name", "status"), [("torch", "fail"), ("wandb", "warning")])
def test_what_is_not_installed_is_said(name, status, monkeypatch):
    numbers = {each: "1.0" for each in (*environment.NEEDED, *environment.OPTIONAL) if each != name}
    monkeypatch.setattr(environment, "installed", lambda: numbers)
    outcome = environment.versions(None)
    assert outcome.status == status
    assert f"not installed: {name}" in outcome.details


def test_a_place_that_cannot_be_written_fails(tmp_path):
    bench = SimpleNamespace(scratch=tmp_path / "missing")
    outcome = environment.writable(bench)
    assert (outcome.status, "No such file" in outcome.details) == ("fail", True)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry(0, 8)}, b"\0" * 7, "truncated"),
        ({"a": entry(0, 8)}, b"\0" * 9, "1 bytes after the last tensor"),
        ({"a": entry(0, 8, [3])}, b"\0" * 8, r"a: shape \[3\] of F32 needs 12 bytes"),
        ({"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8, "a: unknown dtype 'F99'"),
        (b'{"a": 1, "a": 2}', b"", "a: given twice"),
    ],
)
def test_headers_are_read_strictly(tmp_path, header, data, message):
    with pytest.raises(CheckpointError, match=message):
        read_header(safetensors(tmp_path, header, data))
