"""Hydra's launchers: which there are, what each needs, and how a list of jobs is handed to one.

A launcher is called through its plugin interface, `launch`; only submitit's jobs are submitted here
(runner/sweeps/submitit_jobs.py). Limits that come with that: joblib's pool dies with any worker that is killed, so the
jobs beside it are lost too (`resume=` runs them again), and Ray says nothing of a job until all have ended.
"""

import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig

from runner.config import one_as_list
from runner.errors import ConfigError, did_you_mean, printable
from runner.overrides import CommandLine, quoted
from runner.sweeps.plan import PlannedJob

KEY = "hydra/launcher"
# Of the launchers in conf/: processes or jobs at a time, and a job's time in minutes.
_COUNTS = ("n_jobs", "jobs_at_once", "array_parallelism", "timeout_min")
# Of theirs, what is a list: submitit adds it to others.
_LISTS = ("setup",)
# The package that a launcher comes from, and the extra of ours that brings it.
_NEEDS = {
    "joblib": ("hydra_joblib_launcher", "launchers"),
    "submitit_local": ("hydra_submitit_launcher", "launchers"),
    "submitit_slurm": ("hydra_submitit_launcher", "launchers"),
    "ray": ("hydra_ray_launcher", "ray"),
}
# Errors whose text says more without the name of their type: those of sbatch.
_SAY_IT_ALL = ("FailedJobError", "FailedSubmissionError")


def use_own_configs(conf: Path) -> None:
    """Let the launchers that lie in `conf` stand for those of the same names that Hydra's plugins bring: a file of the
    same name would be merged into the plugin's, which Hydra has deprecated."""
    Plugins.instance()  # the plugins put their configs into the store when they are found
    stored = ConfigStore.instance().repo.get("hydra", {}).get("launcher", {})
    for file in (conf / KEY).glob("*.yaml"):
        stored.pop(file.name, None)


def check_launcher(line: CommandLine, conf: Path) -> None:
    """Raise ConfigError where the chosen launcher is unknown, or needs what this installation or machine lacks; and
    for a sweeper of Hydra's instead of our own."""
    given = {key.lstrip("+~") for key, _ in line.overrides}
    if any(key == "hydra/sweeper" or key.startswith("hydra.sweeper.params") for key in given):
        raise ConfigError("hydra.sweeper.params and other sweepers are not supported; give the values as key=a,b,c")
    name = line.get(KEY)
    if name is None or name == "basic":
        return
    if name not in _NEEDS:
        known = ["basic", *sorted(file.stem for file in (conf / KEY).glob("*.yaml"))]
        store = ConfigStore.instance().repo.get("hydra", {}).get("launcher", {})
        if f"{name}.yaml" not in store and name not in known:
            raise ConfigError(f"{KEY}={name} is no launcher{did_you_mean(name, known)}")
        return
    package, extra = _NEEDS[name]
    if find_spec("hydra_plugins") is None or find_spec(f"hydra_plugins.{package}") is None:
        raise ConfigError(f"{KEY}={name} needs another package: pip install -e '.[{extra}]' in runner's checkout")
    if name == "submitit_slurm" and not (shutil.which("sbatch") and shutil.which("srun")):
        raise ConfigError(f"{KEY}={name}: there is no sbatch and srun here; start it on a login node of the cluster")


def check_values(launcher: DictConfig) -> None:
    """Raise ConfigError for a number of processes or minutes in `launcher` with which no job would ever run.

    One command as `setup` becomes a list of one.
    """
    one_as_list(launcher, _LISTS)
    for key in _COUNTS:
        value = launcher.get(key)
        if value is None:
            continue
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or value == 0 or (value < 0 and key != "n_jobs"):
            alternative = ", or -1 for as many as there are cores" if key == "n_jobs" else ""
            raise ConfigError(f"hydra.launcher.{key}={value}: give a whole number of at least 1{alternative}")


def launch(launcher: Launcher, jobs: Sequence[PlannedJob]) -> list[str | None]:
    """Run `jobs`; for each why it left no result, where the launcher knows. Raises what the launcher raises."""
    overrides = [[*job.overrides, f"hydra.sweep.subdir={quoted(job.directory)}"] for job in jobs]
    outcomes: Sequence[JobReturn | str]
    if type(launcher).__module__.startswith("hydra_plugins.hydra_submitit_launcher"):
        from runner.sweeps.submitit_jobs import run_jobs

        outcomes = run_jobs(launcher, overrides, [job.number for job in jobs])
    else:
        outcomes = launcher.launch(overrides, initial_job_idx=jobs[0].number)
    return [outcome if isinstance(outcome, str) else _problem(outcome) for outcome in outcomes]


def _problem(returned: JobReturn) -> str | None:
    """What runner.run.sweep_job returned: what kept the result from being written. Or the error that ended the job."""
    try:
        value = returned.return_value
    except Exception as error:
        return one_line(error)
    return value if isinstance(value, str) else None


def one_line(error: Exception) -> str:
    """What an exception of a launcher says, in at most one line of bearable length."""
    name = type(error).__name__
    if name == "TerminatedWorkerError":  # joblib's, which says more than anyone wants to read
        return "a worker process was killed, which ends its neighbours as well"
    text = " ".join(printable(" ".join(str(error).split())).split())[:400]
    if not text:
        return name
    return text if name in _SAY_IT_ALL else f"{name}: {text}"
