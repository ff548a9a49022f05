"""Damaged, changed and foreign inputs are found before anything is made of them."""

import hashlib
import random
import threading
from contextlib import suppress

import pytest
import torch

from runner.errors import CheckpointError
from runner.merge import inputs
from runner.merge.inputs import reading
from tests.machine import LIMIT


@pytest.fixture
def file(tmp_path):
    torch.save({"a": torch.randn(200), "b": torch.randn(50).bfloat16()}, tmp_path / "x.pt")
    return tmp_path / "x.pt"


def test_sound_files_and_their_hashes(file, tmp_path):
    text = tmp_path / "config.json"
    text.write_text("{}")
    with reading([file]) as found:
        for path in (file, text):
            found.check(path)
            assert found.sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_flipped_bit_in_any_record_is_found(file, monkeypatch):
    """Records only: a flip in the padding between them, or in a directory field that nobody reads, changes nothing."""
    monkeypatch.setattr(inputs, "_STEP", 64)
    healthy = file.read_bytes()
    storages = [
        healthy.index(torch.load(file, weights_only=True)[name].view(torch.uint8).numpy().tobytes()) for name in "ab"
    ]
    places = [*range(storages[0], storages[0] + 800, 37), *range(storages[1], storages[1] + 100, 9)]
    for place in places:
        file.write_bytes(healthy[:place] + bytes([healthy[place] ^ 4]) + healthy[place + 1 :])
        with (
            reading([file]) as found,
            pytest.raises(CheckpointError, match=r"x.pt: record x/data/\d \(at byte \d+\) is damaged"),
        ):
            found.check(file)


def test_damage_anywhere_raises_nothing_but_a_checkpoint_error(file):
    healthy = file.read_bytes()
    chooser = random.Random(0)
    for _ in range(300):
        damaged = bytearray(healthy)
        damaged[chooser.randrange(len(damaged))] ^= 1 << chooser.randrange(8)
        file.write_bytes(bytes(damaged[: chooser.randrange(1, len(damaged))] if chooser.random() < 0.2 else damaged))
        with reading([file]) as found, suppress(CheckpointError):
            found.check(file)


def test_files_without_crcs_have_none_to_compare(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.randn(20)}, tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    with reading([]) as found:
        found.check(tmp_path / "x.pt")


def test_a_file_that_changes_meanwhile_is_found(file):
    with reading([file]) as found:
        found.sha256(file)
        file.write_bytes(file.read_bytes()[:-1] + b"x")
        with pytest.raises(CheckpointError, match="was changed while it was merged"):
            found.sha256(file)


def test_a_missing_file(tmp_path):
    with reading([]) as found, pytest.raises(CheckpointError, match="cannot be read: No such file"):
        found.check(tmp_path / "nowhere.pt")


def test_leaving_early_does_not_wait_for_the_rest(tmp_path, monkeypatch):
    """A refused merge of large files ends at once."""
    steps, begun, told = inputs.Inputs._steps, threading.Event(), []

    def gated(self, view):
        for step in steps(self, view):
            begun.set()
            told.append(self._stop.wait(LIMIT))
            yield step

    monkeypatch.setattr(inputs, "_STEP", 1 << 10)
    monkeypatch.setattr(inputs.Inputs, "_steps", gated)
    (tmp_path / "large").write_bytes(bytes(64 << 10))
    before = threading.active_count()
    with reading([tmp_path / "large"]):
        assert begun.wait(LIMIT)
    assert told == [True]  # one of 64 steps
    assert threading.active_count() == before
