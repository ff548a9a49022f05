"""The streamed safetensors file, read back by the library and by our own reader."""

import pytest
import torch
from safetensors.torch import load_file

from runner.errors import CheckpointError
from runner.files.tensors import open_weights
from runner.merge.lazy_tensor import from_tensor
from runner.merge.writer import new_file, write_safetensors

TENSORS = {
    "z": torch.randn(3, 5).bfloat16(),
    "a": torch.randn(2, 2),
    "byte": torch.arange(3).to(torch.uint8),
    "m": torch.randn(3).double(),
    "scalar": torch.tensor(1.5),
}


def write(path, tensors):
    with new_file(path) as sink:
        write_safetensors(sink, {name: from_tensor(tensor, name) for name, tensor in tensors.items()})
    return path


def test_the_library_and_our_reader_give_the_tensors_back(tmp_path):
    path = write(tmp_path / "x.safetensors", TENSORS)
    for read in (load_file(path), {name: open_weights(path).read(name) for name in TENSORS}):
        assert set(read) == set(TENSORS)
        assert all(
            torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in TENSORS.items()
        )


def test_the_header_keeps_the_order_and_elements_are_aligned(tmp_path):
    path = write(tmp_path / "x.safetensors", TENSORS)
    assert list(open_weights(path).infos) == list(TENSORS)
    raw = path.read_bytes()
    for name in ("a", "m"):
        assert raw.index(TENSORS[name].numpy().tobytes()) % TENSORS[name].element_size() == 0


def test_a_dtype_that_it_does_not_have_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="complex128"):
        write(tmp_path / "x.safetensors", {"a": torch.zeros(2, dtype=torch.complex128)})
