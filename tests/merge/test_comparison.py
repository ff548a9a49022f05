"""Comparing a file's content, as it comes, with the tensors that should lie in it."""

import zipfile
from pathlib import Path

import pytest
import torch

from runner.errors import RunnerError
from runner.files.tensors import file_offset, load_pickle
from runner.merge import torch_file
from runner.merge.lazy_tensor import LazyTensor, from_tensor, name_of, split
from runner.merge.plan import TensorFile
from runner.merge.verify import Expected, SourceComparison, comparisons
from runner.merge.writer import write_tensors

VALUE = {
    "one": torch.arange(5, dtype=torch.float32),
    "none": torch.zeros(0, 3),
    "two": torch.tensor([[1.5, float("nan")], [-0.0, 2.0]], dtype=torch.bfloat16),
    "three": torch.tensor(7),
}
STEPS = (1, 3, 64, 100_000)


@pytest.fixture(params=["file.pt", "file.safetensors"])
def written(request, tmp_path):
    """A file with these tensors, and its content."""
    value = {name: from_tensor(tensor, name) for name, tensor in VALUE.items()}
    file = TensorFile(name=request.param, value=value, finite=False)
    write_tensors(tmp_path, [file])
    return tmp_path, file, (tmp_path / file.name).read_bytes()


def show(comparison: SourceComparison, content: bytes, step: int) -> None:
    for offset in range(0, len(content), step):
        comparison(offset, memoryview(content)[offset : offset + step])
    comparison(len(content), memoryview(b""))


def watcher(directory: Path, file: TensorFile) -> SourceComparison:
    return comparisons(directory, [file])[file.name]


@pytest.mark.parametrize("step", STEPS)
def test_every_other_byte_of_a_tensor_is_found_under_its_name(step, written):
    directory, file, content = written
    show(watcher(directory, file), content, step)
    for name, tensor in VALUE.items():
        data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        start = content.index(data)
        for place in range(start, start + len(data)):
            other = bytearray(content)
            other[place] ^= 1
            with pytest.raises(RunnerError, match=f"verification failed: {name} "):
                show(watcher(directory, file), bytes(other), step)


@pytest.mark.parametrize("step", STEPS)
def test_a_file_that_ends_early_is_found(step, written):
    directory, file, content = written
    last = max(content.index(VALUE[name].view(-1).view(torch.uint8).numpy().tobytes()) for name in ("one", "three"))
    with pytest.raises(RunnerError, match="verification failed"):
        show(watcher(directory, file), content[: last + 1], step)
    with pytest.raises(RunnerError, match="verification failed"):
        show(watcher(directory, file), b"", step)


@pytest.mark.parametrize(
    "other",
    [
        {**VALUE, "one": torch.arange(5, dtype=torch.int32)},
        {**VALUE, "one": torch.arange(5, dtype=torch.float32).reshape(5, 1)},
        {name: tensor for name, tensor in VALUE.items() if name != "three"},
        {**VALUE, "four": torch.ones(1)},
    ],
    ids=["dtype", "shape", "missing", "more"],
)
def test_other_tensors_than_planned_are_refused(other, written):
    directory, file, _ = written
    planned = {name: from_tensor(tensor, name) for name, tensor in other.items()}
    with pytest.raises(RunnerError, match="verification failed"):
        watcher(directory, TensorFile(name=file.name, value=planned))


def expected(name: str, offset: int, tensor: torch.Tensor, parts=None) -> Expected:
    given = parts or (lambda: split(tensor))
    return Expected(
        name=name,
        offset=offset,
        tensor=LazyTensor(origin=name, dtype_name=name_of(tensor.dtype), shape=tuple(tensor.shape), parts=given),
    )


def test_tensors_that_share_bytes_are_refused():
    tensors = [expected("a", 0, torch.zeros(2)), expected("b", 4, torch.zeros(2))]
    with pytest.raises(RunnerError, match="b is not what"):
        show(SourceComparison(Path("f"), tensors, lambda count: None), bytes(12), 100)


def test_a_source_that_gives_too_few_elements_proves_nothing():
    tensors = [expected("a", 0, torch.zeros(2), lambda: iter([torch.zeros(1)]))]
    with pytest.raises(RunnerError, match="a is not what"):
        show(SourceComparison(Path("f"), tensors, lambda count: None), bytes(8), 100)


def test_tensors_behind_empty_ones_and_beyond_four_gigabytes_are_found(tmp_path, monkeypatch):
    """With the limit lowered; torch would calculate their places wrongly if the file said that it may."""
    value = {f"{name}{i}": t for i in range(40) for name, t in (("none", torch.zeros(0, i)), ("some", torch.ones(i)))}
    file = TensorFile(name="f.pt", value={name: from_tensor(tensor, name) for name, tensor in value.items()})
    for limit in (zipfile.ZIP64_LIMIT, 80):
        monkeypatch.setattr(torch_file, "_LIMIT", limit)
        monkeypatch.setattr(zipfile, "ZIP64_LIMIT", limit)
        directory = tmp_path / str(limit)
        directory.mkdir()
        write_tensors(directory, [file])
        show(watcher(directory, file), (directory / "f.pt").read_bytes(), 100_000)
        placed = load_pickle(directory / "f.pt")
        content = (directory / "f.pt").read_bytes()
        for name, tensor in value.items():
            place = file_offset(placed[name])
            assert content[place : place + tensor.nbytes] == tensor.numpy().tobytes(), name


def test_a_tensor_saved_with_strides_is_no_copy(tmp_path):
    torch.save({"a": torch.arange(6.0).reshape(2, 3).T}, tmp_path / "f.pt")
    file = TensorFile(name="f.pt", value={"a": from_tensor(torch.zeros(3, 2), "a")})
    with pytest.raises(RunnerError, match="a is not what"):
        watcher(tmp_path, file)
