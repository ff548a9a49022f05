"""What the checks share: a reload that shares nothing with the model, an estimate of memory that is near the truth."""

import pytest
import torch

from runner.checkpoints.detect import recognise
from runner.checks.memory import IMPORTS, Estimate, estimate_peak, estimate_seconds
from runner.families.npt import Npt
from runner.files.tensors import open_weights
from tests.checks.benches import bench_of, failing, rows_of, write_npt_full
from tests.conftest import write_base
from tests.lora_files import write_adapter, write_moe


def test_the_reload_shares_nothing_with_the_model(checkpoint, tmp_path):
    bench = bench_of(checkpoint, tmp_path / "scratch")
    ours = {parameter.data_ptr() for parameter in bench.model.parameters()}
    assert not ours & {parameter.data_ptr() for parameter in bench.reloaded.parameters()}


def test_a_saver_that_changes_the_base_in_memory_is_caught(checkpoint, tmp_path, monkeypatch):
    bench = bench_of(checkpoint, tmp_path / "scratch", base=write_base(tmp_path / "base"))
    save = Npt.save

    def merging(*args):
        path = save(*args)
        with torch.no_grad():
            bench.own.model.model.layers[0].mlp.gate_proj.weight.add_(0.1)
        return path

    monkeypatch.setattr(Npt, "save", merging)
    assert failing(rows_of(bench, ("model", "forward", "save", "roundtrip"))) == ["roundtrip"]


def test_the_estimate_counts_the_base_twice_and_complete_models_twice(checkpoint, base, tmp_path):
    size = open_weights(base / "model.safetensors").nbytes
    for path in (checkpoint, write_npt_full(tmp_path / "full", base)):
        found = estimate_peak(bench_of(path, tmp_path / f"scratch-{path.name}")) - IMPORTS
        assert 2 * size < found
        assert found < 4 * size + 7 * open_weights(checkpoint / "npt_weights.pt").nbytes + 16 * 512 * 272


def test_the_time_grows_with_the_parameters(base, tmp_path):
    small, large = (
        bench_of(path, tmp_path / f"s{i}") for i, path in enumerate((base, write_base(tmp_path / "b", layers=9)))
    )
    assert 5 < estimate_seconds(small) < estimate_seconds(large)


@pytest.mark.parametrize(("available", "fits"), [(None, True), (60, True), (59, False)])
def test_room_is_what_is_held_and_what_is_there(available, fits):
    assert Estimate(peak=100, seconds=1, available=available, resident=40).fits is fits


def test_what_lies_there_is_told_from_names(base, checkpoint, tmp_path):
    write_moe(tmp_path / "moe", base)
    write_adapter(tmp_path / "adapter", base)
    write_npt_full(tmp_path / "full", base)
    (tmp_path / "around").mkdir()
    checkpoint.rename(tmp_path / "around" / "the one")
    found = {name: recognise(tmp_path / name)[1].name for name in ("moe", "adapter", "full", "around")}
    assert found == {"moe": "lora_moe", "adapter": "peft", "full": "npt_full", "around": "npt_delta"}
    assert recognise(tmp_path / "around")[0].path == tmp_path / "around" / "the one"
    assert recognise(base)[1].name == "hf"
    assert recognise(tmp_path / "around" / "the one" / "npt_weights.pt")[1].family == "npt"
