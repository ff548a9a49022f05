"""A Slurm cluster of one node, on this machine: Debian's packages slurmctld, slurmd, slurm-client and munge."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.machine import wait_for

CONFIG = """\
ClusterName=runner
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd.log
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 CoresPerSocket=2 RealMemory=4000
PartitionName=main Nodes=ALL Default=YES MaxTime=60 State=UP
"""
MUNGE = Path("/run/munge")


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cluster that SLURM_CONF names while the tests run. Skips where the packages are missing, or the rights."""
    missing = [
        name for name in ("slurmctld", "slurmd", "sbatch", "munged") if shutil.which(name, path=_search()) is None
    ]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: apt-get install slurmctld slurmd slurm-client munge")
    if os.geteuid() != 0:
        pytest.skip("starting slurmctld and slurmd needs root")
    directory = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (directory / name).mkdir()
    config = directory / "slurm.conf"
    config.write_text(CONFIG.format(host=socket.gethostname().partition(".")[0], directory=directory))
    before = {name: os.environ.get(name) for name in ("SLURM_CONF", "PATH")}
    os.environ |= {"SLURM_CONF": str(config), "PATH": _search()}
    own_munge = _start_munge()
    try:
        for name in ("slurmctld", "slurmd"):
            subprocess.run([name], check=True)
        wait_for(lambda: _said("sinfo", "-h", "-o", "%T") == "idle", f"no node is idle: see {directory}/slurmctld.log")
        yield
        subprocess.run(["scancel", "--user", "root"], check=False)
        wait_for(lambda: _said("squeue", "-h") == "", "jobs stay in the queue")
    finally:
        for name in ("slurmctld", "slurmd"):
            _stop(directory / f"{name}.pid")
        if own_munge:
            _stop(MUNGE / "munged.pid")
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _said(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True).stdout.strip()


def _search() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def _start_munge() -> bool:
    """Whether it had to be started."""
    if subprocess.run(["munge", "-n"], capture_output=True).returncode == 0:
        return False
    MUNGE.mkdir(exist_ok=True)
    shutil.chown(MUNGE, "munge", "munge")
    subprocess.run(["runuser", "-u", "munge", "--", shutil.which("munged")], check=True)
    return True


def _stop(pid_file: Path) -> None:
    if not pid_file.exists():
        return
    pid = int(pid_file.read_text())
    try:
        os.kill(pid, signal.SIGTERM)
        for _ in range(50):
            os.kill(pid, 0)
            time.sleep(0.1)
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
