"""What the reference computed is kept on disk, is bit for bit what would be computed, and never another model's."""

import json
import logging
import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from runner.evaluation import base_models as bases
from runner.evaluation import reference
from runner.evaluation.base_models import load_base
from runner.evaluation.placement import Placement
from runner.evaluation.tensor_cache import Store, content_hash, model_cache, name_of, read, write
from tests.conftest import npt_tensors, write_base, write_npt


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A base of its own, which the test may change, with a run on it; its files lie still for longer than clocks err."""
    path = write_base(tmp_path / "own", layers=2)
    write_npt(tmp_path / "run" / "checkpoint-7", npt_tensors(path, {1: ("dual", 2, 2)}), base=path, step=7)
    return path


@pytest.fixture
def settled(monkeypatch):
    """Files count as settled at once."""
    monkeypatch.setattr("runner.evaluation.tensor_cache._SETTLED", -1)


@pytest.fixture
def computed(monkeypatch):
    """The sequences that the reference really ran on."""
    seen = []
    original = reference.trace

    def counting(model, token_ids, keep=None):
        seen.append(len(token_ids))
        return original(model, token_ids, keep)

    monkeypatch.setattr(reference, "trace", counting)
    return seen


def forget() -> None:
    """As in a new process."""
    bases._bases.clear()
    reference.Reference._computed.clear()


def figures(outcome) -> dict:
    result = json.loads(max(Path("sweeps").glob("*/0_*/result.json"), key=lambda f: f.stat().st_mtime_ns).read_text())
    for key in ("timing", "versions"):
        result.pop(key)
    assert outcome.code == 0, outcome.err
    return result


def test_what_is_read_from_disk_is_bit_for_bit_what_is_computed(run, own, tmp_path, computed, settled):
    words = ("-m", f"ckpt={tmp_path / 'run'}", "step=7", "tier=full")
    forget()
    first = figures(run(*words, f"cache={tmp_path / 'cache'}"))
    assert computed
    computed.clear()
    forget()
    assert figures(run(*words, f"cache={tmp_path / 'cache'}")) == first
    assert computed == []
    forget()
    alone = run(*words[1:], f"cache={tmp_path / 'cache'}").result  # a single run: the hash is known by now
    assert (computed, alone["metrics"]) == ([], first["metrics"])
    forget()
    assert figures(run(*words, f"cache={tmp_path / 'other'}")) == first
    assert computed


def test_a_single_run_reads_no_weights_for_their_hash(run, own, tmp_path, computed):
    forget()
    run(f"ckpt={tmp_path / 'run'}", f"cache={tmp_path / 'cache'}")
    assert computed
    assert not (tmp_path / "cache").exists()


def shelf(own: Path, cache: Path, **options):
    forget()
    return model_cache(load_base(None, own, Placement(**options)), cache, may_read=True)


def test_a_weight_changed_in_place_with_its_time_set_back_is_another_model(own, tmp_path, settled):
    before = shelf(own, tmp_path / "cache")
    weights = own / "model.safetensors"
    stat = weights.stat()
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    with weights.open("r+b") as file:
        file.write(content)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (weights.stat().st_mtime_ns, weights.stat().st_ino) == (stat.st_mtime_ns, stat.st_ino)
    assert shelf(own, tmp_path / "cache").model != before.model


def test_another_dtype_config_or_number_of_threads_is_another_model(own, tmp_path, settled):
    names = {shelf(own, tmp_path / "cache", dtype=dtype).model for dtype in ("float32", "bfloat16", "float32")}
    assert len(names) == 2
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        names.add(shelf(own, tmp_path / "cache").model)
    finally:
        torch.set_num_threads(threads)
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-4}))
    names.add(shelf(own, tmp_path / "cache").model)
    assert len(names) == 4


def test_weights_that_change_after_loading_have_no_shelf(own, tmp_path):
    forget()
    base = load_base(None, own)
    os.utime(own / "model.safetensors")
    assert model_cache(base, tmp_path / "cache", may_read=True) is None


def test_a_hash_is_not_remembered_of_a_file_that_has_just_changed(tmp_path):
    file, memory = tmp_path / "file", tmp_path / "memory.json"
    file.write_text("one")
    first = content_hash([file], memory, may_read=True)
    assert content_hash([file], memory, may_read=False) is None
    known = json.loads(memory.read_text())
    known[str(file.resolve())]["hashed"] = time.time_ns() + 10_000_000_000
    memory.write_text(json.dumps(known))
    assert content_hash([file], memory, may_read=False) == first
    file.write_text("two")
    assert content_hash([file], memory, may_read=False) is None
    memory.write_text("{nonsense")
    assert content_hash([file], memory, may_read=True) != first


TENSORS = {
    "final": torch.arange(6.0).reshape(1, 2, 3),
    "tokens": torch.tensor([3, 1]),
    "half": torch.ones(3).bfloat16(),
}


def test_tensors_are_kept_exactly(tmp_path):
    store, name = Store(directory=tmp_path / "kept"), name_of("model", "trace", (1, 2))
    assert read(store, name) is None
    write(store, name, TENSORS)
    back = read(store, name)
    assert back.keys() == TENSORS.keys()
    assert all(torch.equal(back[key], TENSORS[key]) and back[key].dtype == TENSORS[key].dtype for key in TENSORS)
    assert read(store, name_of("model", "trace", (1, 3))) is None
    assert [file.name for file in store.directory.iterdir()] == [f"{name}.safetensors"]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "renamed", "no checksum", "nonsense"])
def test_a_damaged_file_is_told_and_made_again(tmp_path, damage, caplog):
    store, name = Store(directory=tmp_path), name_of("a")
    write(store, name, TENSORS)
    path = tmp_path / f"{name}.safetensors"
    content = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(content[:-5])
    elif damage == "flipped":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "renamed":
        name = name_of("b")
        path = path.rename(tmp_path / f"{name}.safetensors")
    elif damage == "no checksum":
        save_file(load_file(path), path)
    else:
        path.write_bytes(b"{}")
    with caplog.at_level(logging.WARNING):
        assert read(store, name) is None
    assert "computed again" in caplog.text
    assert not path.exists()
    write(store, name, TENSORS)
    assert read(store, name) is not None


def test_what_was_not_used_for_longest_goes_first(tmp_path):
    store = Store(directory=tmp_path, limit=20_000)
    for number in range(4):
        write(store, name_of(number), {"x": torch.full((1000,), float(number))})
        os.utime(tmp_path / f"{name_of(number)}.safetensors", (number, number))
    assert read(store, name_of(0)) is not None
    write(store, name_of(4), {"x": torch.zeros(1000)})
    assert [number for number in range(5) if read(store, name_of(number))] == [0, 2, 3, 4]
    write(store, name_of(9), {"x": torch.zeros(10_000)})  # too large to be worth the others
    assert read(store, name_of(9)) is None


def test_where_nothing_can_be_kept_a_warning_says_so(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        write(Store(directory=tmp_path / "file" / "kept"), name_of("a"), TENSORS)
    assert "nothing can be kept there" in caplog.text
