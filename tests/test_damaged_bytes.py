"""Eight flipped bits that no shape and no NaN betrays: every task that reads them refuses, and publishes nothing."""

import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from runner.errors import DamagedError
from runner.files import archive as archives
from runner.files.tensors import file_offset, load_pickle, open_weights
from tests.checks.benches import write_npt_full
from tests.conftest import MIXED, npt_tensors, write_base, write_npt
from tests.gpt_files import random_state, script_file
from tests.lora_files import adapter_of, hashes, write_moe


def largest(value: Any) -> torch.Tensor:
    """The largest tensor anywhere in plain containers."""

    def tensors(value: Any) -> Iterator[torch.Tensor]:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (dict, list, tuple)):
            for item in value.values() if isinstance(value, dict) else value:
                yield from tensors(item)

    return max(tensors(value), key=lambda tensor: tensor.numel())


def flip(path: Path, key: str | None = None) -> None:
    """The lowest bit of eight of a tensor's values: of that under `key`, or of the whole file's largest."""
    content = load_pickle(path)
    start = file_offset(largest(content if key is None else content[key]))
    raw = bytearray(path.read_bytes())
    for place in range(start, start + 32, 4):
        raw[place] ^= 1
    path.write_bytes(raw)


def optimizer(parameters: dict[str, torch.Tensor]) -> dict[str, Any]:
    """An AdamW's state with moments."""
    state = {
        i: {"step": torch.tensor(1.0), "exp_avg": t, "exp_avg_sq": t.abs()} for i, t in enumerate(parameters.values())
    }
    return {"state": state, "param_groups": [{"params": list(range(len(parameters))), "lr": 1e-3}]}


def npt(directory: Path, base: Path) -> Path:
    path = write_npt(directory, npt_tensors(base, MIXED), base=base)
    state = {
        "global_step": 100,
        "optimizer_state_dict": optimizer(npt_tensors(base, MIXED)),
        "scheduler_state_dict": {},
    }
    torch.save(state, path / "training_state.pt")
    return path


def same_kind(directory: Path, base: Path) -> Path:
    """NPT layers as one training makes them, so that it could go on."""
    layers = {0: ("dual", 2, 2)}
    path = write_npt(directory, npt_tensors(base, layers), base=base)
    state = {
        "global_step": 100,
        "optimizer_state_dict": optimizer(npt_tensors(base, layers)),
        "scheduler_state_dict": {"a": 1},
    }
    torch.save(state, path / "training_state.pt")
    return path


def gpt(path: Path, base: Path) -> Path:
    state = random_state("small")
    return script_file(path, state, optimizers=[optimizer({"a": torch.randn(9000, 9)})])


def pytorch_bin(directory: Path, base: Path) -> Path:
    """A base whose weights lie in pytorch_model.bin."""
    from safetensors.torch import load_file

    path = write_base(directory)
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    return path


def npt_full(directory: Path, base: Path) -> Path:
    from safetensors.torch import load_file

    path = write_npt_full(directory, base)
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    return path


def moe(directory: Path, base: Path) -> Path:
    """Its router and adapters in torch.save files."""
    from safetensors.torch import load_file

    path = write_moe(directory, base)
    for file in (path / "router.safetensors", adapter_of(path, 0) / "adapter_model.safetensors"):
        torch.save(load_file(file), file.with_suffix(".bin" if "adapter" in file.name else ".pt"))
        file.unlink()
    return path


TRAIN = ("task=train", "data=world", "train.max_steps=4", "train.save_every=2", "train.warmup_steps=1")
RESUME = (*TRAIN, "base={base}", "train.layers=[0]", "train.modulation=dual", "train.np_rank=2", "train.num_ranks=2",
          "train.max_steps=200", "train.resume_from={path}")  # fmt: skip
MERGE = ("task=merge", "merge.sources=[{path},{other}]", "merge.output=out")
READ = {
    "diagnose": ("task=diagnose", "ckpt={path}"),
    "test minimal": ("task=test", "tier=minimal", "ckpt={path}"),
    "diff": ("task=diff", "ckpt={path}", "reference={other}"),
    "verify": ("task=verify", "ckpt={path}"),
}
CONVERT = ("task=convert", "ckpt={path}", "convert.output=out")
# What is written, the damaged file in it, the key of the damaged tensor, and the commands that read it.
CASES: dict[str, tuple[Callable[[Path, Path], Path], str, str | None, dict[str, tuple[str, ...]]]] = {
    "npt_weights.pt": (npt, "npt_weights.pt", None, {**READ, "convert": CONVERT, "merge": (*MERGE, "merge=average")}),
    "npt_weights.pt of a training": (same_kind, "npt_weights.pt", None, {"resume": RESUME}),
    "training_state.pt": (npt, "training_state.pt", None, {
        "convert": CONVERT, "merge": (*MERGE, "merge=average"), "verify": READ["verify"], "test minimal": READ["test minimal"],
    }),
    "training_state.pt of a training": (same_kind, "training_state.pt", None, {"resume": RESUME}),
    "GPT": (gpt, "", "model", {**READ, "convert": CONVERT, "merge": (*MERGE, "merge=average")}),
    "the optimizer of a GPT": (gpt, "", "optimizers", {
        "convert": CONVERT, "merge": (*MERGE, "merge=average"), "verify": READ["verify"], "test minimal": READ["test minimal"],
    }),
    "pytorch_model.bin": (pytorch_bin, "pytorch_model.bin", None, {
        **READ, "as a base": ("task=diagnose", "ckpt={npt}", "base={path}"), "train": (*TRAIN, "base={path}", "train.layers=[0]"),
        "functional merge": ("task=merge", "merge.sources=[{npt},{npt2}]", "merge.output=out", "merge.verify=functional", "base={path}"),
    }),
    "pytorch_model.bin of npt_full": (npt_full, "pytorch_model.bin", None, {**READ, "convert": (*CONVERT, "convert.to=hf")}),
    "router.pt": (moe, "router.pt", None, {**READ, "merge": MERGE}),
    "adapter_model.bin": (
        moe, "peft_adapters/expert_0/expert_0/adapter_model.bin", None, {**READ, "merge": MERGE}
    ),
    "skill_library.pt": (moe, "skill_library.pt", None, {
        "merge": MERGE, "verify": READ["verify"], "test minimal": READ["test minimal"],
    }),
}  # fmt: skip
TABLE = [pytest.param(case, task, id=f"{case}: {task}") for case, row in CASES.items() for task in row[3]]


@dataclass(frozen=True)
class Places:
    """A damaged checkpoint, a sound one of its kind, and the sound ones that commands name beside it."""

    path: Path
    other: Path
    npt: Path
    npt2: Path
    base: Path


def written(case: str, base: Path) -> tuple[Places, Path]:
    """The case's checkpoints in the current directory, and the file that is damaged."""
    write, inner, key, _ = CASES[case]
    suffix = ".pt" if write is gpt else ""
    path, other = write(Path(f"a/damaged{suffix}"), base), write(Path(f"b/sound{suffix}"), base)
    file = path / inner if inner else path
    flip(file, key)
    alone = [write_npt(Path(f"npt{layer}"), npt_tensors(base, {layer: ("dual", 2, 2)}), base=base) for layer in (0, 1)]
    return Places(path=path, other=other, npt=alone[0], npt2=alone[1], base=base), file


def compared(monkeypatch) -> list[int]:
    """The sizes of the records whose CRCs are compared from now on."""
    read: list[int] = []
    crc32 = zlib.crc32
    monkeypatch.setattr(archives.zlib, "crc32", lambda step, crc: read.append(len(step)) or crc32(step, crc))
    return read


def words_of(command: tuple[str, ...], places: Places) -> list[str]:
    return [word.format(**vars(places)) for word in command]


@pytest.mark.parametrize(("case", "task"), TABLE)
def test_flipped_bits_are_refused_by_whoever_reads_them(case, task, run, workdir, base):
    for directory in "ab":
        Path(directory).mkdir()
    places, file = written(case, base)
    before = hashes(Path())
    outcome = run(*words_of(CASES[case][3][task], places))
    message = rf"{re.escape(str(file))}: record \S+/data/\d+ \(at byte \d+\) is damaged: its CRC does not match"
    if outcome.code == 2:
        (line,) = outcome.err.splitlines()
        assert re.search(message, line), line
    else:
        # These two list what they found, check by check.
        assert (outcome.code, task) in {(1, "verify"), (1, "test minimal")}, outcome.err
        failed = [check["details"] for check in outcome.result["checks"] if check["status"] == "fail"]
        assert any(re.search(message, text) for text in failed), failed
    after = hashes(Path())
    assert {name: after.get(name) for name in before} == before
    left = {file.name for file in after.keys() - before.keys() if ".hydra" not in file.parts}
    assert left <= {"result.json", "runner.log"}
    assert not Path("out").exists()


@pytest.mark.parametrize("case", CASES)
def test_inspect_reads_headers_and_does_not_pay_for_crcs(case, run, workdir, base, monkeypatch):
    for directory in "ab":
        Path(directory).mkdir()
    places, _ = written(case, base)
    read = compared(monkeypatch)
    assert run("task=inspect", f"ckpt={places.path}").code == 0
    assert sum(read) <= 4 * 40  # a GPT's scalars are shown


def test_a_file_is_read_for_its_crcs_once_while_nobody_changes_it(workdir, base, monkeypatch):
    path = npt(Path("a"), base) / "npt_weights.pt"
    read = compared(monkeypatch)
    monkeypatch.setattr(archives, "_SETTLED", -1)
    archives.require_crc(path)
    once = sum(read)
    assert once >= sum(t.nbytes for t in npt_tensors(base, MIXED).values())
    archives.require_crc(path)
    weights = open_weights(path)
    for name in weights.infos:
        weights.read(name)
    assert sum(read) == once
    flip(path)
    weights = open_weights(path)
    for read_all in (lambda: archives.require_crc(path), lambda: list(map(weights.read, weights.infos))):
        with pytest.raises(DamagedError, match="its CRC does not match"):
            read_all()


def test_a_tensor_is_checked_when_it_is_read_and_once(workdir, base, monkeypatch):
    weights = open_weights(npt(Path("a"), base) / "npt_weights.pt")
    read = compared(monkeypatch)
    name, info = next(iter(weights.infos.items()))
    for _ in range(3):
        weights.read(name)
    assert read == [info.nbytes]
