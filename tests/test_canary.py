"""No code from a checkpoint ever runs: hostile pickles and configs under an audit hook, with sockets blocked."""

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

from tests.conftest import MIXED, ROOT, npt_tensors, write_npt
from tests.gpt_files import random_state

# Runs in the child: every line of stdin is one command line as JSON; prints its exit code.
DRIVER = """
import json, sys
from runner import cli
import runner.tasks.diagnose, runner.families.lora.model, transformers  # what imports do is no concern of this test

FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect", "socket.getaddrinfo",
             "socket.bind", "urllib.Request", "ctypes.dlopen", "os.fork", "pty.spawn", "webbrowser.open")

def hook(event, args):
    if event in FORBIDDEN or (event in ("open", "import", "exec", "compile") and "canary" in repr(args[:2])):
        print(f"AUDIT {event} {args!r}"[:300], file=sys.stderr)
        raise RuntimeError(f"the audit hook saw {event}")

sys.addaudithook(hook)
for line in sys.stdin:
    print("CODE", cli.run(json.loads(line)))
"""
TOUCH = "touch canary"


class Calls:
    """A pickle that calls `function` with `arguments` when it is loaded carelessly."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


ATTACKS = {
    "os.system": Calls(os.system, TOUCH),
    "eval": Calls(eval, "open('canary', 'w')"),
    "exec": Calls(exec, "open('canary', 'w')"),
    "getattr": Calls(getattr, Calls(__import__, "os"), "system"),
    "popen": Calls(subprocess.Popen, ["touch", "canary"]),
}
MODULE = "open('canary', 'w')\nfrom transformers import LlamaForCausalLM as Evil\n"


def hostile_checkpoints(directory: Path, base: Path, attacks: list[str]) -> dict[str, Path]:
    """Checkpoints of every kind that would touch `canary` if something in them ran."""
    found = {}
    tensors = npt_tensors(base, MIXED)
    for name in attacks:
        attack = ATTACKS[name]
        for place in ("npt_weights.pt", "training_state.pt"):
            path = write_npt(directory / f"{name} in {place}", tensors, base=base)
            torch.save({**(tensors if place == "npt_weights.pt" else {"global_step": 1}), "x": attack}, path / place)
            found[f"{name} in {place}"] = path
        path = directory / f"{name}.pt"
        path.write_bytes(pickle.dumps(attack))
        found[path.name] = path
        info = directory / f"npt_full {name}"
        shutil.copytree(base, info)
        adapted = load_file(info / "model.safetensors")
        for matrix, shape in {"A_proj": (2, 32), "B_model": (32, 2), "B_ffn": (80, 2)}.items():
            adapted[f"model.layers.1.adapter.{matrix}.weight"] = torch.zeros(shape)
        save_file(adapted, info / "model.safetensors")
        torch.save({"step": 1, "args": attack}, info / "training_info.pt")
        found[info.name] = info
    remote = directory / "auto_map"
    shutil.copytree(base, remote)
    (remote / "canary_module.py").write_text(MODULE)
    config = json.loads((remote / "config.json").read_text())
    for file in ("config.json", "tokenizer_config.json"):
        content = json.loads((remote / file).read_text())
        content["auto_map"] = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "canary_module.Evil")
        content["auto_map"]["AutoTokenizer"] = ["canary_module.Evil", None]
        (remote / file).write_text(json.dumps(content))
    found["auto_map"] = remote
    custom = directory / "custom model type"
    shutil.copytree(remote, custom)
    (custom / "config.json").write_text(
        json.dumps({**config, "model_type": "canary_module", "auto_map": content["auto_map"]})
    )
    found["custom model type"] = custom
    target = write_npt(directory / "_target_", tensors, base=base)
    (target / "config.json").write_text(
        json.dumps({"model_name": str(base), "_target_": "os.system", "command": TOUCH, "x": "${oc.env:HOME}"})
    )
    found["_target_"] = target
    gpt = directory / "state_step000001.pt"
    torch.save({"step": 1, "code": f"import os; os.system({TOUCH!r})", "model": random_state("small", layers=8)}, gpt)
    found["code of a GPT"] = gpt
    return found


@pytest.mark.parametrize(
    "attacks", [["os.system"], pytest.param([*ATTACKS][1:], marks=pytest.mark.slow)], ids=["one", "rest"]
)
def test_nothing_executes(attacks, tmp_path, base):
    (tmp_path / "hostile").mkdir()
    found = hostile_checkpoints(tmp_path / "hostile", base, attacks)
    lines, names = [], []
    for name, path in found.items():
        for words in (["task=inspect"], ["task=diagnose", f"base={base}"], [f"reference={path}", f"ckpt={base}"]):
            given = words if any(word.startswith("ckpt=") for word in words) else [*words, f"ckpt={path}"]
            lines.append(json.dumps([*given, "tracker=none"]))
            names.append(f"{name}: {given}")
    done = subprocess.run(
        [sys.executable, "-c", DRIVER], input="\n".join(lines), cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    codes = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("CODE")]
    assert len(codes) == len(lines), done.stderr[-2000:]
    assert "AUDIT" not in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert set(codes) <= {0, 2}, [name for name, code in zip(names, codes, strict=True) if code not in (0, 2)]
    assert not list(tmp_path.rglob("canary"))
    harmless = ("auto_map", "_target_", "code of a GPT", "custom model type")
    refused = [code for name, code in zip(names, codes, strict=True) if not name.startswith(harmless)]
    assert set(refused) == {2}, [n for n, c in zip(names, codes, strict=True) if not n.startswith(harmless) and c != 2]
    opened = [
        code for name, code in zip(names, codes, strict=True) if name.startswith(harmless) and "task=inspect" in name
    ]
    assert set(opened) == {0}


def test_the_hook_would_see_it(tmp_path, base):
    """The same driver with a careless loader: the canary is seen, so the test above can fail."""
    path = tmp_path / "x.pt"
    path.write_bytes(pickle.dumps(ATTACKS["os.system"]))
    careless = DRIVER.replace("cli.run(json.loads(line))", "__import__('pickle').load(open(json.loads(line)[0], 'rb'))")
    done = subprocess.run(
        [sys.executable, "-c", careless], input=json.dumps([str(path)]), cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert "AUDIT os.system" in done.stderr
