"""The streamed .pt: what torch.save would have written, to torch, to the checks before torch, and to a mapping."""

import io
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from runner.files.archive import check_archive, verify_crc
from runner.files.tensors import load_pickle
from runner.merge import torch_file
from runner.merge.lazy_tensor import LazyTensor, from_tensor, replaced
from runner.merge.writer import new_file, write_torch_file
from tests.merge.sources import same

TENSORS = {
    "matrix": torch.randn(3, 5),
    "scalar": torch.tensor(3.0),
    "empty": torch.randn(2, 0, 4),
    "bfloat16": torch.randn(7).bfloat16(),
    "float16": torch.randn(7).half(),
    "float64": torch.randn(2, 2).double(),
    "float8": torch.randn(4).to(torch.float8_e4m3fn),
    "bool": torch.tensor([True, False]),
    "int64": torch.arange(5),
    "uint8": torch.arange(3).to(torch.uint8),
    "uint16": torch.arange(3).to(torch.uint16),
    "complex": torch.randn(2, dtype=torch.complex64),
    "transposed": torch.randn(4, 6).T,
    "long": torch.randn(1 << 21),
}
PLAIN = {1: [1, 2.5, None, True, "é", (1, 2), -5, 1 << 70], "o": OrderedDict(a=1, b=[]), "d": torch.float32, "": {}}


def lazy(value: object) -> object:
    """Tensors inside plain containers as lazy_tensor."""
    if isinstance(value, torch.Tensor):
        return from_tensor(value, "test")
    if isinstance(value, OrderedDict):
        return OrderedDict((k, lazy(v)) for k, v in value.items())
    if isinstance(value, dict):
        return {k: lazy(v) for k, v in value.items()}
    return value


def write(path: Path, value: object) -> bytes:
    with new_file(path) as sink:
        write_torch_file(sink, path.stem, lazy(value))
    return path.read_bytes()


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_reads_the_same_values(mmap, tmp_path):
    value = {"tensors": TENSORS, "plain": PLAIN}
    write(tmp_path / "x.pt", value)
    read = torch.load(tmp_path / "x.pt", weights_only=True, mmap=mmap)
    assert same(read["plain"], PLAIN)
    for name, tensor in TENSORS.items():
        assert read["tensors"][name].dtype == tensor.dtype, name
        assert torch.equal(read["tensors"][name].cpu(), tensor) or name == "float8", name
        assert read["tensors"][name].is_contiguous()
    assert torch.equal(read["tensors"]["float8"].float(), TENSORS["float8"].float())


def test_the_layout_is_that_of_torch_save(tmp_path):
    """The same records, each at a multiple of 64, as torch.save's own file has; the same pickle in meaning."""
    plain = {name: tensor for name, tensor in TENSORS.items() if name != "transposed"}
    write(tmp_path / "ours.pt", plain)
    torch.save(plain, tmp_path / "theirs.pt")
    with zipfile.ZipFile(tmp_path / "ours.pt") as ours, zipfile.ZipFile(tmp_path / "theirs.pt") as theirs:
        names = [entry.filename.split("/", 1)[1] for entry in ours.infolist()]
        # Those that promise more than the same content: the layout of miniz, an id.
        without = (".data/serialization_id", ".format_version", ".storage_alignment")
        assert names == [n for e in theirs.infolist() if (n := e.filename.split("/", 1)[1]) not in without]
        for name in names:
            if name != "data.pkl":
                assert ours.read(f"ours/{name}") == theirs.read(f"theirs/{name}"), name
        assert ours.testzip() is None
        raw = (tmp_path / "ours.pt").read_bytes()
        for entry in ours.infolist():
            at = entry.header_offset
            start = at + 30 + sum(int.from_bytes(raw[i : i + 2], "little") for i in (at + 26, at + 28))
            assert start % 64 == 0, entry.filename
    assert same(
        torch.load(tmp_path / "ours.pt", weights_only=True), torch.load(tmp_path / "theirs.pt", weights_only=True)
    )


def test_our_own_checks_accept_it(tmp_path):
    write(tmp_path / "x.pt", {"tensors": TENSORS, "plain": PLAIN})
    assert len(check_archive(tmp_path / "x.pt").records) == len(TENSORS)
    verify_crc(tmp_path / "x.pt")
    assert set(load_pickle(tmp_path / "x.pt", tensors="mmap")["tensors"]) == set(TENSORS)


def test_bytes_depend_on_values_alone(tmp_path):
    """Not on which equal strings, tuples or tensors are one object."""
    shape, name = (2, 2), "".join(["na", "me"])
    one = {"a": torch.ones(shape), "b": [name, name, (1, 2)], "c": torch.zeros(shape)}
    other = {
        "".join(["", "a"]): torch.ones(2, 2),
        "b": ["name", "".join(["n", "ame"]), (1, 2)],
        "c": torch.zeros((2, 2)),
    }
    (tmp_path / "one").mkdir()
    assert write(tmp_path / "one" / "x.pt", one) == write(tmp_path / "x.pt", other)


def test_records_beyond_four_gigabytes_have_the_long_form(tmp_path, monkeypatch):
    """With the limit lowered: every record, offset and size in the zip64 form, still aligned and readable."""
    monkeypatch.setattr(torch_file, "_LIMIT", 20)
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 20)
    value = {"a": torch.randn(50), "b": torch.randn(3, 40)}
    write(tmp_path / "x.pt", value)
    monkeypatch.undo()
    raw = (tmp_path / "x.pt").read_bytes()
    assert b"PK\x06\x06" in raw
    assert same(torch.load(tmp_path / "x.pt", weights_only=True, mmap=True), value)
    verify_crc(tmp_path / "x.pt")
    for tensor in value.values():
        assert raw.index(tensor.numpy().tobytes()) % 64 == 0


def test_foreign_objects_are_not_written(tmp_path):
    with pytest.raises(TypeError, match="a PosixPath"), new_file(tmp_path / "x.pt") as sink:
        write_torch_file(sink, "x", {"path": Path("a"), "io": io.BytesIO()})


def test_a_tensor_that_gives_too_little_is_caught(tmp_path):
    piece = LazyTensor(origin="short", dtype_name="float32", shape=(4,), parts=lambda: iter([torch.zeros(3)]))
    with pytest.raises(AssertionError, match="short"), new_file(tmp_path / "x.pt") as sink:
        write_torch_file(sink, "x", {"a": piece})


def test_tensors_are_found_wherever_they_are():
    tree = {"a": [lazy(torch.ones(2)), (lazy(torch.ones(3)), 1)], "b": OrderedDict(c=lazy(torch.ones(4)))}
    doubled = replaced(
        tree,
        lambda piece: LazyTensor(origin="", dtype_name=piece.dtype_name, shape=(*piece.shape, 1), parts=piece.parts),
    )
    assert type(doubled["b"]) is OrderedDict
    assert [doubled["a"][0].shape, doubled["a"][1][0].shape, doubled["b"]["c"].shape] == [(2, 1), (3, 1), (4, 1)]
