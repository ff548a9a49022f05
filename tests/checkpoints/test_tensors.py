"""Weights behind one interface: the same names, shapes and values from every layout, and every lie in it refused."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from runner.errors import CheckpointError
from runner.files.file_type import sha256_of
from runner.files.tensors import is_finite, non_finite, open_sharded, open_weights
from tests.checkpoints import hostile
from tests.machine import LIMIT

REPOSITORY = Path(__file__).parents[2]


def as_zip(folder: Path, state: Mapping[str, torch.Tensor]) -> Path:
    return hostile.saved(folder, dict(state), "pytorch_model.bin")


def as_legacy(folder: Path, state: Mapping[str, torch.Tensor]) -> Path:
    return hostile.saved(folder, dict(state), "old.pth", _use_new_zipfile_serialization=False)


def as_safetensors(folder: Path, state: Mapping[str, torch.Tensor]) -> Path:
    path = folder / "model.safetensors"
    save_file(dict(state), path, metadata={"format": "pt"})
    return path


def as_disguised_safetensors(folder: Path, state: Mapping[str, torch.Tensor]) -> Path:
    return as_safetensors(folder, state).rename(folder / "npt_weights.pt")


LAYOUTS = [as_zip, as_legacy, as_safetensors, as_disguised_safetensors]
ODD_NAMES = ("a b=c,[d]", "newline\nname", "émoji 🙂")


@pytest.mark.parametrize("folder_name", ["plain", *ODD_NAMES])
@pytest.mark.parametrize("write", LAYOUTS)
def test_every_layout_gives_the_same_tensors(write: Callable[..., Path], folder_name: str, tmp_path: Path) -> None:
    folder = tmp_path / folder_name
    folder.mkdir()
    state = {**hostile.good_state(), "empty": torch.empty(0, 3), "half": torch.ones(5, dtype=torch.float16)}
    path = write(folder, state)
    before = sha256_of(path)
    source = open_weights(path)
    assert source.path == path
    assert source.files == (path,)
    assert set(source.infos) == set(state)
    for name, tensor in state.items():
        info = source.infos[name]
        assert (info.name, info.shape, info.dtype) == (name, tuple(tensor.shape), tensor.dtype)
        assert (info.numel, info.nbytes) == (tensor.numel(), tensor.nbytes)
        assert torch.equal(source.read(name), tensor)
    # A reader who writes into what was read must not reach the file.
    if write is not as_legacy:
        source.read("layer.weight").zero_()
    assert sha256_of(path) == before


def test_names_keep_the_order_of_the_file(tmp_path: Path) -> None:
    state = {name: torch.ones(1) for name in ("z", "a", "m")}
    assert list(open_weights(as_zip(tmp_path, state)).infos) == ["z", "a", "m"]


def test_small_floats_and_odd_strides_read_right(tmp_path: Path) -> None:
    weight = torch.arange(12.0).reshape(3, 4)
    state = {
        "tied": weight,
        "same": weight,
        "transposed": weight.T,
        "row": weight[1],
        "e4m3": weight.to(torch.float8_e4m3fn),
        "e5m2": weight.to(torch.float8_e5m2),
        "wide": torch.full((2,), 1e300, dtype=torch.float64),
    }
    source = open_weights(as_zip(tmp_path, state))
    for name, tensor in state.items():
        assert source.read(name).dtype == tensor.dtype
        assert torch.equal(source.read(name).double(), tensor.double())


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_a_prefix_of_all_names_is_removed(prefix: str, tmp_path: Path) -> None:
    state = hostile.good_state()
    source = open_weights(as_zip(tmp_path, {prefix + name: tensor for name, tensor in state.items()}))
    assert source.stripped_prefix == prefix
    assert list(source.infos) == list(state)
    assert torch.equal(source.read("layer.bias"), state["layer.bias"])


def test_a_prefix_of_some_names_stays(tmp_path: Path) -> None:
    source = open_weights(as_zip(tmp_path, {"module.a": torch.ones(1), "b": torch.ones(1)}))
    assert source.stripped_prefix == ""
    assert list(source.infos) == ["module.a", "b"]


def test_state_dict_under_a_key(tmp_path: Path) -> None:
    model = {f"_orig_mod.{name}": tensor for name, tensor in hostile.good_state().items()}
    content = {"step": 7, "code": "print()", "model": {**model, "_extra": None}, "optimizers": [{"a": torch.ones(2)}]}
    source = open_weights(hostile.saved(tmp_path, content), state_dict_key="model")
    assert list(source.infos) == list(hostile.good_state())
    assert source.extras["step"] == 7
    assert source.extras["optimizers"][0]["a"].is_meta
    assert source.extras["model._extra"] is None
    assert "model" not in source.extras
    assert torch.equal(source.read("layer.weight"), hostile.good_state()["layer.weight"])


def test_bare_state_dict_where_a_key_is_asked_for(tmp_path: Path) -> None:
    source = open_weights(hostile.saved(tmp_path, hostile.good_state()), state_dict_key="model")
    assert list(source.infos) == list(hostile.good_state())
    assert not source.extras


def test_what_is_no_dict_of_tensors_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds a list, not a dict of tensors"):
        open_weights(hostile.saved(tmp_path, [torch.ones(1)]))


def test_unknown_and_changed_tensors_are_named(tmp_path: Path) -> None:
    path = as_zip(tmp_path, hostile.good_state())
    source = open_weights(path)
    with pytest.raises(CheckpointError, match=r"no tensor named nothing\\x1b"):
        source.read("nothing\x1b[2J")
    as_zip(tmp_path, {"layer.weight": torch.ones(3, 3)})
    with pytest.raises(CheckpointError, match=r"layer\.weight: changed since it was opened"):
        source.read("layer.weight")


def test_a_state_dict_that_vanished_is_named(tmp_path: Path) -> None:
    source = open_weights(hostile.saved(tmp_path, {"model": hostile.good_state()}), state_dict_key="model")
    hostile.saved(tmp_path, hostile.good_state())
    with pytest.raises(CheckpointError, match="not a dict of tensors"):
        source.read("layer.weight")


SAFETENSORS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "header larger than the file": (
        lambda f: hostile.safetensors(f, {"a": hostile.entry(0, 4)}, b"\0" * 4, length=1000),
        "truncated at byte",
    ),
    "header of 2^40": (lambda f: hostile.safetensors(f, b"{}", length=1 << 40), "the limit is 16 MB"),
    "truncated": (lambda f: hostile.safetensors(f, {"a": hostile.entry(0, 8)}, b"\0" * 4), "truncated at byte"),
    "trailing": (lambda f: hostile.safetensors(f, {"a": hostile.entry(0, 4)}, b"\0" * 9), "5 bytes after the last"),
    "hole": (
        lambda f: hostile.safetensors(f, {"a": hostile.entry(0, 4), "b": hostile.entry(8, 12)}, b"\0" * 12),
        "b: 4 bytes before it",
    ),
    "overlap": (
        lambda f: hostile.safetensors(f, {"a": hostile.entry(0, 8), "b": hostile.entry(4, 12)}, b"\0" * 12),
        "b: its bytes overlap",
    ),
    "duplicate key": (
        lambda f: hostile.safetensors(
            f, b'{"a": %s, "a": %s}' % ((json.dumps(hostile.entry(0, 4)).encode(),) * 2), b"\0" * 4
        ),
        "a: given twice",
    ),
    "shape lie": (lambda f: hostile.safetensors(f, {"a": hostile.entry(0, 4, (2,))}, b"\0" * 4), "needs 8 bytes"),
    "overflowing shape": (
        lambda f: hostile.safetensors(f, {"a": hostile.entry(0, 4, (1 << 40, 1 << 40))}, b"\0" * 4),
        "its offsets give 4",
    ),
    "negative shape": (lambda f: hostile.safetensors(f, {"a": hostile.entry(0, 4, (-1,))}, b"\0" * 4), "whole numbers"),
    "shape of floats": (
        lambda f: hostile.safetensors(f, {"a": hostile.entry(0, 4, [1.0])}, b"\0" * 4),
        "whole numbers",
    ),
    "unknown dtype": (
        lambda f: hostile.safetensors(f, {"a": hostile.entry(0, 4, (4,), "Q4\x1b")}, b"\0" * 4),
        "unknown dtype",
    ),
    "missing field": (lambda f: hostile.safetensors(f, {"a": {"dtype": "F32"}}), "needs dtype, shape"),
    "header is a list": (lambda f: hostile.safetensors(f, b"{}"[:1] + b"]"), "not valid JSON"),
    "nested JSON": (lambda f: hostile.safetensors(f, b'{"a":' + b"[" * 1_000_000), "not valid JSON"),
    "control characters": (
        lambda f: hostile.safetensors(f, {"a\x1b[31m\n": hostile.entry(0, 4, (2,))}, b"\0" * 4),
        r"a\x1b[31m\n: shape [2]",
    ),
    "metadata": (lambda f: hostile.safetensors(f, {"__metadata__": {"a": 1}}), "must map names to strings"),
}


@pytest.mark.parametrize("name", SAFETENSORS)
def test_damaged_safetensors_are_refused_in_one_line(name: str, tmp_path: Path) -> None:
    make, expected = SAFETENSORS[name]
    path = make(tmp_path)
    before = sha256_of(path)
    with pytest.raises(CheckpointError) as caught:
        open_weights(path)
    assert expected in str(caught.value)
    assert str(caught.value).isprintable()
    assert sha256_of(path) == before


def shards() -> dict[str, dict[str, torch.Tensor]]:
    return {
        "pytorch_model-00001-of-00002.bin": {"module.a": torch.ones(2), "module.b": torch.zeros(3)},
        "pytorch_model-00002-of-00002.bin": {"module.c": torch.arange(4)},
    }


def listing() -> dict[str, str]:
    return {name: shard for shard, state in shards().items() for name in state}


def test_shards_open_as_one_source(tmp_path: Path) -> None:
    source = open_sharded(hostile.sharded(tmp_path, listing(), shards()))
    assert source.stripped_prefix == "module."
    assert {name: info.shape for name, info in source.infos.items()} == {"a": (2,), "b": (3,), "c": (4,)}
    assert [path.name for path in source.files] == list(shards())
    assert torch.equal(source.read("c"), torch.arange(4))


def test_a_prefix_of_one_shard_alone_stays(tmp_path: Path) -> None:
    files = {**shards(), "pytorch_model-00002-of-00002.bin": {"c": torch.arange(4)}}
    weight_map = {name: shard for shard, state in files.items() for name in state}
    assert set(open_sharded(hostile.sharded(tmp_path, weight_map, files)).infos) == {"module.a", "module.b", "c"}


def test_shards_of_the_hub_cache_are_links_and_open(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    index = hostile.sharded(snapshot, listing(), shards())
    for place, name in enumerate(shards()):
        (snapshot / name).rename(blobs / str(place))
        (snapshot / name).symlink_to(Path("../../blobs") / str(place))
    assert set(open_sharded(index).infos) == {"a", "b", "c"}


def linked(folder: Path) -> Path:
    """A shard that is a link to a file outside."""
    index = hostile.sharded(folder, listing(), shards())
    name = next(iter(shards()))
    outside = folder.parent / f"{folder.name}-outside"
    outside.mkdir()
    (folder / name).rename(outside / name)
    (folder / name).symlink_to(outside / name)
    return index


def index_of(change: Callable[[dict[str, str], dict[str, dict[str, torch.Tensor]]], Any]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        weight_map, files = listing(), shards()
        change(weight_map, files)
        return hostile.sharded(folder, weight_map, files)

    return make


def raw_index(text: str) -> Callable[[Path], Path]:
    return lambda folder: hostile.written(folder, text.encode(), "model.safetensors.index.json")


FIRST, SECOND = shards()
INDEXES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "parent": (index_of(lambda m, f: m.update({"module.a": "../secret.bin"})), "plain file name"),
    "absolute": (index_of(lambda m, f: m.update({"module.a": "/etc/passwd"})), "plain file name"),
    "dots": (index_of(lambda m, f: m.update({"module.a": ".."})), "plain file name"),
    "control characters": (index_of(lambda m, f: m.update({"module.a": "x\x1b[2J.bin"})), r"x\x1b[2J.bin is missing"),
    "linked": (linked, "symbolic link"),
    "missing shard": (index_of(lambda m, f: f.pop(SECOND)), f"shard {SECOND} is missing"),
    "unlisted shard": (index_of(lambda m, f: m.pop("module.c")), f"does not list: {SECOND}"),
    "key in two shards": (index_of(lambda m, f: f[SECOND].update({"module.a": torch.ones(2)})), "module.a is in both"),
    "unlisted key": (index_of(lambda m, f: f[FIRST].update({"module.x": torch.ones(2)})), "module.x of"),
    "missing key": (index_of(lambda m, f: m.update({"module.x": FIRST})), "module.x is missing from"),
    "wrong shard": (index_of(lambda m, f: m.update({"module.c": FIRST})), SECOND),
    "not JSON": (raw_index("{"), "not valid JSON"),
    "empty": (raw_index(""), "empty file"),
    "duplicate": (raw_index('{"weight_map": {"a": "x", "a": "y"}}'), "a: given twice"),
    "no map": (raw_index('{"metadata": {}}'), "no weight_map"),
    "map of numbers": (raw_index('{"weight_map": {"a": 1}}'), "no weight_map"),
}


@pytest.mark.parametrize("name", INDEXES)
def test_a_lying_index_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    make, expected = INDEXES[name]
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    with pytest.raises(CheckpointError) as caught:
        open_sharded(make(folder))
    assert expected in str(caught.value)
    assert str(caught.value).isprintable()


FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", FLOATS)
def test_one_nan_or_infinity_is_found_anywhere(dtype: torch.dtype) -> None:
    values = torch.full((1000,), 1.0)
    assert is_finite(values.to(dtype), chunk=64)
    bad = [float("nan")] if dtype == torch.float8_e4m3fn else [float("nan"), float("inf"), float("-inf")]
    for value in bad:
        for place in (0, 63, 64, 999):
            changed = values.clone()
            changed[place] = value
            assert not is_finite(changed.to(dtype), chunk=64), (value, place)


def test_largest_numbers_are_finite() -> None:
    for dtype in FLOATS:
        extreme = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min], dtype=torch.float64).to(dtype)
        assert is_finite(extreme.repeat(100)), dtype


def test_non_finite_names_the_tensors(tmp_path: Path) -> None:
    state = {
        "good": torch.ones(3),
        "nan": torch.tensor([1.0, float("nan")]),
        "count": torch.tensor(3),
        "inf": torch.tensor([[float("inf")]]).T,
        "complex": torch.tensor([complex(1, float("nan"))]),
    }
    source = open_weights(as_zip(tmp_path, state))
    assert non_finite(source) == ["nan", "inf", "complex"]
    assert non_finite(source, ["good", "inf"]) == ["inf"]


LIGHT = """
import sys, resource
from pathlib import Path
from runner.files.tensors import open_weights
print(Path("/proc/self/io").read_text().split()[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in sys.argv[1:]:
    print(len(open_weights(Path(name)).infos))
print(Path("/proc/self/io").read_text().split()[1])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_opening_five_gigabytes_costs_nothing(tmp_path: Path) -> None:
    # Files with holes where the data would be: five gigabytes that take no space.
    with torch.serialization.skip_data():
        torch.save({f"layer.{i}": torch.empty(1 << 28) for i in range(5)}, tmp_path / "large.pt")
    header = json.dumps({f"layer.{i}": hostile.entry(i << 30, (i + 1) << 30, (1 << 28,)) for i in range(5)}).encode()
    with (tmp_path / "large.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + (5 << 30))
    paths = [tmp_path / "large.pt", tmp_path / "large.safetensors"]
    assert all(path.stat().st_size > 5 << 30 for path in paths)
    run = subprocess.run(
        [sys.executable, "-c", LIGHT, *paths], capture_output=True, text=True, cwd=REPOSITORY, timeout=LIMIT, check=True
    )
    before, *opened, after, kilobytes = map(int, run.stdout.split())
    assert opened == [5, 5]
    assert after - before < 50_000_000  # bytes read
    assert kilobytes < 50_000  # and mapped
