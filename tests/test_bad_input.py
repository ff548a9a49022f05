"""Mistakes: one clear line, exit code 2, nothing written but the log and a result.json that says `error`."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import MIXED, ROOT, npt_tensors, write_base, write_npt


def canary():
    """A pickle that would create the file `executed`."""

    class Attack:
        def __reduce__(self):
            return os.system, ("touch executed",)

    return Attack()


def damaged(path: Path, base: Path) -> None:
    file = path / "npt_weights.pt"
    file.write_bytes(file.read_bytes()[:-3000])


def attacked(path: Path, base: Path) -> None:
    torch.save({"layer_0_np.W_down": torch.zeros(2, 2), "x": canary()}, path / "npt_weights.pt")


def attacked_state(path: Path, base: Path) -> None:
    (path / "training_state.pt").write_bytes(pickle.dumps(canary()))


def with_nan(path: Path, base: Path) -> None:
    tensors = npt_tensors(base, MIXED)
    tensors["layer_1_np.W_b_up_gate.2"][0, 3] = float("nan")
    torch.save(tensors, path / "npt_weights.pt")


def changed(change):
    def apply(path: Path, base: Path) -> None:
        tensors = npt_tensors(base, MIXED)
        change(tensors)
        torch.save(tensors, path / "npt_weights.pt")

    return apply


def renamed(old: str, new: str):
    return changed(lambda tensors: tensors.update({new: tensors.pop(old)}))


def only_training_state(path: Path, base: Path) -> None:
    (path / "npt_weights.pt").unlink()
    (path / "config.json").unlink()


def emptied(path: Path, base: Path) -> None:
    for file in path.iterdir():
        file.unlink()


def two_files(path: Path, base: Path) -> None:
    for name in ("a.pt", "b.pt"):
        torch.save(npt_tensors(base, {0: ("single", 2, 1)}), path / name)
    (path / "npt_weights.pt").unlink()


CASES = {
    "empty directory": (emptied, "the directory is empty"),
    "only a training state": (only_training_state, "No NPT layers found"),
    "no NPT keys": (changed(lambda t: (t.clear(), t.update(x=torch.zeros(2)))), "No NPT layers found"),
    "a key too many": (changed(lambda t: t.update(extra=torch.zeros(2))), r"unexpected keys \['extra'\]"),
    "a key too few": (changed(lambda t: t.pop("layer_2_np.W_a_up_down.3")), r"missing keys \['layer_2_np.W_a_up_down.3'\]"),
    "a rank too many": (
        changed(lambda t: t.update({"layer_1_np.W_down_up.3": torch.zeros(32, 4)})), r"layer_1_np.W_a_up_up.3"
    ),
    "both spellings": (
        changed(lambda t: t.update({"model.layers.0.np_component.W_down": t["layer_0_np.W_down"]})), "two spellings"
    ),
    "a rank number beyond reason": (renamed("layer_1_np.W_down_up.2", "layer_1_np.W_down_up.99999999999"), "missing keys"),
    "wrong shape": (changed(lambda t: t.update({"layer_1_np.W_a_up_up.0": torch.zeros(9, 32)})), r"\[9, 32\]"),
    "a layer beyond the base's depth": (
        changed(lambda t: [t.update({k.replace("_2_", "_7_"): t.pop(k)}) for k in list(t) if "_2_" in k]),
        "NPT layer 7.*only the layers 0 to 2",
    ),
    "NaN": (with_nan, r"NaN or Inf in layer_1_np.W_b_up_gate.2"),
    "truncated": (damaged, "npt_weights.pt"),
    "a pickle that calls os.system": (attacked, "system"),
    "a training state that calls os.system": (attacked_state, "training_state.pt: a plain Python pickle"),
    "several weights files": (two_files, "several files hold NPT weights: a.pt, b.pt"),
    "both formats": (lambda p, b: (p / "npt_weights.safetensors").write_bytes(b"x"), "npt_weights.pt and npt_weights.safetensors"),
    "integers": (changed(lambda t: t.update({k: v.to(torch.int8) for k, v in t.items()})), "int8"),
    "overflow": (changed(lambda t: t.update({k: v.double() * 1e300 for k, v in t.items()})), "overflow|Inf"),
    "a config that is no JSON": (lambda p, b: (p / "config.json").write_text("{"), "config.json is not valid JSON"),
    "a missing base": (lambda p, b: (p / "config.json").write_text('{"model_name": "nowhere"}'), "base model 'nowhere'"),
    "no base named": (lambda p, b: (p / "config.json").unlink(), "names no base model"),
}  # fmt: skip


def check(outcome, message: str) -> None:
    """One line, exit code 2, nothing left but log and result."""
    import re

    assert outcome.code == 2, outcome.err
    lines = outcome.err.splitlines()
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("runner: error: ")
    assert re.search(message, lines[0]), lines[0]
    assert outcome.out == ""
    assert not Path("executed").exists()


@pytest.mark.parametrize("name", CASES)
def test_damaged_checkpoint(name, run, checkpoint, base, workdir):
    damage, message = CASES[name]
    damage(checkpoint, base)
    before = {file: file.read_bytes() for file in checkpoint.iterdir()}
    outcome = run(f"ckpt={checkpoint}")
    check(outcome, message)
    assert {file: file.read_bytes() for file in checkpoint.iterdir()} == before
    result = outcome.result
    assert (result["status"], result["task"], result["ckpt"]) == ("error", "diagnose", str(checkpoint))
    assert set(result) == {"status", "task", "ckpt", "error"}
    assert set(result["error"]) == {"type", "message"}
    left = {file.name for file in Path("outputs").rglob("*") if file.is_file() and ".hydra" not in file.parts}
    assert left == {"result.json", "runner.log"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["task=merge", "merge.outptu=x"], "unknown key 'merge.outptu'; did you mean 'merge.output'?"),
        (["task=train", "train.max_step=5"], "unknown key 'train.max_step'; did you mean 'train.max_steps'?"),
        (["tracker.porject=x"], "unknown key 'tracker.porject'; did you mean 'tracker.project'?"),
        (["data.prompts.x=3"], "unknown key 'data.prompts.x'; did you mean 'data.prompts'?"),
    ],
)
def test_a_misspelt_key_inside_a_group(words, message, run):
    check(run(*words), message.replace("?", "[?]"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ckpt=nowhere/checkpoint-1"], "nowhere/checkpoint-1: no such file or directory"),
        (["base=nowhere"], "base=nowhere: neither a directory here nor available from the hub.*HF_TOKEN"),
        (["base=./nowhere"], "base=./nowhere: no such directory"),
        (["tokenizer=nowhere/else"], "tokenizer=nowhere/else: neither a directory here nor available from the hub.*HF_TOKEN"),
        (["dtype=float33"], "dtype=float33 is unknown; choose float32"),
        (["device=cuda:0"], "device=cuda:0 is not available here"),
        (["family=gpt"], "family=gpt"),
        (["format=gpt_smal"], "format=gpt_smal is no format"),
        (["tier=ful"], "did you mean 'full'?"),
        (["task=diagnos"], "did you mean 'diagnose'?"),
        (["acuracy=false"], "unknown key 'acuracy'; did you mean 'accuracy'?"),
        (["+typo=1"], "unknown key 'typo'"),
        (["tier.mesures=[logits]"], "tier.mesures"),
        (["+tier.typo=1"], "typo"),
        (["seed=x"], "seed"),
        (["accuracy=maybe"], "accuracy"),
        (["train.max_steps=3"], "train.max_steps belongs to task=train"),
        (["ckpt=a b[c"], "a b\\[c: no such file or directory"),
        (["nonsense"], "'nonsense' is no option"),
        (["--nonsense"], "unknown flag --nonsense"),
        (["step=5"], "checkpoint-100 is no run directory"),
        (["verdict.layer_mse=9"], "verdict.layer_mse is fixed"),
        (["data=text"], "data=text needs data.path=FILE"),
        (["task=convert"], "convert.output is needed"),
        (["data=text", "data.path=nowhere.txt"], "data.path=nowhere.txt: no such file"),
        (["output=/proc/nowhere/x.json"], "cannot be written"),
    ],
)  # fmt: skip
def test_wrong_option(words, message, run, checkpoint, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    given = [] if any(word.startswith("ckpt=") for word in words) else [f"ckpt={checkpoint}"]
    outcome = run(*given, *words)
    if words[0].startswith("output="):
        assert (outcome.code, len(outcome.err.splitlines())) == (2, 1)
    else:
        check(outcome, message)


def test_steps_there_are_are_listed(run, checkpoint, base):
    for step in (2000, 300):
        write_npt(checkpoint.parent / f"checkpoint-{step}", npt_tensors(base, MIXED), base=base, step=step)
    check(run(f"ckpt={checkpoint.parent}", "step=5"), "has no step 5; its steps are 100, 300, 2000")
    check(run(f"ckpt={checkpoint.parent}", "step=100,7", "-m"), "has no step 7; its steps are 100, 300, 2000")
    check(run(f"ckpt={checkpoint.parent}", "step=abc"), "step=abc")
    check(run(f"ckpt={checkpoint.parent}/checkpoint-*"), "matches several checkpoints; add -m")
    check(run(f"ckpt={checkpoint.parent}/nothing-*"), "matches nothing")


def test_base_of_another_width_and_kind(run, checkpoint, tmp_path):
    other = write_base(tmp_path / "wide", hidden=64)
    check(run(f"ckpt={checkpoint}", f"base={other}"), "made for hidden size 32.*the base .* has 64")
    config = json.loads((other / "config.json").read_text())
    for change, message in (
        ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
        ({"num_hidden_layers": 2}, "unexpected keys"),
        ({"num_hidden_layers": 4}, "missing keys"),
        ({"num_attention_heads": 8}, "shapes contradict"),
        ({"tie_word_embeddings": True}, "ties lm_head.weight to model.embed_tokens.weight, but the two differ"),
    ):
        (other / "config.json").write_text(json.dumps(config | change))
        check(run(f"ckpt={checkpoint}", f"base={other}"), message)


def test_tokenizer_of_another_model(run, checkpoint, base, tmp_path):
    small = write_base(tmp_path / "small", vocab_size=200)
    check(run(f"ckpt={checkpoint}", f"base={small}"), "another model's tokenizer")


def test_no_traceback_reaches_a_user(tmp_path):
    """As a process: what a terminal shows for a checkpoint that is not there."""
    done = subprocess.run(
        [sys.executable, "-m", "runner", "ckpt=no such=path,[x]", "tracker=none"], cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert (
        done.stderr
        == "runner: error: ckpt=no such=path,[x]: no such file or directory, and as a pattern it matches nothing\n"
    )
    assert done.stdout == ""


def test_a_base_of_whole_numbers_is_refused(run, base, tmp_path):
    model = Path(shutil.copytree(base, tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    save_file(
        {**tensors, "model.norm.weight": tensors["model.norm.weight"].to(torch.int8)}, model / "model.safetensors"
    )
    outcome = run(f"ckpt={model}", f"reference={base}")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "model.norm.weight is int8; weights are floating-point" in outcome.err
