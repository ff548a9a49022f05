"""What only a process of its own can show: kills, interrupts, terminals, and what is printed."""

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from server import Server
from wandb_reader import read_runs

from tests.machine import LIMIT

ROOT = Path(__file__).parents[2]


def job(fields: dict[str, Any], result: dict[str, Any], end: str, **options: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(Path(__file__).with_name("job.py")), json.dumps(fields), json.dumps(result), end]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, **options)


def test_wandb_is_imported_when_a_run_starts() -> None:
    code = "import sys, runner.tracking.wandb as module; module.WandbTracker(); sys.exit('wandb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode == 0


def test_a_kill_after_record_loses_nothing(a_machine_of_its_own: Path, result: dict[str, Any]) -> None:
    assert job({}, result, "killed").wait(LIMIT) == -signal.SIGKILL
    (run,) = read_runs(a_machine_of_its_own)
    assert run.exit_code is None
    assert run.rows("train/step", "train/loss") == [(1, 0.5)]
    assert run.rows("checkpoint/step", "eval/mse") == [(2000, 0.25)]
    assert run.rows("layer/index", "layer/mse") == [(1, 0.05), (3, 0.2)]
    assert run.summary["verdict"] == "fair"
    assert run.table("tables/per_prompt")["nrows"] == 2
    assert "checkpoint-run7" in [artifact["name"] for artifact in run.artifacts]


def test_a_job_prints_nothing_and_leaves_the_home_alone(
    a_machine_of_its_own: Path, tmp_path: Path, result: dict[str, Any]
) -> None:
    process = job({}, result, "silent", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.communicate(timeout=LIMIT) == (b"", b"")
    assert process.returncode == 0
    assert list((tmp_path / "home").iterdir()) == []
    assert sorted(path.name for path in a_machine_of_its_own.rglob("*") if path.parent.name == "outputs") == ["wandb"]
    assert [path.name for path in a_machine_of_its_own.iterdir()] == ["outputs"]


def test_no_question_on_a_terminal(a_machine_of_its_own: Path, result: dict[str, Any]) -> None:
    terminal, end_of_job = pty.openpty()
    process = job(
        {"mode": "online"}, result, "told", stdin=end_of_job, stdout=end_of_job, stderr=end_of_job,
        start_new_session=True,
    )  # fmt: skip
    os.close(end_of_job)
    assert process.wait(LIMIT) == 0
    said = os.read(terminal, 4096).decode().strip()
    os.close(terminal)
    assert json.loads(said) == ["W&B: logged offline, no credential (WANDB_API_KEY, or `wandb login`)"]
    assert len(read_runs(a_machine_of_its_own)) == 1


def test_ctrl_c_while_a_server_hangs(result: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with Server("hang") as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
        process = job({"init_timeout": 100 * LIMIT}, result, "silent", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert server.asked.wait(LIMIT)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=LIMIT) == (b"", b"")
        assert process.returncode == 130


@pytest.mark.fault
@pytest.mark.parametrize("tables", [True, False])
def test_a_full_disk_is_one_warning(tables: bool, tmp_path: Path, result: dict[str, Any]) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("a small tmpfs cannot be mounted here")
    try:
        (small / "fill").write_bytes(bytes(60 * 1024))
        if not tables:
            result |= {"layers": [], "per_prompt": [], "ckpt": None}
        process = job({"dir": str(small)}, result, "told", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        out, err = process.communicate(timeout=LIMIT)
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)
    assert (process.returncode, err) == (0, b"")
    (warning,) = json.loads(out)
    assert warning.startswith("W&B: not everything was logged (")
