"""`task=verify`: any change to what was written is found, at any later time; other directories as far as they go."""

from pathlib import Path

import pytest
import torch

from runner.tasks.verify import check_checkpoint
from tests.merge.sources import ONE, THREE, state_of, weights_in, weights_of, write_source


@pytest.fixture
def merged(run, workdir):
    """A small output of a merge, of at most 64 KB."""
    write_source(Path("a"), {1: ("single", 1, 1)}, step=7)
    write_source(Path("b"), {2: ("single", 1, 1)}, step=9, seed=1)
    assert run("task=merge", "merge.sources=[a,b]", "merge.output=out").code == 0
    return Path("out")


def statuses(result):
    return {check["name"]: check["status"] for check in result["checks"]}


def test_a_merge_passes(run, merged):
    outcome = run("task=verify", f"ckpt={merged}")
    assert (outcome.code, outcome.err) == (0, "")
    result = outcome.result
    assert statuses(result) == dict.fromkeys(("manifest", "structure", "crc", "finite"), "pass")
    assert (result["verified"], result["format"], result["step"]) == (True, "npt_delta", 9)
    assert "Verified: yes" in outcome.out.splitlines()


@pytest.mark.parametrize("stride", [17, pytest.param(1, marks=pytest.mark.fault)])
def test_every_flipped_byte_of_every_file_is_found(stride, merged):
    """By the very checks that the task runs; all files together hold 64 KB at most."""
    files = sorted(merged.iterdir())
    assert sorted(file.suffix for file in files) == [".json"] * 3 + [".pt"] * 3
    assert sum(file.stat().st_size for file in files) <= 64 << 10
    for file in files:
        healthy = file.read_bytes()
        damaged = bytearray(healthy)
        for place in range(0, len(healthy), stride):
            damaged[place] ^= 1 << (place % 8)
            file.write_bytes(damaged)
            assert next(check_checkpoint(merged))["status"] == "fail", (file.name, place)
            damaged[place] = healthy[place]
        file.write_bytes(healthy)
    assert all(check["status"] == "pass" for check in check_checkpoint(merged))


@pytest.mark.parametrize("name", ["npt_weights.pt", "config.json", "MANIFEST.json"])
def test_a_damaged_output_ends_with_exit_1_and_names_the_file(name, run, merged):
    raw = bytearray((merged / name).read_bytes())
    raw[len(raw) // 2] ^= 1
    (merged / name).write_bytes(raw)
    outcome = run("task=verify", f"ckpt={merged}")
    assert outcome.code == 1
    result = outcome.result
    assert (result["status"], result["verified"]) == ("ok", False)
    assert statuses(result) == {"manifest": "fail", "structure": "skipped", "crc": "skipped", "finite": "skipped"}
    assert name in result["checks"][0]["details"]
    assert "Verified: NO" in outcome.out.splitlines()


def test_missing_and_added_files(run, merged):
    (merged / "more.txt").write_text("x")
    (merged / "training_state.pt").unlink()
    details = run("task=verify", f"ckpt={merged}").result["checks"][0]["details"]
    assert "training_state.pt is missing; out: more.txt is not in the manifest" in details


def test_a_directory_without_a_manifest(run, workdir):
    """Structure, CRCs and finiteness are checked, and that this is all is said."""
    write_source(Path("a"), ONE)
    outcome = run("task=verify", "ckpt=a")
    assert outcome.code == 0
    assert statuses(outcome.result) == {"manifest": "skipped", "structure": "pass", "crc": "pass", "finite": "pass"}
    assert "Manifest: skipped (no MANIFEST.json: not written by this runner, or removed;" in outcome.out


def test_without_its_manifest_nothing_is_proved(run, merged):
    assert run("task=verify", f"ckpt={merged}", "strict=true").code == 0
    (merged / "MANIFEST.json").unlink()
    outcome = run("task=verify", f"ckpt={merged}")
    assert (outcome.code, outcome.result["verified"]) == (0, None)
    assert "Verified: NOT PROVED: there is no MANIFEST.json" in outcome.out.splitlines()
    outcome = run("task=verify", f"ckpt={merged}", "strict=true")
    assert (outcome.code, outcome.err, outcome.result["verified"]) == (1, "", None)
    outcome = run("task=verify", f"ckpt={merged / 'npt_weights.pt'}", "strict=true")
    assert (outcome.code, outcome.result["verified"]) == (1, None)
    (merged / "npt_weights.pt").write_bytes(b"damaged")
    assert run("task=verify", f"ckpt={merged}").result["verified"] is False


def test_a_weights_file_that_the_manifest_does_not_list(run, merged):
    (merged / "other").mkdir()
    (merged / "npt_weights.pt").rename(merged / "weights.pt")
    outcome = run("task=verify", f"ckpt={merged / 'weights.pt'}")
    assert (outcome.code, statuses(outcome.result)["manifest"]) == (1, "fail")


def test_a_weights_file_is_verified_with_the_output_that_it_belongs_to(run, merged):
    file = merged / "npt_weights.pt"
    assert statuses(run("task=verify", f"ckpt={file}").result)["manifest"] == "pass"
    (merged / "config.json").write_text("{}")
    assert statuses(run("task=verify", f"ckpt={file}").result)["manifest"] == "fail"


def nan(path):
    weights = weights_in(path)
    weights["layer_3_np.W_down_up.1"][0, 0] = float("nan")
    torch.save(weights, path / "npt_weights.pt")


def flip_weight(path):
    flip(path / "npt_weights.pt", weights_in(path)["layer_3_np.W_a_up_up.1"])


def flip_moment(path):
    flip(path / "training_state.pt", state_of(path)["optimizer_state_dict"]["state"][7]["exp_avg"])


def flip(file, tensor):
    raw = bytearray(file.read_bytes())
    raw[raw.index(tensor.numpy().tobytes()) + 9] ^= 1
    file.write_bytes(raw)


def cut(path):
    raw = (path / "npt_weights.pt").read_bytes()
    (path / "npt_weights.pt").write_bytes(raw[:-50])


def incomplete(path):
    weights = weights_of(THREE)
    del weights["layer_3_np.W_down_up.1"]
    torch.save(weights, path / "npt_weights.pt")


@pytest.mark.parametrize(
    ("damage", "check", "message"),
    [
        (nan, "finite", "NaN or Inf in layer_3_np.W_down_up.1"),
        (flip_weight, "crc", "npt_weights.pt: record npt_weights/data/"),
        (flip_moment, "crc", "training_state.pt: record training_state/data/"),
        (cut, "structure", "npt_weights.pt: truncated"),
        (incomplete, "structure", "missing keys ['layer_3_np.W_down_up.1']"),
    ],
)
def test_damage_that_shows_without_a_manifest(damage, check, message, run, workdir):
    write_source(Path("b"), THREE)
    damage(Path("b"))
    outcome = run("task=verify", "ckpt=b")
    assert outcome.code == 1
    (row,) = [row for row in outcome.result["checks"] if row["status"] == "fail"]
    assert row["name"] == check
    assert message in row["details"]


def test_a_weights_file_and_safetensors(run, workdir):
    from safetensors.torch import save_file

    write_source(Path("a"), ONE)
    assert run("task=verify", "ckpt=a/npt_weights.pt").code == 0
    Path("s").mkdir()
    save_file(weights_in(Path("a")), "s/npt_weights.safetensors")
    details = {row["name"]: row["details"] for row in run("task=verify", "ckpt=s").result["checks"]}
    assert details["crc"] == "npt_weights.safetensors: a layout without CRCs"


def test_a_file_saved_without_crcs(run, workdir):
    write_source(Path("a"), ONE)
    content = torch.load("a/npt_weights.pt", weights_only=True)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(content, "npt_weights.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    details = {row["name"]: row["details"] for row in run("task=verify", "ckpt=npt_weights.pt").result["checks"]}
    assert details["crc"] == "npt_weights.pt: saved without CRCs"


def test_nothing_there_and_a_run(run, workdir):
    for step in (1, 2):
        write_source(Path(f"r/checkpoint-{step}"), ONE, step=step)
    for words, message in ((["ckpt=nowhere"], "nowhere: no such file"), (["ckpt=r"], "choose step= from 1, 2")):
        outcome = run("task=verify", *words)
        assert outcome.code == 2
        assert message in outcome.err
    assert run("task=verify", "ckpt=r", "step=2").result["step"] == 2
