"""Mutated files: a typed error or a load in which everything is what its header says; never a signal or a traceback.

Each example runs in a forked child, so that a crash of the process is seen. `RUNNER_FUZZ_SECONDS` sets the time.
"""

import io
import json
import os
import signal
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from runner.checkpoints.detect import open_checkpoint
from runner.errors import RunnerError
from tests.conftest import MIXED, npt_tensors, write_base
from tests.machine import SLOW

SECONDS = float(os.environ.get("RUNNER_FUZZ_SECONDS", "60"))
OK, TYPED, TRACEBACK = 0, 2, 3

pytestmark = pytest.mark.fuzz

edits = st.lists(
    st.tuples(
        st.floats(0, 1, exclude_max=True),  # where, as a share of the length
        st.sampled_from(["flip", "set", "insert", "delete", "copy", "cut"]),
        st.binary(min_size=1, max_size=8),
    ),
    min_size=1,
    max_size=4,
)


def mutated(data: bytes, changes: list[tuple[float, str, bytes]]) -> bytes:
    """`data` after the edits, one after another."""
    for share, kind, value in changes:
        at = int(share * max(1, len(data)))
        if kind == "flip":
            data = data[:at] + bytes(b ^ (1 << (value[0] % 8)) for b in data[at : at + 1]) + data[at + 1 :]
        elif kind == "set":
            data = data[:at] + value + data[at + len(value) :]
        elif kind == "insert":
            data = data[:at] + value + data[at:]
        elif kind == "delete":
            data = data[:at] + data[at + value[0] % 16 + 1 :]
        elif kind == "copy":
            data = data[:at] + data[: value[0]] + data[at:]
        else:
            data = data[:at]
    return data


def in_pickle(data: bytes, changes: list[tuple[float, str, bytes]]) -> bytes:
    """A .pt file whose data.pkl is mutated and whose CRCs are right."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as target:
        for name in source.namelist():
            content = source.read(name)
            target.writestr(name, mutated(content, changes) if name.endswith("data.pkl") else content)
    return out.getvalue()


def in_header(data: bytes, changes: list[tuple[float, str, bytes]]) -> bytes:
    """A safetensors file whose JSON header is mutated and whose length field is right."""
    length = int.from_bytes(data[:8], "little")
    header = mutated(data[8 : 8 + length], changes)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def judge(path: Path) -> int:
    """Open and read everything: OK, TYPED, or TRACEBACK for any other exception."""
    try:
        checkpoint = open_checkpoint(path)
        for name, info in checkpoint.weights.infos.items():
            tensor = checkpoint.weights.read(name)
            assert (tuple(tensor.shape), tensor.dtype) == (info.shape, info.dtype)
            tensor.float().sum() if tensor.is_floating_point() else tensor.sum()
    except RunnerError as error:
        return TYPED if str(error).isprintable() else TRACEBACK
    except BaseException:
        import traceback

        traceback.print_exc()
        return TRACEBACK
    return OK


def forked(path: Path) -> None:
    """`judge` in a child of at most 30 s; fails on a signal or a traceback."""
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        os._exit(judge(path))
    _, status = os.waitpid(child, 0)
    assert not os.WIFSIGNALED(status), f"killed by signal {os.WTERMSIG(status)}"
    assert os.WEXITSTATUS(status) in (OK, TYPED), f"exit status {os.WEXITSTATUS(status)}"


@pytest.fixture(scope="module")
def seeds(tmp_path_factory, base) -> dict[str, Path]:
    """A sound checkpoint of each kind of file."""
    directory = tmp_path_factory.mktemp("seeds")
    tensors = {name: t[:8, :8].contiguous() for name, t in npt_tensors(base, {0: MIXED[0], 1: ("dual", 2, 2)}).items()}
    torch.save(tensors, directory / "zip.pt")
    torch.save(tensors, directory / "legacy.pt", _use_new_zipfile_serialization=False)
    save_file(tensors, directory / "plain.safetensors")
    sharded = write_base(directory / "sharded", hidden=8, layers=1, vocab_size=272)
    from safetensors import safe_open

    with safe_open(sharded / "model.safetensors", "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    (sharded / "model.safetensors").unlink()
    names = sorted(weights)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for part, held in parts.items():
        save_file({name: weights[name] for name in held}, sharded / part)
    index = {"metadata": {}, "weight_map": {name: part for part, held in parts.items() for name in held}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    return {path.name: path for path in directory.iterdir()}


CASES: dict[str, tuple[str, str, Callable]] = {
    "zip": ("zip.pt", "", mutated),
    "pickle": ("zip.pt", "", in_pickle),
    "legacy": ("legacy.pt", "", mutated),
    "safetensors": ("plain.safetensors", "", mutated),
    "header": ("plain.safetensors", "", in_header),
    "index": ("sharded", "model.safetensors.index.json", mutated),
    "config": ("sharded", "config.json", mutated),
}


@pytest.mark.timeout(600 * SLOW)
@pytest.mark.parametrize("case", CASES)
def test_mutations_end_in_an_error_or_a_sound_load(case, seeds, tmp_path):
    source, inner, mutate = CASES[case]
    target = seeds[source] / inner if inner else tmp_path / source
    original = target.read_bytes() if inner else seeds[source].read_bytes()
    opened = seeds[source] if inner else target
    tried = 0

    @settings(
        max_examples=100, deadline=None, database=None, phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(edits)
    def one(changes):
        nonlocal tried
        tried += 1
        target.write_bytes(mutate(original, changes))
        forked(opened)

    target.write_bytes(original)
    assert judge(opened) == OK, "the seed itself must open"
    end = time.monotonic() + SECONDS / len(CASES)
    round_number = 0
    try:
        while time.monotonic() < end:
            seed(round_number)(one)()
            round_number += 1
    finally:
        target.write_bytes(original)
    print(f"{case}: {tried} mutations")
