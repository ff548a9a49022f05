"""task=finetune from the command line, for every family: what is learnt, what is left, and what goes on from it."""

import json
import random
import shutil

import pytest
import torch

from runner.checkpoints.detect import open_checkpoint
from runner.evaluation.placement import Placement
from runner.families.family import Auto
from runner.finetuning.classifier import Classifier
from tests.conftest import MIXED, golden_file, npt_tensors, write_base, write_gpt, write_npt, write_tokenizer

CPU = Placement(device="cpu", dtype="float32")
# Enough for the toy task, and no more.
QUICK = ("train.learning_rate=2e-2", "train.backbone_scale=0.5", "train.batch_size=8", "train.dropout=0")


def toy(count, seed, letters="abcdefgh"):
    """Rows whose label stands in the hypothesis."""
    chooser = random.Random(seed)
    rows = []
    for _ in range(count):
        label = chooser.randrange(3)
        premise = "".join(chooser.choice(letters) for _ in range(chooser.randint(2, 9)))
        rows.append({"premise": premise, "hypothesis": "xyz"[label] * 3, "label": label, "language": letters[:1]})
    return rows


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("labelled")
    for name, rows in (
        ("train", toy(160, 0)), ("validation", toy(40, 1)), ("hi", toy(20, 2)), ("ur", toy(20, 3, "ijkl")),
    ):  # fmt: skip
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Where a tiny checkpoint of each family lies, with what a command line says of it."""
    from tests.lora_files import write_adapter, write_moe

    root = tmp_path_factory.mktemp("models")
    base = write_base(root / "base")
    for dialect in ("small", "medium"):
        (root / dialect).mkdir()
        write_gpt(root / dialect, dialect)
        write_tokenizer(root / dialect)
    npt = write_npt(root / "npt" / "checkpoint-100", npt_tensors(base, MIXED), base=base)
    return {
        "hf": [f"ckpt={base}"],
        "gpt_small": [f"ckpt={root / 'small'}"],
        "gpt_medium": [f"ckpt={root / 'medium'}"],
        "npt": [f"ckpt={npt}", f"base={base}"],
        "peft": [f"ckpt={write_adapter(root / 'peft', base)}", f"base={base}"],
        "lora_moe": [f"ckpt={write_moe(root / 'moe', base)}", f"base={base}"],
    }


@pytest.fixture
def finetune(run, models, files):
    def call(family, *words, out="out", quick=QUICK):
        own = models[family] if family else []
        data = [f"data.train={files / 'train.jsonl'}", f"data.validation={files / 'validation.jsonl'}"] if family else []
        return run("task=finetune", *own, *data, *quick, f"hydra.run.dir={out}", *words)

    return call


def classifier(path, base=None):
    checkpoint = open_checkpoint(path)
    family = Auto().of(checkpoint)
    return family.build(checkpoint, family.load_base(checkpoint, base, CPU), CPU)


def result(out="out"):
    with open(f"{out}/result.json") as file:
        return json.load(file)


def tensors(path):
    from safetensors.torch import load_file

    return {name: each for file in sorted(path.glob("*.safetensors")) for name, each in load_file(file).items()}
