"""Around Hydra's launchers, whichever is chosen: the plan is written first, a job that takes its launcher down does not
take the other jobs along, and whatever a launcher says of a job that left no result is kept.

Which launchers there are, and what each needs.
"""

import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from runner.config import did_you_mean, one_as_list
from runner.errors import ConfigError, printable
from runner.overrides import CommandLine, quoted, unquoted
from runner.reports.junit import is_directory
from runner.results import FILE_NAME
from runner.sweeps.plan import PLAN_NAME, Job, Plan, good_result, plan_of, write_plan
from runner.sweeps.progress import watched

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


def use_own_configs(conf: Path) -> None:
    """Let the launchers that lie in `conf` stand for those of the same names that Hydra's plugins bring: a file of the
    same name would be merged into the plugin's, which Hydra has deprecated."""
    Plugins.instance()  # the plugins put their configs into the store when they are found
    stored = ConfigStore.instance().repo.get("hydra", {}).get("launcher", {})
    for file in (conf / KEY).glob("*.yaml"):
        stored.pop(file.name, None)


def check_launcher(line: CommandLine, conf: Path) -> None:
    """Raise ConfigError where the chosen launcher is unknown, or needs what this installation or machine lacks; and
    for a sweeper of Hydra's instead of our own expansion."""
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


# Held by the process that runs the sweep; the system lets go of it when that process dies.
LOCK_NAME = ".lock"
# Keys that take any value: they cannot make a job that does not compose.
_PLAIN = ("ckpt", "step")
# Keys that name a file which each job writes, and replaces.
_FILES = ("output", "junit")


@dataclass
class Sweep:
    """A sweep on its way: `plan`, `directory` and `config` are known as soon as Hydra has composed it.

    `resumed`: the plan of a sweep that goes on; `reasons`: what is known of jobs that left no result, by number.
    """

    line: CommandLine
    resumed: Plan | None = None
    plan: Plan | None = None
    directory: Path | None = None
    config: DictConfig | None = None
    reasons: dict[int, str] = field(default_factory=dict)

    def finished(self) -> tuple[int, int]:
        """How many jobs have a good result, and how many there are."""
        if self.plan is None or self.directory is None:
            return 0, 0
        good = [job for job in self.plan.jobs if good_result(self.directory / job.directory) is not None]
        return len(good), len(self.plan.jobs)

    def keep_reasons(self) -> None:
        """Write into the plan why jobs left no result, where that is known or was and has changed."""
        if self.plan is None or self.directory is None:
            return
        without = {job.number for job in self.plan.jobs if not (self.directory / job.directory / FILE_NAME).exists()}
        plan = self.plan.with_reasons({number: why for number, why in self.reasons.items() if number in without})
        if plan == self.plan:
            return
        self.plan = plan
        try:
            write_plan(plan, self.directory)
        except OSError as error:
            print(f"runner: warning: {self.directory / PLAN_NAME}: cannot be written: {error}", file=sys.stderr)


@contextmanager
def launching(sweep: Sweep) -> Iterator[None]:
    """Within the block a sweep of Hydra's runs as described above. Hydra takes a launcher from its own packages only,
    so the one that it makes is wrapped. It composes every job before the first starts, to see whether it can: of those
    that differ in nothing but checkpoint and step, one is enough."""
    original, validate = Plugins.instantiate_launcher, BasicSweeper.validate_batch_is_legal
    locks: list[FileLock] = []

    def hold(directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory / LOCK_NAME, timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise ConfigError(
                f"{directory}: another runner is at work on this sweep; wait for it, or stop it"
            ) from error
        locks.append(lock)

    def validate_few(sweeper: BasicSweeper, batch: Sequence[Sequence[str]]) -> None:
        kinds = {tuple(word for word in words if word.partition("=")[0] not in _PLAIN): words for words in batch}
        validate(sweeper, list(kinds.values()))

    def instantiate(
        plugins: Plugins, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> Launcher:
        check_values(config.hydra.launcher)
        inner = original(plugins, hydra_context=hydra_context, task_function=task_function, config=config)
        plan = plan_of(config, hydra_context.config_loader, sweep.line)
        if sweep.resumed is not None:
            if [job.overrides for job in plan.jobs] != [job.overrides for job in sweep.resumed.jobs]:
                raise ConfigError(f"resume={config.hydra.sweep.dir}: its command gives other jobs than it did then")
            plan = Plan(**{**vars(plan), "jobs": sweep.resumed.jobs, "command": sweep.resumed.command})
        directory = Path(str(config.hydra.sweep.dir))
        hold(directory)
        if sweep.resumed is None:
            _check_outputs(config, plan, directory)
        write_plan(plan, directory)
        sweep.plan, sweep.directory, sweep.config = plan, directory, config
        return _Guarded(inner, sweep)

    Plugins.instantiate_launcher = instantiate  # type: ignore[method-assign, assignment]
    BasicSweeper.validate_batch_is_legal = validate_few  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Plugins.instantiate_launcher = original  # type: ignore[method-assign]
        BasicSweeper.validate_batch_is_legal = validate  # type: ignore[method-assign]
        for lock in locks:
            lock.release()
        sweep.keep_reasons()


def _check_outputs(config: DictConfig, plan: Plan, directory: Path) -> None:
    """Raise ConfigError where a new sweep would take another's results for its own, or its jobs one file for theirs."""
    if (directory / PLAN_NAME).exists():
        raise ConfigError(
            f"{directory}: holds a sweep; go on with it: resume={directory}, or give this one another name"
        )
    for key in _FILES:
        given = sorted({word for job in plan.jobs for word in job.overrides if word.startswith(f"{key}=")})
        if key in config and config[key] and not OmegaConf.is_interpolation(config, key):
            given = given or [f"{key}={config[key]}"]
        values = [unquoted(word.partition("=")[2]) for word in given]
        if key == "junit" and all(map(is_directory, values)):
            continue  # each job has a file of its own there
        if given and len(given) < len(plan.jobs):
            instead = "give a directory (a name with / at its end)" if key == "junit" else "leave it out"
            raise ConfigError(
                f"{', '.join(given)}: {len(plan.jobs)} jobs would overwrite each other there; {instead}: each "
                f"{'has a file of its own there' if key == 'junit' else f'leaves its {FILE_NAME} in the sweep'}"
            )


class _Guarded(Launcher):
    """Hands jobs to `inner`, those with a good result left out, and answers Hydra that all went well: what became of
    a job stands in its directory."""

    def __init__(self, inner: Any, sweep: Sweep) -> None:
        self.inner = inner
        self.sweep = sweep
        # A key of ours, which the launcher would not know.
        self.at_once = inner.params.pop("jobs_at_once", None) if _is_submitit(inner) else None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Nothing: `inner` is set up already."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs from `initial_job_idx` on; where the launcher breaks, those that it had not started again."""
        plan, directory = self.sweep.plan, self.sweep.directory
        assert plan is not None
        assert directory is not None
        jobs = plan.jobs[initial_job_idx : initial_job_idx + len(job_overrides)]
        if [list(job.overrides) for job in jobs] != [list(words) for words in job_overrides]:
            raise ConfigError("hydra.sweeper.params and other sweepers are not supported; give the values as key=a,b,c")
        todo = [job for job in jobs if good_result(directory / job.directory) is None]
        with watched(plan, directory):
            while todo:
                marks = {job.number: _start_mark(directory / job.directory) for job in todo}
                problem = self._launch(todo)
                left = [job for job in todo if _start_mark(directory / job.directory) == marks[job.number]]
                if not problem:
                    break
                again = left if len(left) < len(todo) else []
                self.sweep.reasons |= {job.number: problem for job in todo if job not in again}
                todo = again
        return []

    def _launch(self, jobs: Sequence[Job]) -> str | None:
        """Launch `jobs`; what went wrong with the launcher itself, if anything."""
        words = [[*job.overrides, f"hydra.sweep.subdir={quoted(job.directory)}"] for job in jobs]
        try:
            with self._around():
                returned = self.inner.launch(words, initial_job_idx=jobs[0].number)
        except Exception as error:
            return _one_line(error)
        for job, answer in zip(jobs, returned, strict=True):
            problem = _problem(answer)
            if problem:
                self.sweep.reasons[job.number] = problem
            else:
                self.sweep.reasons.pop(job.number, None)
        return None

    @contextmanager
    def _around(self) -> Iterator[None]:
        """What the launcher needs while it runs."""
        if not _is_submitit(self.inner):
            yield
            return
        from runner.sweeps.cluster import accounting, waiting_for_all

        with accounting(), waiting_for_all(self.at_once):
            yield


def _is_submitit(launcher: Any) -> bool:
    return type(launcher).__module__.startswith("hydra_plugins.hydra_submitit_launcher")


def _start_mark(directory: Path) -> int | None:
    """Changes when a job is started in `directory`: Hydra then writes the job's configuration there."""
    try:
        return (directory / ".hydra" / "overrides.yaml").stat().st_mtime_ns
    except OSError:
        return None


def _problem(answer: JobReturn) -> str | None:
    value: Any = answer._return_value
    if answer.status == JobStatus.COMPLETED:
        return value if isinstance(value, str) else None
    return _one_line(value)


def _one_line(error: object) -> str:
    """What an exception says, in at most one line of bearable length."""
    if type(error).__name__ == "TerminatedWorkerError":  # joblib's, which says more than anyone wants to read
        codes = re.findall(r"SIG\w+|EXIT\(\d+\)", str(error))
        return (
            f"a worker process was killed ({', '.join(codes) or 'unknown signal'}), which ends its neighbours as well"
        )
    known = type(error).__name__ in ("FailedJobError", "FailedSubmissionError")  # sbatch's own words
    text = " ".join(printable(" ".join(str(error).split())).split())
    if not text:
        return type(error).__name__
    return text[:400] if known else f"{type(error).__name__}: {text[:400]}"
