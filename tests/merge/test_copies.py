"""Tensors that the kernel copies: every other byte of the output is found, and NaN, and a source that ends early."""

import errno
import os

import pytest
import torch
from safetensors.torch import save_file

from runner.errors import CheckpointError, RunnerError
from runner.files import stored as files
from runner.files.staging import read_back
from runner.files.stored import Stored, all_finite, copy_range, stored_tensors
from runner.files.tensors import open_weights
from runner.merge import sink
from runner.merge.lazy_tensor import from_source
from runner.merge.plan import TensorFile
from runner.merge.verify import comparisons
from runner.merge.writer import write_tensors

TENSORS = {"a": torch.randn(300), "half": torch.randn(200).bfloat16(), "b": torch.randn(7, 30), "small": torch.ones(3)}


@pytest.fixture(params=["x.pt", "x.safetensors"])
def written(request, tmp_path, monkeypatch):
    """A file whose larger tensors are copied from one of the same layout, and what it was planned as."""
    monkeypatch.setattr(sink, "BUFFER", 100)
    source = tmp_path / request.param
    if source.suffix == ".pt":
        torch.save(TENSORS, source)
    else:
        save_file(TENSORS, source)
    weights = open_weights(source)
    file = TensorFile(name=f"out{source.suffix}", value={n: from_source(weights, i) for n, i in weights.infos.items()})
    hashes, runs = {}, {}
    write_tensors(tmp_path, [file], hashes=hashes, runs=runs)
    assert hashes == {file.name: None}
    return tmp_path, file, runs


def compare(folder, file, runs):
    read_back(folder / file.name, comparisons(folder, [file], lambda count: None, runs)[file.name])


def show(folder, file, runs, content):
    watch = comparisons(folder, [file], lambda count: None, runs)[file.name]
    for start in range(0, len(content), 500):
        watch(start, memoryview(content)[start : start + 500])
    watch(len(content), memoryview(b""))


def test_they_are_the_same_in_the_same_file(written):
    folder, file, runs = written
    compare(folder, file, runs)
    read = open_weights(folder / file.name)
    assert all(torch.equal(read.read(name), tensor) for name, tensor in TENSORS.items())
    assert sum(run.size for run in runs[file.name]) < 4000
    (folder / "again").mkdir()
    plain = TensorFile(name=file.name, value=file.value, finite=False)  # written through, not copied
    write_tensors(folder / "again", [plain])
    assert (folder / "again" / file.name).read_bytes() == (folder / file.name).read_bytes()


def test_every_other_byte_is_found_wherever_it_stands(written):
    """In a tensor, in a header, a name, the pickle, padding, a CRC or the directory at the end."""
    folder, file, runs = written
    healthy = (folder / file.name).read_bytes()
    for place in range(0, len(healthy), 3):
        changed = bytearray(healthy)
        changed[place] ^= 1 << place % 8
        with pytest.raises(RunnerError, match="verification failed"):
            show(folder, file, runs, changed)
    for shorter in (healthy[:-1], healthy[: len(healthy) // 2], b""):
        with pytest.raises(RunnerError, match="verification failed"):
            show(folder, file, runs, shorter)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["a", "half"])
def test_what_is_not_finite_is_refused_at_the_read_back(name, bad, tmp_path, monkeypatch):
    monkeypatch.setattr(sink, "BUFFER", 100)
    tensors = {key: tensor.clone() for key, tensor in TENSORS.items()}
    tensors[name].view(-1)[-1] = bad
    torch.save(tensors, tmp_path / "x.pt")
    weights = open_weights(tmp_path / "x.pt")
    file = TensorFile(name="out.pt", value={n: from_source(weights, i) for n, i in weights.infos.items()})
    runs = {}
    write_tensors(tmp_path, [file], runs=runs)
    with pytest.raises(CheckpointError, match=f"x.pt: {name}: NaN or Inf; such weights are not merged"):
        compare(tmp_path, file, runs)


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_what_is_not_finite(dtype):
    """As torch judges every pattern of the upper bits."""
    size = dtype.itemsize
    for upper in range(0, 256 if size == 1 else 1 << 16, 1 if size == 1 else 7):
        raw = upper.to_bytes(1 if size == 1 else 2, "little")
        content = bytes(size - len(raw)) + raw
        value = torch.frombuffer(bytearray(content), dtype=dtype).double()
        assert all_finite(memoryview(content), str(dtype).removeprefix("torch.")) == bool(value.isfinite()), content
    assert all_finite(memoryview(b"\xff" * 8), "int64")


@pytest.mark.parametrize("code", [errno.EXDEV, errno.ENOSYS])
def test_a_kernel_that_cannot_copy(code, tmp_path, monkeypatch):
    """Another file system: read and written instead. A failing disk stays a failing disk."""
    (tmp_path / "source").write_bytes(bytes(range(256)) * 40)
    place = Stored(path=tmp_path / "source", offset=100, size=9000)

    def fail(number):
        def call(*arguments):
            raise OSError(number, os.strerror(number))

        return call

    with (tmp_path / "target").open("wb", buffering=0) as target:
        monkeypatch.setattr(files.os, "copy_file_range", fail(code))
        assert sum(copy_range(place, target.fileno())) == 9000
        monkeypatch.setattr(files.os, "copy_file_range", fail(errno.EIO))
        with pytest.raises(OSError, match="Input/output error"):
            list(copy_range(place, target.fileno()))
    assert (tmp_path / "target").read_bytes() == place.view


def test_a_source_that_ends_early(tmp_path):
    (tmp_path / "source").write_bytes(bytes(50))
    with (tmp_path / "target").open("wb") as target, pytest.raises(CheckpointError, match="ends at byte 50"):
        list(copy_range(Stored(path=tmp_path / "source", offset=10, size=90), target.fileno()))


def test_tensors_that_do_not_stand_in_order_are_not_copied(tmp_path):
    whole = torch.randn(40, 50)
    torch.save({"turned": whole.T, "rows": whole[3:5], "whole": whole}, tmp_path / "x.pt")
    found = stored_tensors(tmp_path / "x.pt")
    assert set(found) == {"rows", "whole"}
    assert (found["rows"].crc, found["rows"].size) == (None, 400)
    assert bytes(found["rows"].view) == whole[3:5].numpy().tobytes()
