"""Trainings in processes of their own: several that train one model, one that is killed, and signals."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.conftest import ROOT
from tests.machine import LIMIT, SLOW, wait_for

pytestmark = [pytest.mark.fault, pytest.mark.timeout(600 * SLOW)]
COMMON = (
    "task=train", "base=base", "data=text", "data.path=text.txt", "train.layers=[0,2]", "train.np_rank=2",
    "train.warmup_steps=2", "train.sequence_length=16", "train.log_every=1", "tracker=none",
    "train.curriculum='teacher:7,mixed:7:0.5,student:6'", "device=cpu",
)  # fmt: skip
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def scene(tmp_path, base) -> Path:
    (tmp_path / "base").symlink_to(base)
    (tmp_path / "text.txt").write_text(
        "\n\n".join(f"The {word} sat on the mat, {word}." for word in "abcdefghijkl" * 4)
    )
    return tmp_path


def start(scene: Path, *words: str, processes: int = 1) -> subprocess.Popen:
    """`runner` with these words, under torchrun where there are several processes."""
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"] if processes > 1 else []
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "runner", *COMMON, *words],
        cwd=scene, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=LIMIT)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out, err


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "training_log.jsonl").read_text().splitlines()]


def test_two_processes_give_the_losses_of_one(scene):
    """With the same rows a step: 2 × 2 of two processes, 4 of one."""
    one = start(scene, "train.max_steps=20", "train.save_every=20", "train.batch_size=4", "hydra.run.dir=one")
    code, _, err = finish(one)
    assert (code, err) == (0, "")
    two = start(
        scene, "train.max_steps=20", "train.save_every=20", "train.batch_size=2", "hydra.run.dir=two", processes=2
    )
    code, out, err = finish(two)
    assert code == 0, err
    assert out.count("Last Checkpoint") == 1
    alone, together = rows(scene / "one"), rows(scene / "two")
    assert len(alone) == len(together) == 20
    for a, b in zip(alone, together, strict=True):
        assert (a["step"], a["tokens"]) == (b["step"], b["tokens"])
        for name in ("loss", "logits", "layer_0", "layer_2", "gradient_norm"):
            assert b[name] == pytest.approx(a[name], rel=1e-5), (name, a["step"])
    assert not (scene / "outputs").exists()


def test_a_killed_process_ends_the_others_in_one_line_and_leaves_a_checkpoint(scene):
    process = start(scene, "train.max_steps=1000000", "train.save_every=1000000", "hydra.run.dir=run", processes=2)
    wait_for(
        lambda: (scene / "run" / "training_log.jsonl").exists() and len(rows(scene / "run")) > 3, "nothing is trained"
    )
    workers = [p for p in psutil.Process(process.pid).children() if "runner" in p.cmdline()]
    (follower,) = [p for p in workers if p.environ()["RANK"] == "1"]
    follower.kill()
    code, _, err = finish(process)
    assert code != 0
    lines = [line for line in err.splitlines() if line.startswith("runner: ")]
    assert len(lines) == 1, err
    assert "another process of this training has ended; the last good checkpoint is" in lines[0]
    assert str(ROOT / "runner") not in err, "torchrun's own traceback is all that there is"
    (checkpoint,) = (scene / "run").glob("checkpoint-*")
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    again = start(scene, f"train.resume_from={checkpoint}", f"train.max_steps={step + 2}", "train.save_every=100")
    code, _, err = finish(again)
    assert (code, err) == (0, "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_mid_step_loses_nothing(scene, number):
    """The step is finished and saved; what goes on from there ends with the bytes of a training that never stopped."""
    words = ("train.max_steps=400", "train.save_every=400", "train.batch_size=2", "train.gradient_accumulation_steps=2")
    process = start(scene, *words, "hydra.run.dir=stopped")
    wait_for(
        lambda: (scene / "stopped" / "training_log.jsonl").exists() and len(rows(scene / "stopped")) > 3,
        "nothing is trained",
    )
    process.send_signal(number)
    code, _, err = finish(process)
    assert (code, err) == (130, "")
    result = json.loads((scene / "stopped" / "result.json").read_text())
    assert result["interrupted"] is True
    assert result["step"] < 400
    assert (scene / "stopped" / "curves.png").stat().st_size > 0
    for name, more in (("resumed", (f"train.resume_from={result['ckpt']}",)), ("whole", ())):
        code, _, err = finish(start(scene, *words, *more, f"hydra.run.dir={name}"))
        assert (code, err) == (0, "")
    files = ("npt_weights.pt", "training_state.pt", "multi_layer_state.pt", "config.json")
    one, other = (
        [hashlib.sha256((scene / name / "checkpoint-400" / file).read_bytes()).hexdigest() for file in files]
        for name in ("resumed", "whole")
    )
    assert one == other
