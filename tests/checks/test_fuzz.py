"""Random damage to every layout: whatever is changed, each check gives an answer of its own, and none breaks."""

import json
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from runner.errors import RunnerError
from tests.checks.test_damage import copy, originals, rows_of  # noqa: F401 - a fixture among them
from tests.lora_files import hashes

pytestmark = pytest.mark.fuzz
VALUES = [None, -1, 0, 1, 3, 10**9, 2.5, float("nan"), "x", "", [], [1], {}, True, {"a": [1]}]
SHAPES = [(), (0, 3), (2, 3, 4), (1,)]
LAYOUTS = ("lora_moe", "npt_delta", "gpt", "npt_full", "hf", "peft")


def other_value(content: Any, chance: random.Random) -> Any:
    if isinstance(content, dict) and content:
        name = chance.choice(list(content))
        content = {key: value for key, value in content.items() if key != name or chance.random() < 0.7}
        if name in content:
            content[name] = chance.choice(VALUES)
    return content


def other_tensors(held: dict[Any, torch.Tensor], chance: random.Random) -> dict[Any, torch.Tensor]:
    name = chance.choice(list(held))
    tensor = held.pop(name)
    changes = [
        lambda: {},
        lambda: {f"{name}{chance.choice(['x', '.0', '.99999999'])}": tensor},
        lambda: {name: torch.zeros(chance.choice(SHAPES))},
        lambda: {name: tensor.to(torch.int8)},
        lambda: {name: tensor.t().contiguous() if tensor.dim() == 2 else tensor},
        lambda: {str(name).replace("0", "7").replace("1", "0"): tensor},
    ]
    return held | chance.choice(changes)()


def other_bytes(file: Path, chance: random.Random) -> None:
    content = bytearray(file.read_bytes())
    if chance.random() < 0.5:
        content = content[: chance.randrange(len(content) + 1)]
    for _ in range(3):
        if content:
            content[chance.randrange(min(len(content), 2000))] = chance.randrange(256)
    file.write_bytes(bytes(content))


def damage(path: Path, chance: random.Random) -> None:
    file = chance.choice(sorted(each for each in (path.rglob("*") if path.is_dir() else [path]) if each.is_file()))
    if chance.random() < 0.2:
        other_bytes(file, chance)
    elif chance.random() < 0.1 and path.is_dir():
        file.unlink()
    else:
        try:
            rewrite(file, chance)
        except (ValueError, RuntimeError, SafetensorError, OSError, pickle.UnpicklingError):
            other_bytes(file, chance)


def rewrite(file: Path, chance: random.Random) -> None:
    if file.suffix == ".json":
        file.write_text(json.dumps(other_value(json.loads(file.read_text()), chance)))
    elif file.suffix == ".safetensors":
        save_file(other_tensors(load_file(file), chance), file)
    elif file.suffix == ".pt":
        content = torch.load(file, weights_only=True, mmap=False)
        inner = content.get("model")
        if isinstance(inner, dict) and chance.random() < 0.8:
            content["model"] = other_tensors(inner, chance)
        elif all(isinstance(value, torch.Tensor) for value in content.values()):
            content = other_tensors(content, chance)
        else:
            content = other_value(content, chance)
        torch.save(content, file)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_check_has_an_answer(layout, originals, tmp_path):  # noqa: F811
    chance = random.Random(layout)
    for number in range(120):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = copy(originals[layout], folder)
        for _ in range(chance.choice([1, 1, 1, 2])):
            damage(path, chance)
        before = hashes(folder)
        try:
            said = [row["details"] for row in rows_of(path, folder / "scratch").values()]
        except RunnerError as error:
            said = [str(error)]
        assert not [text for text in said if "internal error" in text or "\n" in text], (layout, number)
        assert {file: hash for file, hash in hashes(folder).items() if file in before} == before
        shutil.rmtree(folder)
