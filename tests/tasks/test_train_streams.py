"""`task=train` on text of any size: it goes on bit for bit, whatever the files, and says what is wrong with them."""

import hashlib
import json
import random
from pathlib import Path

import pytest
import torch

from tests.conftest import write_base

FILES = ("npt_weights.pt", "training_state.pt", "multi_layer_state.pt", "config.json")
SMALL = (
    "task=train", "data=text", "train.layers=[0,2]", "train.np_rank=2", "train.num_ranks=2", "train.max_steps=12",
    "train.save_every=6", "train.warmup_steps=2", "train.sequence_length=16", "train.stride=8", "train.batch_size=2",
)  # fmt: skip
CURRICULUM = "train.curriculum='teacher:4,mixed:4:0.2-0.8:0.5,student:4'"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """The same documents in each kind of file."""
    chooser = random.Random(5)
    documents = [" ".join(chooser.choice("abcdefgh") * 3 for _ in range(chooser.randint(3, 30))) for _ in range(150)]
    root = tmp_path_factory.mktemp("corpus")
    (root / "texts").mkdir()
    for number in range(3):
        (root / "texts" / f"{number}.txt").write_text("\n\n".join(documents[number::3]))
    (root / "lines.jsonl").write_text("".join(json.dumps({"text": d, "n": 1}) + "\n" for d in documents))
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"body": documents}), root / "rows.parquet", row_group_size=40)
    pytest.importorskip("datasets").Dataset.from_dict({"text": documents}).save_to_disk(str(root / "saved"))
    return root


def hashes(checkpoint: Path) -> dict[str, str]:
    return {name: hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() for name in FILES}


def words(corpus: Path, kind: str) -> list[str]:
    return {
        "text": [f"data.path={corpus}/texts"],
        "glob": [f"data.path={corpus}/texts/*.txt", "train.shuffle_buffer=7"],
        "json lines": [f"data.path={corpus}/lines.jsonl", "train.gradient_accumulation_steps=2"],
        "parquet": [f"data.path={corpus}/rows.parquet", "data.column=body", "train.eval_every=3", "train.eval_batches=1", "train.eval_fraction=0.1"],
        "datasets": [f"data.path={corpus}/saved"],
        "mixture": [f"data.mix={{{corpus}/texts: 2, {corpus}/lines.jsonl: 1}}"],
    }[kind]  # fmt: skip


@pytest.mark.parametrize("kind", ["text", "glob", "json lines", "parquet", "datasets", "mixture"])
def test_a_resumed_training_is_the_uninterrupted_one(run, base, corpus, kind):
    """Weights, moments, schedule, stage, random state and position in the data: the files are the same bytes."""
    given = [*SMALL, CURRICULUM, *words(corpus, kind), f"base={base}"]
    whole = run(*given)
    assert (whole.code, whole.err) == (0, "")
    first, last = (Path(whole.result["ckpt"]).parent / f"checkpoint-{step}" for step in (6, 12))
    resumed = run(*given, f"train.resume_from={first}")
    assert (resumed.code, resumed.err) == (0, "")
    assert "findings" not in resumed.result
    assert hashes(Path(resumed.result["ckpt"])) == hashes(last)
    state = torch.load(last / "training_state.pt", weights_only=True)
    assert (state["global_step"], state["data_state"]["stream"]["drawn"]) == (12, 2 * state["batch_count"])
    assert state["rng_state"]["torch"].dtype == torch.uint8
    stages = torch.load(last / "multi_layer_state.pt", weights_only=True)
    assert stages["current_stage_index"] == 2
    assert stages["curriculum_schedule"][1] == {
        "name": "mixed", "until_step": 8, "mixing_ratio": 0.2, "mlp_mixing_ratio": 0.5, "mixing_ratio_end": 0.8,
        "mlp_mixing_ratio_end": 0.5,
    }  # fmt: skip


def test_what_is_not_given_is_as_the_checkpoint_has_it(run, base, corpus):
    """The command of the guide to merging: the layers, the checkpoint, more steps, and nothing else."""
    first = run(*SMALL, CURRICULUM, *words(corpus, "text"), f"base={base}", "train.learning_rate=5e-3").result
    short = ("task=train", "data=text", *words(corpus, "text"), "train.layers=[0,2]", "train.max_steps=14")
    done = run(*short, f"train.resume_from={first['ckpt']}", "train.weight_decay=0.5")
    assert (done.code, done.err) == (0, "")
    result = done.result
    assert result["step"] == 14
    assert set(result["findings"]) == {
        "train.resume_from: goes on with max_steps 14 after 12",
        "train.resume_from: goes on with weight_decay 0.5 after 0.0",
    }
    config = json.loads((Path(result["ckpt"]) / "config.json").read_text())
    assert (config["np_rank"], config["modulation"], config["learning_rate"], config["batch_size"]) == (
        2,
        "triple",
        5e-3,
        2,
    )
    assert config["curriculum"] == "teacher:4,mixed:4:0.2-0.8:0.5,student:4"
    group = torch.load(Path(result["ckpt"]) / "training_state.pt", weights_only=True)["optimizer_state_dict"][
        "param_groups"
    ][0]
    assert (group["initial_lr"], group["weight_decay"]) == (5e-3, 0.5)
    assert result["resumed"]["start_step"] == 12


def test_other_data_are_said(run, base, corpus):
    first = run(*SMALL, *words(corpus, "text"), f"base={base}").result
    done = run(
        *SMALL, *words(corpus, "json lines"), f"base={base}", f"train.resume_from={first['ckpt']}", "train.max_steps=13"
    )
    assert done.code == 0
    assert any("the data are read from their start: the data are others" in text for text in done.result["findings"])


BAD = {
    "an unknown stage": (["train.curriculum='techer:5'"], "'techer' is no stage; did you mean 'teacher'?"),
    "no steps": (["train.curriculum='teacher:0'"], "'0' is no number of steps above 0"),
    "negative steps": (["train.curriculum='teacher:-5'"], "'-5' is no number of steps above 0"),
    "a ratio too large": (["train.curriculum='mixed:5:1.5'"], "'1.5' is no ratio"),
    "layers beyond the base": (["train.layers=[1,7]"], "the base has the layers 0 to 2, not 7"),
    "a negative layer": (["train.layers=[-1]"], "train.layers=-1: must be a whole number, at least 0"),
    "no accumulation": (["train.gradient_accumulation_steps=0"], "train.gradient_accumulation_steps=0: must be a whole number, at least 1"),
    "negative max_steps": (["train.max_steps=-3"], "train.max_steps=-3: must be a whole number"),
    "a precision": (["train.precision=fp8"], "train.precision=fp8 is unknown"),
    "one weight for two layers": (["train.layer_weights=[1.0]"], "give a number for each of the 2 layers"),
    "betas": (["train.betas=[0.9]"], "train.betas=[0.9]: give two numbers"),
    "a column": (["data.path=CORPUS/lines.jsonl", "data.column=txt"], "has no column 'txt'; did you mean 'text'?"),
    "a column of parquet": (["data.path=CORPUS/rows.parquet"], "has no column 'text'; known are body; give data.column="),
    "an empty file": (["data.path=CORPUS/empty.txt"], "holds no text to train on"),
    "an empty directory": (["data.path=CORPUS/nothing"], "no *.txt, *.jsonl, *.parquet in it"),
    "not UTF-8": (["data.path=CORPUS/latin.txt"], "byte 1 is not UTF-8 text"),
    "no JSON": (["data.path=CORPUS/broken.jsonl"], "the line that ends at byte 9 is no JSON"),
    "no text": (["data.path=CORPUS/numbers.jsonl"], "its text is 3, not a text"),
    "no parquet": (["data.path=CORPUS/broken.parquet"], "cannot be read as parquet"),
    "nothing held out": (["train.eval_every=5", "train.eval_fraction=1e-9"], "the documents held out make no row of 16 tokens"),
    "a wrong weight": (["data.mix={CORPUS/texts: 0}"], "give paths with their weights above 0"),
    "new layers": (["train.resume_from=CHECKPOINT", "train.layers=[0,1,2]"], "has no NPT layers 1"),
}  # fmt: skip


@pytest.fixture(scope="module")
def spoiled(corpus) -> Path:
    (corpus / "empty.txt").write_text("\n \n\n")
    (corpus / "nothing").mkdir()
    (corpus / "latin.txt").write_bytes(b"a\xe9 b")
    (corpus / "broken.jsonl").write_text("{no json\n")
    (corpus / "numbers.jsonl").write_text('{"text": 3}\n')
    (corpus / "broken.parquet").write_bytes(b"PAR1" * 9)
    return corpus


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused(run, base, spoiled, case, checkpoint_of_two):
    given, message = BAD[case]
    given = [word.replace("CORPUS", str(spoiled)).replace("CHECKPOINT", str(checkpoint_of_two)) for word in given]
    done = run(*SMALL, f"data.path={spoiled}/texts", f"base={base}", *given)
    assert (done.code, len(done.err.splitlines())) == (2, 1), done.err
    assert message in done.err
    assert not list(Path("outputs").rglob("checkpoint-*"))


@pytest.fixture(scope="module")
def checkpoint_of_two(base, tmp_path_factory) -> Path:
    """A checkpoint of the layers 0 and 2."""
    from runner.evaluation.base_models import load_base
    from runner.evaluation.placement import Placement
    from runner.families.npt import EquivalenceSettings
    from runner.families.npt.training import train_run

    settings = EquivalenceSettings(
        layers=(0, 2), np_rank=2, num_ranks=2, max_steps=2, save_every=2, warmup_steps=0, batch_size=2
    )
    own = load_base(None, base, Placement(device="cpu"), llama=True)
    ids = torch.arange(3, 19)[None]
    return train_run(tmp_path_factory.mktemp("two"), own, [ids], settings, base_name=str(base))[1][-1]


def test_a_plan_trains_nothing(run, base, corpus):
    done = run(
        *SMALL,
        CURRICULUM,
        *words(corpus, "text"),
        f"base={base}",
        "train.dry_run=true",
        "train.gradient_accumulation_steps=3",
    )
    assert (done.code, done.err) == (0, "")
    plan = done.result["plan"]
    assert (plan["layers"], plan["tokens_a_step"], plan["trainable_parameters"]) == ([0, 2], 96, 2 * 3 * 4 * 144)
    assert [stage["last_step"] for stage in plan["stages"]] == [4, 8, 12]
    assert plan["data_bytes"] == sum(file.stat().st_size for file in (corpus / "texts").iterdir())
    assert not list(Path("outputs").rglob("checkpoint-*"))
    assert "Tokens a step: 96" in done.out
