"""task=finetune from the command line, for every family: what is learnt, what is left, and what goes on from it."""

import json
import random
import shutil
from pathlib import Path, PosixPath

import numpy
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
        data = (
            [f"data.train={files / 'train.jsonl'}", f"data.validation={files / 'validation.jsonl'}"] if family else []
        )
        return run("task=finetune", *own, *data, *quick, f"hydra.run.dir={out}", *words)

    return call


def classifier(path, base=None):
    checkpoint = open_checkpoint(path)
    family = Auto().of(checkpoint)
    return family.build(checkpoint, family.load_base(checkpoint, base, CPU), CPU)


def result(out="out"):
    return json.loads((Path(out) / "result.json").read_text())


def tensors(path):
    from safetensors.torch import load_file

    return {name: each for file in sorted(path.glob("*.safetensors")) for name, each in load_file(file).items()}


SLOW = ["gpt_small", "gpt_medium", "npt", "peft", "lora_moe"]
FAMILIES = ["hf", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
RATES = {"peft": "1e-1", "lora_moe": "1e-1", "npt": "1e-1", "gpt_small": "1e-2", "gpt_medium": "1e-2"}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_learns_a_separable_task(family, finetune, files, run):
    """Held-out accuracy of 95 % at least; what is reopened gives what was in memory."""
    rate = [f"train.learning_rate={RATES[family]}", "train.backbone_scale=0.3"] if family in RATES else []
    done = finetune(
        family, *rate, f"data.test={{hi: {files / 'hi.jsonl'}, ur: {files / 'ur.jsonl'}}}", "train.epochs=4"
    )
    assert done.code == 0, done.err
    found = result()
    assert found["metrics"]["accuracy"] >= 0.95
    assert [row["set"] for row in found["transfer"]] == ["validation", "hi", "ur"]
    assert "difference" not in found["transfer"][0]
    assert (
        found["transfer"][2]["difference_low"]
        <= found["transfer"][2]["difference"]
        <= found["transfer"][2]["difference_high"]
    )
    assert sum(map(sum, found["confusion"])) == found["metrics"]["rows"] == 40
    plain = run("task=diagnose", "ckpt=out/checkpoint-best")
    assert (plain.code, "is a classifier and continues no text" in plain.err) == (2, True), plain.err
    again = run("task=diagnose", "ckpt=out/checkpoint-best", "data=classification", f"data.test={files / 'hi.jsonl'}")
    assert again.code == 0, again.err
    assert again.result["metrics"]["accuracy"] == found["metrics"]["test/hi"]["accuracy"]
    assert again.result["metrics"]["loss"] == found["metrics"]["test/hi"]["loss"]


def test_a_resumed_run_equals_an_uninterrupted_one(finetune):
    """Weights, evaluations and what is best: bit for bit, dropout included; and so two runs of one seed are equal."""
    words = ("train.epochs=2", "train.dropout=0.2", "train.eval_every=10", "train.scope=last:2", "train.accumulation=2")
    assert finetune("hf", *words, out="whole").code == 0
    assert finetune("hf", *words, "train.max_steps=10", out="first").code == 0
    stopped = result("first")
    assert stopped["steps"] == 10
    assert "train.max_steps=10" in stopped["stopped"]
    rest = finetune(None, "train.resume_from=first", "train.max_steps=null", out="second", quick=())
    assert rest.code == 0, rest.err
    whole, second = result("whole"), result("second")
    assert second["evaluations"] == whole["evaluations"]
    assert second["steps"] == whole["steps"] == 20
    for name in ("checkpoint-last", "checkpoint-best"):
        ours = tensors(Path("second") / name)
        theirs = tensors(Path("whole") / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert second["metrics"]["accuracy"] == whole["metrics"]["accuracy"]


@pytest.mark.slow
def test_what_was_trained_and_nothing_else(finetune, run, models):
    """The whole tier on every scope of a Llama, and on low-rank updates of a GPT."""
    for family, words in (
        ("hf", ["train.scope=all"]), ("hf", ["train.scope=head"]), ("hf", ["train.scope=last:1"]),
        ("hf", ["train.lora.rank=2", "train.lora.targets=[q_proj,down_proj]"]), ("npt", []), ("lora_moe", []),
        ("gpt_small", ["train.lora.rank=2", "train.lora.targets=[q,o,fc,proj]"]), ("gpt_medium", ["train.lora.rank=2"]),
    ):  # fmt: skip
        shutil.rmtree("out", ignore_errors=True)
        done = finetune(family, *words, "train.epochs=1")
        assert done.code == 0, done.err
        tested = run("task=test", "tier=full", "ckpt=out/checkpoint-best")
        rows = {row["name"]: (row["status"], row["details"]) for row in tested.result["checks"]}
        assert tested.code == 0, rows
        assert {rows[name][0] for name in ("forward", "batch", "roundtrip", "gradients", "optimizer_step")} == {"pass"}


def test_low_rank_updates_open_with_peft_and_merged_with_transformers(finetune, models, run):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForSequenceClassification

    done = finetune("hf", "train.lora.rank=2", "train.epochs=1", "train.backbone_scale=5")
    assert done.code == 0, done.err
    own = classifier(Path("out/checkpoint-best"))
    base = AutoModelForSequenceClassification.from_pretrained(models["hf"][0].partition("=")[2], num_labels=3)
    base.config.pad_token_id = 0
    theirs = peft.PeftModel.from_pretrained(base, "out/checkpoint-best").eval()
    ids = torch.randint(3, 250, (4, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(own(ids).logits, theirs(input_ids=ids).logits, atol=1e-5, rtol=0)
    converted = run("task=convert", "ckpt=out/checkpoint-best", "convert.to=hf", "convert.output=whole")
    assert converted.code == 0, converted.err
    whole = AutoModelForSequenceClassification.from_pretrained("whole").eval()
    assert whole.config.id2label == {0: "0", 1: "1", 2: "2"}
    with torch.no_grad():
        torch.testing.assert_close(own(ids).logits, whole(input_ids=ids).logits, atol=1e-5, rtol=0)


def test_a_sweep_over_steps_shows_accuracy_against_step(run, models, files):
    base = Path(models["hf"][0].partition("=")[2])
    for step in (100, 200):
        shutil.copytree(base, Path("run") / f"checkpoint-{step}")
    done = run(
        "-m", "task=finetune", "ckpt=run", "step=all", f"data.train={files / 'train.jsonl'}", "data.group=language",
        f"data.test={{hi: {files / 'hi.jsonl'}, ur: {files / 'ur.jsonl'}}}", "train.scope=head", "train.epochs=1",
        "train.class_weights=balanced", "hydra.sweep.dir=sweep",
    )  # fmt: skip
    assert done.code == 0, done.err
    page = Path("sweep/comparison.html").read_text()
    assert page.count("Confusion · checkpoint-") >= 2
    assert "always the commonest class" in page
    assert "accuracy" in Path("sweep/comparison.csv").read_text().splitlines()[0]
    found = json.loads(next(Path("sweep").glob("0_*/result.json")).read_text())
    assert found["step"] == 100
    assert [row["set"] for row in found["transfer"]] == ["validation", "hi", "hi/a", "ur", "ur/i"]
    lines = [json.loads(line) for line in next(Path("sweep").glob("0_*/predictions.jsonl")).read_text().splitlines()]
    assert [line["set"] for line in lines].count("ur") == 20
    assert sum(lines[0]["probabilities"].values()) == pytest.approx(1)


def script_file(path, dialect, state, head, args=None):
    """The original's checkpoint, from a backbone's tensors and a head."""
    tensors = {}
    for name, tensor in state.items():
        if name.startswith("lm_head"):
            continue
        depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
        tensor = tensor[: 5 * depth] if name == "scalars" else tensor
        if dialect == "small" and name.startswith("blocks.") and name.endswith(".weight"):
            name = name.removesuffix(".weight") + "_weight"
        tensors[f"pretrained_model.{name}"] = tensor
    rest = {
        "iter_num": 900, "val_loss": numpy.float64(0.9515), "val_accuracy": numpy.float64(0.55),
        "val_f2": numpy.float64(0.53), "optimizer": {"state": {}, "param_groups": []},
        "args": {"dataset": "xnli-en-es-normal", "text_column": ["premise", "hypothesis"], "block_size": 1024,
                 "n_head": 1, "out_dir": PosixPath("checkpoints"), "n_embd": 128, "n_layer": 16, **(args or {})},
    }  # fmt: skip
    torch.save({"model": tensors | head, **rest}, path)
    return path


def head_of(width, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "1.weight": (width // 2, width),
        "1.bias": (width // 2,),
        "4.weight": (classes, width // 2),
        "4.bias": (classes,),
    }
    return {f"classifier.{name}": torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}


@pytest.mark.parametrize("dialect", ["small", "medium"])
def test_the_original_s_file_opens_safely(dialect, tmp_path, run, files, models):
    from tests.gpt_files import model, random_state

    state = random_state(dialect, vocab=512)
    path = script_file(tmp_path / "xnli-ckpt.pt", dialect, state, head_of(128))
    shown = run("task=inspect", f"ckpt={path}")
    assert shown.code == 0, shown.err
    assert (shown.result["format"], shown.result["step"], shown.result["classes"]) == ("finetuned", 900, 3)
    assert shown.result["figures"]["val_loss"] == 0.9515
    assert shown.result["labels"] == ["entailment", "neutral", "contradiction"]
    direct = Classifier(model(dialect, state), 3, head="mlp").eval()
    for name, parameter in direct.head_parameters().items():
        parameter.data.copy_(head_of(128)[name])
    ids = torch.randint(1, 500, (3, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(classifier(path)(ids).logits, direct(ids).logits)
    base = models["hf"][0].partition("=")[2]
    measured = run(
        "task=diagnose", f"ckpt={path}", "data=classification", f"data.test={files / 'hi.jsonl'}", f"tokenizer={base}"
    )
    assert measured.code == 0, measured.err
    assert measured.result["metrics"]["rows"] == 20


@pytest.mark.parametrize("dialect", ["small", "medium"])
def test_the_golden_original_gives_its_logits(dialect, tmp_path):
    from tests.gpt_files import opened

    rest, inputs = golden_file("finetune/original_layout_rest.pt"), golden_file(f"finetune/gpt_{dialect}/inputs.pt")
    if rest is None or inputs is None:
        pytest.skip("the golden data are not on this machine")
    given = torch.load(inputs, weights_only=True)
    checkpoint = opened(golden_file(f"gpt/{dialect}"), dialect)
    state = {name: checkpoint.weights.read(name) for name in checkpoint.details.keys}
    path = script_file(tmp_path / "xnli-ckpt.pt", dialect, state, given["head"])
    whole = torch.load(path, weights_only=False)
    torch.save(whole | torch.load(rest, weights_only=False), path)
    expected = json.loads(golden_file(f"finetune/gpt_{dialect}/expected.json").read_text())
    with torch.no_grad():
        found = classifier(path)(given["input_ids"], given["attention_mask"]).logits
    torch.testing.assert_close(found, torch.tensor(expected["logits"]), atol=1e-4, rtol=0)


def test_the_general_script_s_conversion_is_refused_by_name(tmp_path, run):
    from tests.gpt_files import random_state

    path = script_file(
        tmp_path / "xnli-ckpt.pt", "medium", random_state("medium"), head_of(128), {"n_layer": 12, "n_embd": 768}
    )
    refused = run("task=inspect", f"ckpt={path}")
    assert (refused.code, "family.force=true" in refused.err) == (2, True)
    forced = run("task=inspect", f"ckpt={path}", "family=finetuned", "family.force=true")
    assert forced.code == 0, forced.err
    assert any("another architecture" in text for text in forced.result["findings"])


def test_a_gpt_goes_back_into_the_original_s_layout(finetune, run):
    done = finetune("gpt_small", "train.epochs=1", "train.scope=lora", "train.learning_rate=1e-2")
    assert done.code == 0, done.err
    converted = run("task=convert", "ckpt=out/checkpoint-best", "convert.to=torch", "convert.output=back")
    assert converted.code == 0, converted.err
    file = torch.load("back/ckpt.pt", weights_only=True)
    assert {"pretrained_model.blocks.0.attn.c_proj_weight", "classifier.4.bias"} <= set(file["model"])
    assert file["val_accuracy"] == result()["metrics"]["accuracy"]
    ids = torch.randint(1, 250, (3, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = (classifier(Path(path))(ids).logits for path in ("out/checkpoint-best", "back"))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("words", "said"), [
    (["data.train=null"], "data.train is needed"),
    (["data.train=nowhere.csv"], "data.train=nowhere.csv: no such file"),
    (["dtype=bfloat16"], "weights are trained in float32"),
    (["train.scope=some"], "train.scope=some is unknown"),
    (["train.scope=last:9"], "the model has 3 blocks"),
    (["train.scope=added"], "complete by itself"),
    (["train.routing=train"], "has no router"),
    (["train.metric=val/speed"], "train.metric=val/speed is unknown"),
    (["train.lora.rnk=2"], "train.lora.rnk"),
    (["train.lora.targets=[q]"], "there is no matrix q"),
    (["train.eval_every=0"], "train.eval_every=0"),
    (["train.class_weights=balanced", "data.labels=[a,b,c,d]"], "no training row is of the class d"),
    (["train.resume_from=nowhere"], "nowhere"),
    (["data=text"], "data"),
])  # fmt: skip
def test_bad_input_is_one_line(words, said, finetune):
    done = finetune("hf", *words)
    assert (done.code, said in done.err) == (2, True), done.err
    assert len([line for line in done.err.splitlines() if "error" in line]) == 1


def test_a_changed_base_is_no_warning(finetune, run, files, tmp_path):
    base = write_base(tmp_path / "own")
    data = [f"data.train={files / 'train.jsonl'}", "train.epochs=1", "train.scope=head"]
    assert finetune(None, f"ckpt={base}", *data).code == 0
    measure = ["task=diagnose", "ckpt=out/checkpoint-best", "data=classification", f"data.test={files / 'hi.jsonl'}"]
    assert run(*measure).code == 0
    shutil.move(base, tmp_path / "moved")
    gone = run(*measure)
    assert (gone.code, "say where with family.backbone=" in gone.err) == (2, True), gone.err
    assert run(*measure, f"family.backbone={tmp_path / 'moved'}").code == 0
    write_base(Path(base), seed=5)
    changed = run(*measure)
    assert (changed.code, "its content has another hash" in changed.err) == (2, True), changed.err


def test_a_loss_that_is_not_finite_ends_it_and_the_best_stays(finetune):
    done = finetune(
        "hf",
        "train.learning_rate=1e38",
        "train.warmup=0.9",
        "train.eval_every=1",
        "train.weight_decay=0",
        "train.scope=head",
    )
    assert done.code == 1, done.err
    assert "no longer finite" in done.err
    assert (Path("out") / "checkpoint-best").is_dir()


def test_patience_counts_evaluations_and_ties_are_no_improvement(finetune):
    done = finetune("hf", "train.learning_rate=1e-12", "train.eval_every=2", "train.patience=3", "train.scope=head")
    assert done.code == 0, done.err
    found = result()
    assert len(found["evaluations"]) == 4
    assert found["metrics"]["best_step"] == 2
    assert "train.patience" in found["stopped"]
