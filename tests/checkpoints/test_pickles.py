"""torch.save files: what is refused, in one line and before torch sees it, and what loads to exactly what was saved."""

import argparse
import builtins
import collections
import datetime
import functools
import os
import pickle
import resource
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from runner.checkpoints.checkpoint import plain
from runner.errors import CheckpointError
from runner.files.archive import verify_crc
from runner.files.file_type import sha256_of
from runner.files.tensors import Inert, load_pickle, read_number, read_pickle
from tests.checkpoints import hostile
from tests.machine import LIMIT

REPOSITORY = Path(__file__).parents[2]


def refused(path: Path) -> str:
    """The one line with which loading `path` is refused; the file must stay as it is."""
    before = sha256_of(path) if path.is_file() else None
    with pytest.raises(CheckpointError) as caught:
        load_pickle(path, tensors="mmap")
    assert before == (sha256_of(path) if path.is_file() else None)
    message = str(caught.value)
    assert message.isprintable()
    assert str(path) in message
    assert "weights_only" not in message
    return message


def quantised() -> torch.Tensor:
    return torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)


def sparse() -> torch.Tensor:
    return torch.sparse_coo_tensor(torch.tensor([[10**6]]), torch.ones(1), (2 * 10**6,))


def truncated(folder: Path) -> Path:
    path = hostile.saved(folder, hostile.good_state())
    path.write_bytes(path.read_bytes()[:-300])
    return path


def truncated_legacy(folder: Path) -> Path:
    path = hostile.saved(folder, hostile.good_state(), _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-10])
    return path


def longer_legacy(folder: Path) -> Path:
    path = hostile.saved(folder, hostile.good_state(), _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes() + b"\0" * 8)
    return path


def prepended(folder: Path) -> Path:
    """Two archives in one file: zipfile reads the second, a reader of the front the first."""
    path = hostile.saved(folder, hostile.good_state())
    return hostile.written(folder, path.read_bytes() * 2)


def overlapping(folder: Path) -> Path:
    """Two names in the zip directory that share one record."""
    path = hostile.archive(folder, {"data.pkl": hostile.tensor_pickle(), "data/0": b"\0" * 16, "data/1": b"\0" * 16})
    content = bytearray(path.read_bytes())
    first, second = (content.rindex(name) for name in (b"archive/data/0", b"archive/data/1"))
    content[second - 4 : second] = content[first - 4 : first]
    return hostile.written(folder, bytes(content))


def renamed(folder: Path) -> Path:
    return hostile.saved(folder, hostile.good_state()).rename(folder / "model.safetensors")


def fifo(folder: Path) -> Path:
    os.mkfifo(folder / "pipe.pt")
    return folder / "pipe.pt"


def drop(name: str) -> Callable[[dict[str, bytes]], Any]:
    return lambda entries: entries.pop(name)


def put(name: str, content: bytes) -> Callable[[dict[str, bytes]], Any]:
    return lambda entries: entries.update({name: content})


def pickle_of(data: bytes, **records: bytes) -> Callable[[Path], Path]:
    return lambda folder: hostile.pickled(folder, data, records)


def tensor(**sizes: Any) -> Callable[[Path], Path]:
    return lambda folder: hostile.pickled(folder, hostile.tensor_pickle(**sizes), {"0": b"\0" * 16})


DEEP_LIST = b"]" * 99_999 + b"a" * 99_998
DAMAGED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda f: f / "none.pt", "no such file"),
    "directory": (lambda f: f, "not a regular file"),
    "pipe": (fifo, "not a regular file"),
    "empty": (lambda f: hostile.written(f, b""), "empty file"),
    "lfs": (lambda f: hostile.written(f, hostile.LFS_POINTER), "git lfs pull"),
    "html": (lambda f: hostile.written(f, b"\n<!DOCTYPE html><html>404</html>"), "HTML"),
    "text": (lambda f: hostile.written(f, b"not a checkpoint\x1b[31m"), "not a weights file"),
    "plain pickle": (lambda f: hostile.written(f, pickle.dumps({"a": 1}, 2)), "plain Python pickle"),
    "truncated": (truncated, "truncated at byte"),
    "truncated legacy": (truncated_legacy, "truncated at byte"),
    "trailing legacy": (longer_legacy, "8 bytes after the last tensor"),
    "prepended": (prepended, "not where the archive says"),
    "overlapping": (overlapping, "overlaps"),
    "named safetensors": (renamed, "rename it"),
    "no data.pkl": (lambda f: hostile.rewritten(f, drop("data.pkl")), "without data.pkl"),
    "no record": (lambda f: hostile.rewritten(f, drop("data/0")), "storage 0 needs 512 bytes, its record is missing"),
    "short record": (lambda f: hostile.rewritten(f, put("data/0", b"\0" * 8)), "its record holds 8"),
    "big-endian": (lambda f: hostile.rewritten(f, put("byteorder", b"big")), "little-endian"),
    "torchscript": (lambda f: hostile.rewritten(f, put("constants.pkl", b"")), "TorchScript"),
    "escaping entry": (lambda f: hostile.rewritten(f, put("../evil", b"")), "not inside"),
    "deflated": (
        lambda f: hostile.archive(f, {"data.pkl": b"\0" * (1 << 24)}, compression=zipfile.ZIP_DEFLATED),
        "compressed",
    ),
    "duplicate entries": (
        lambda f: hostile.archive(f, [("data.pkl", b"\x80\x02}."), ("data.pkl", b"\x80\x02K\x01.")]),
        "duplicate zip entry",
    ),
    "not a pickle": (pickle_of(b"\xff\xff"), "damaged pickle"),
    "cut pickle": (pickle_of(hostile.tensor_pickle()[:-20]), "damaged pickle"),
    "left over": (pickle_of(b"\x80\x02}}."), "damaged pickle"),
    "mark as value": (pickle_of(b"\x80\x02}(X\x01\x00\x00\x00a(s."), "damaged pickle"),
    "protocol 4": (pickle_of(pickle.dumps({"a": 1}, 4)), "protocol 4"),
    "opcode": (pickle_of(b"\x80\x02S'a'\n."), "opcode STRING"),
    "long string": (pickle_of(b"\x80\x02X\xff\xff\xff\xff."), "longer than the limit"),
    "storage lie": (tensor(count=5), "storage 0 needs 20 bytes, its record holds 16"),
    "beyond storage": (tensor(shape=(5,)), "layer.weight: shape [5] needs 5 elements, its storage holds 4"),
    "offset": (tensor(offset=1), "layer.weight: shape [4] needs 5 elements"),
    "stride 0": (tensor(shape=(1 << 40,), stride=(0,)), "layer.weight: shape [1099511627776] repeats a storage"),
    "negative": (tensor(shape=(-1,)), "a size of -1"),
    "negative stride": (tensor(stride=(-1,)), "a size of -1"),
    "overflow": (tensor(shape=(1 << 62, 0), stride=(1, 1)), "a size of"),
    "other key": (tensor(key="../../etc"), "its record is missing"),
    "sparse": (lambda f: hostile.saved(f, {"layer.weight": sparse()}), "layer.weight: holds a sparse tensor"),
    "csr": (lambda f: hostile.saved(f, {"w": torch.eye(3).to_sparse_csr()}), "w: holds a sparse tensor"),
    "quantised": (lambda f: hostile.saved(f, {"w": quantised()}), "w: holds a quantised tensor"),
    "meta": (lambda f: hostile.saved(f, {"w": torch.empty(4, device="meta")}), "w: holds a meta tensor"),
    "nested": (lambda f: hostile.saved(f, {"w": torch.nested.nested_tensor([torch.ones(1)])}), "w: holds a nested"),
    "conjugate": (lambda f: hostile.saved(f, {"w": torch.ones(2, dtype=torch.complex64).conj()}), "w: a tensor with"),
    "whole module": (lambda f: hostile.saved(f, torch.nn.Linear(2, 2)), "refers to torch.nn.modules.linear.Linear"),
    "hidden method": (pickle_of(b"\x80\x02ccollections\nOrderedDict\n)R}X\x05\0\0\0itemsK\x01sb."), "hides one of"),
    "a set of a string": (pickle_of(b"\x80\x02cbuiltins\nset\nX\x01\0\0\0a\x85R."), "damaged pickle"),
    "a set of a number": (pickle_of(b"\x80\x02cbuiltins\nset\nK\x01\x85R."), "damaged pickle"),
    "a dict of a list of threes": (
        pickle_of(b"\x80\x02ccollections\nOrderedDict\n](K\x01K\x02K\x03\x87e\x85R."),
        "damaged pickle",
    ),
    "a number beyond floats": (
        pickle_of(b"\x80\x02cbuiltins\ncomplex\n\x8a\xff" + b"\x7f" * 255 + b"\x85R."),
        "torch cannot load this file",
    ),
    "a size that is a deep list": (
        lambda f: hostile.pickled(
            f,
            hostile.tensor_pickle().replace(hostile.tuple_of(hostile.number(4)), DEEP_LIST + b"\x85", 1),
            {"0": b"\0" * 16},
        ),
        "a size of a Container",
    ),
    "a size of thousands of digits": (tensor(shape=(1 << 2000,), stride=(1,)), "a size of a int too large"),
    "control characters": (
        pickle_of(b"\x80\x02cevil\x1b[2J\nname\n."),
        r"refers to evil\x1b[2J.name",
    ),
    "self-containing": (pickle_of(b"\x80\x02]q\x00h\x00a."), "holds itself"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_file_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    make, expected = DAMAGED[name]
    assert expected in refused(make(tmp_path))


CALLS: dict[str, Callable[[str], tuple[Any, ...]]] = {
    "posix.system": lambda c: (os.system, f"touch '{c}'"),
    "builtins.eval": lambda c: (eval, f"open({c!r}, 'w')"),
    "builtins.exec": lambda c: (exec, f"open({c!r}, 'w')"),
    "builtins.open": lambda c: (open, c, "w"),
    "builtins.getattr": lambda c: (getattr, hostile.Call(builtins.__import__, "os"), "system"),
    "subprocess.Popen": lambda c: (subprocess.Popen, ["touch", c]),
    "os.mkdir in a tuple": lambda c: (tuple, [hostile.Call(os.mkdir, c)]),
    "inside OrderedDict": lambda c: (collections.OrderedDict, [[hostile.Call(os.mkdir, c), 1]]),
    "torch.load": lambda c: (torch.load, c),
    "numpy.load": lambda c: (np.load, c),
    "pathlib.Path.touch": lambda c: (Path.touch, Path(c)),
}


@pytest.mark.parametrize("layout", [hostile.calling, hostile.calling_legacy])
@pytest.mark.parametrize("name", CALLS)
def test_nothing_in_a_pickle_executes(name: str, layout: Callable[..., Path], tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    path = layout(tmp_path, *CALLS[name](str(canary)))
    assert "nothing in a checkpoint is executed" in refused(path)
    assert not canary.exists()


def doubled(levels: int) -> bytes:
    """A pair of pairs of pairs …: a few bytes that print as 2^levels items."""
    steps = b"".join(b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(levels))
    return b"\x80\x02]q\x00" + steps + b"."


BOMBS: dict[str, Callable[[Path], Path]] = {
    "tuples 10^6 deep": pickle_of(b"\x80\x02)" + b"\x85" * 1_000_000 + b"."),
    "lists 10^6 deep": pickle_of(b"\x80\x02" + b"]" * 1_000_000 + b"a" * 999_999 + b"."),
    "deep tuple as a key": pickle_of(b"\x80\x02})" + b"\x85" * 1_000_000 + b"K\x01s."),
    "shared tuples": pickle_of(doubled(40)),
    "bytearray of 2^40": lambda f: hostile.calling(f, bytearray, 1 << 40),
    "storage of 2^40": tensor(count=1 << 40),
    "stride 0, 2^40": tensor(shape=(1 << 40,), stride=(0,)),
    "many opcodes": pickle_of(b"\x80\x02](" + b"N" * 3_000_000 + b"e."),
    "most opcodes": pickle_of(b"\x80\x02](" + b"]" * 1_999_990 + b"ecos\nsystem\n."),
    "entries without end": lambda f: hostile.archive(f, {f"data/{i}": b"" for i in range(20_000)}),
    "legacy string": lambda f: hostile.written(
        f, b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02X\xff\xff\xff\xff."
    ),
}
PROBE = """
import resource, sys
from pathlib import Path
from runner.files.tensors import load_pickle
from runner.errors import CheckpointError
from tests.checkpoints import hostile
virtual = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (virtual + (1 << 30),) * 2)
for name in sys.argv[1:]:
    try:
        load_pickle(Path(name), tensors="mmap")
        print("loaded")
    except CheckpointError as error:
        print(error)
"""


HEAVY = [name for name in BOMBS if "10^6" in name or "opcodes" in name or "without end" in name]


@pytest.mark.parametrize(
    "names", [sorted(BOMBS.keys() - HEAVY), pytest.param(HEAVY, marks=pytest.mark.slow)], ids=["light", "heavy"]
)
def test_bombs_end_within_a_gigabyte(names: list[str], tmp_path: Path) -> None:
    paths = []
    for place, make in enumerate(BOMBS[name] for name in names):
        folder = tmp_path / str(place)
        folder.mkdir()
        paths.append(make(folder))
    run = subprocess.run(
        [sys.executable, "-c", PROBE, *paths],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        timeout=LIMIT,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) == len(names)
    for name, line in zip(names, lines, strict=True):
        assert line != "loaded", name
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert children.ru_maxrss < 2 << 20  # kilobytes


def test_foreign_objects_become_inert_records(tmp_path: Path) -> None:
    content = {
        "args": argparse.Namespace(model_name="base", folder=Path("/a/b"), nothing=None),
        "loss": np.float64(2.5),
        "steps": np.int64(7),
        "half": np.float16(0.5),
        "array": np.arange(3),
        "when": datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
        "numpy_random_seed": np.random.get_state(),
    }
    loaded = load_pickle(hostile.saved(tmp_path, content))
    assert isinstance(loaded["args"], Inert)
    assert loaded["args"].state["model_name"] == "base"
    assert str(loaded["args"].state["folder"]) == "/a/b"
    assert repr(loaded["args"]).startswith("argparse.Namespace(model_name='base'")
    assert (loaded["loss"], loaded["steps"], loaded["half"]) == (2.5, 7, 0.5)
    assert type(loaded["loss"]) is float
    assert "argparse" not in type(loaded["args"]).__module__
    assert repr(loaded["array"]) == "numpy.ndarray(shape=(3,))"
    assert isinstance(loaded["when"], Inert)


def everything() -> dict[str, Any]:
    """One of each kind of value that torch.save writes."""
    weight = torch.arange(12.0).reshape(3, 4)
    marked = torch.nn.Parameter(torch.ones(2))
    marked.lr_mul = 2.0  # type: ignore[attr-defined]
    return {
        "weight": weight,
        "tied": weight,
        "row": weight[1],
        "transposed": weight.T,
        "repeated": torch.ones(1).expand(5),
        "parameter": torch.nn.Parameter(weight),
        "marked": marked,
        "scalar": torch.tensor(2.0),
        "none": torch.empty(0, 7),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "complex": torch.ones(2, dtype=torch.complex64),
        "nested": [{"a": (1, 2.5, "x", None, True, 10**30)}, {1, 2}, b"\x00\xff", bytearray(b"ab"), torch.Size([1])],
        "module": torch.nn.Linear(2, 3).state_dict(),
        "optimizer": torch.optim.AdamW(torch.nn.Linear(2, 3).parameters()).state_dict(),
        "dtype": torch.bfloat16,
    }


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("tensors", ["meta", "mmap"])
def test_what_torch_saves_loads_to_the_same(tmp_path: Path, legacy: bool, tensors: Any) -> None:
    content = everything()
    path = hostile.saved(tmp_path, content, _use_new_zipfile_serialization=not legacy)
    loaded = load_pickle(path, tensors=tensors)
    assert list(loaded) == list(content)
    assert loaded["nested"] == content["nested"]
    assert loaded["optimizer"]["param_groups"] == content["optimizer"]["param_groups"]
    for name, value in content.items():
        if isinstance(value, torch.Tensor):
            assert loaded[name].shape == value.shape
            assert loaded[name].dtype == value.dtype
            if tensors == "meta":
                assert loaded[name].is_meta
            else:
                assert torch.equal(loaded[name], value)


@pytest.mark.parametrize("legacy", [False, True])
def test_headers_are_read_without_torch_as_with_it(tmp_path: Path, legacy: bool) -> None:
    content = {
        **everything(),
        "args": argparse.Namespace(folder=Path("/a"), tensor=torch.ones(3)),
        "numpy": [np.float32(0.5), np.arange(3), np.random.get_state()],
        "when": datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
    }
    path = hostile.saved(tmp_path, content, _use_new_zipfile_serialization=not legacy)
    assert plain(read_pickle(path)) == plain(load_pickle(path))
    for name, tensor in content.items():
        if isinstance(tensor, torch.Tensor) and tensor.numel() == 1:
            assert read_number(path, name) == tensor.item()


def test_crc_finds_a_flipped_bit_that_torch_loads(tmp_path: Path) -> None:
    path = hostile.saved(tmp_path, hostile.good_state())
    verify_crc(path)
    with zipfile.ZipFile(path) as file:
        start = file.getinfo("weights/data/0").header_offset
    content = bytearray(path.read_bytes())
    content[start + 200] ^= 1
    path.write_bytes(bytes(content))
    torch.load(path, weights_only=True, mmap=True)
    for reader in (verify_crc, functools.partial(load_pickle, tensors="mmap")):
        with pytest.raises(CheckpointError, match=r"weights/data/0 \(at byte \d+\) is damaged"):
            reader(path)


def test_files_written_without_crc_pass(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        path = hostile.saved(tmp_path, hostile.good_state())
    finally:
        torch.serialization.set_crc32_options(True)
    verify_crc(path)


def test_any_flipped_byte_is_refused_or_found_by_crc_or_harmless(tmp_path: Path) -> None:
    state = hostile.good_state()
    path = hostile.saved(tmp_path, state)
    healthy = path.read_bytes()
    outcomes = collections.Counter[str]()
    with warnings.catch_warnings(action="error"):
        for place in range(0, len(healthy), 3):
            path.write_bytes(healthy[:place] + bytes([healthy[place] ^ 0x15]) + healthy[place + 1 :])
            try:
                loaded = load_pickle(path, tensors="mmap")
                verify_crc(path)
            except CheckpointError:
                outcomes["refused"] += 1
                continue
            outcomes["harmless"] += 1
            assert list(loaded) == list(state), place
            assert all(torch.equal(loaded[name], state[name]) for name in state), place
    assert outcomes["refused"] > 300
