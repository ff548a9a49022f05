"""The sweeper that Hydra calls for -m: it writes the plan first, a job that takes its launcher down does not take the
other jobs along, and whatever a launcher says of a job that left no result is kept.

Meanwhile there is a line for each job as it ends, and in a terminal a bar that says how far the whole has come.
"""

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from typing import ClassVar

from filelock import FileLock, Timeout
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from runner.errors import ConfigError, printable
from runner.files.atomic import read_json
from runner.overrides import CommandLine, unquoted
from runner.reports.console import print_line
from runner.reports.junit import is_directory
from runner.results import FILE_NAME
from runner.sweeps.here import Here, can_run, composed_kinds
from runner.sweeps.launchers import check_values, launch, one_line
from runner.sweeps.plan import PLAN_NAME, PlannedJob, SweepPlan, good_result, plan_of, write_plan
from runner.sweeps.records import Records

# Held by the process that runs the sweep; the system lets go of it when that process dies.
LOCK_NAME = ".lock"
# Keys that name a file which each job writes, and replaces.
_FILES = ("output", "junit")
_PLUGIN = "hydra_plugins.runner"
_INTERVAL = 0.25  # seconds between two looks at the jobs' directories


@dataclass
class Sweep:
    """A sweep on its way: `plan`, `directory` and `config` are known as soon as Hydra has composed it.

    `resumed`: the plan of a sweep that goes on; `reasons`: what is known of jobs that left no result, by number.
    """

    line: CommandLine
    resumed: SweepPlan | None = None
    plan: SweepPlan | None = None
    directory: Path | None = None
    config: DictConfig | None = None
    records: Records | None = None
    reasons: dict[int, str] = field(default_factory=dict)

    def finished(self) -> tuple[int, int]:
        """How many jobs have a good result, and how many there are."""
        if self.plan is None or self.directory is None:
            return 0, 0
        good = [job for job in self.plan.jobs if good_result(self.directory / job.directory) is not None]
        return len(good), len(self.plan.jobs)


def register(sweep: Sweep) -> None:
    """Let the sweeper that conf/hydra/sweeper/runner.yaml names be one for `sweep`.

    Hydra makes its sweeper itself, from a registered class that it can import from `hydra_plugins`, and returns nothing
    of what it did: so there is a module of that name, and the class in it knows the sweep.
    """
    if find_spec("hydra_plugins") is None:  # no plugin is installed
        sys.modules["hydra_plugins"] = module_from_spec(ModuleSpec("hydra_plugins", None, is_package=True))
    module = module_from_spec(ModuleSpec(_PLUGIN, None))
    sweeper = type("RunnerSweeper", (_Sweeper,), {"__module__": _PLUGIN, "sweep_state": sweep})
    module.RunnerSweeper = sweeper  # type: ignore[attr-defined]
    sys.modules[_PLUGIN] = module
    Plugins.instance().register(sweeper)


class _Sweeper(Sweeper):
    """Runs the jobs of `sweep_state`, those with a good result left out; what became of a job stands in its directory.

    `max_batch_size`: how many jobs the launcher is handed at once; None: all.
    """

    sweep_state: ClassVar[Sweep]

    def __init__(self, max_batch_size: int | None = None) -> None:
        if max_batch_size is not None and max_batch_size < 1:
            raise ConfigError(f"hydra.sweeper.max_batch_size={max_batch_size}: give a whole number of at least 1")
        self.max_batch_size = max_batch_size

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Make the launcher that the config names. Raises ConfigError for values with which it would run nothing."""
        check_values(config.hydra.launcher)
        self.hydra_context, self.config, self.task_function = hydra_context, config, task_function
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Plan, lock, launch. Raises ConfigError before anything is written where the sweep cannot be."""
        assert self.config is not None
        assert self.hydra_context is not None
        assert self.launcher is not None
        state = self.sweep_state
        plan = plan_of(self.config, arguments, self.hydra_context.config_loader, state.line)
        kinds = composed_kinds(self.config, self.hydra_context.config_loader, plan.jobs)
        if plan.launcher == "basic" and can_run(self.config):
            self.launcher = Here(self.config, self.task_function, kinds)
        directory = Path(str(self.config.hydra.sweep.dir))
        if state.resumed is not None:
            if [job.overrides for job in plan.jobs] != [job.overrides for job in state.resumed.jobs]:
                raise ConfigError(f"resume={directory}: its command gives other jobs than it did then")
            plan = replace(plan, jobs=state.resumed.jobs, command=state.resumed.command)
        with _held(directory):
            if state.resumed is None:
                _check_outputs(self.config, plan, directory)
            write_plan(plan, directory)
            OmegaConf.save(self.config, directory / "multirun.yaml")  # as Hydra's own sweepers leave it
            state.plan, state.directory, state.config = plan, directory, self.config
            size = self.max_batch_size or len(plan.jobs)
            state.records = Records(directory)
            try:
                with state.records.open():
                    for job in plan.jobs if state.resumed else ():
                        state.records.add(directory / job.directory)  # perhaps done, and not told before
                    for first in range(0, len(plan.jobs), size):
                        run_jobs(state, self.launcher, plan.jobs[first : first + size])
            finally:
                write_reasons(state)


def run_jobs(sweep: Sweep, launcher: Launcher, jobs: Sequence[PlannedJob]) -> None:
    """Run those of `jobs` without a good result; where the launcher breaks, those that it had not started again."""
    assert sweep.plan is not None
    assert sweep.directory is not None
    directory = sweep.directory
    todo = [job for job in jobs if good_result(directory / job.directory) is None]
    with _watched(sweep, sweep.plan, directory):
        while todo:
            marks = {job.number: _start_mark(directory / job.directory) for job in todo}
            try:
                problems = launch(launcher, todo)
            except Exception as error:
                left = [job for job in todo if _start_mark(directory / job.directory) == marks[job.number]]
                again = left if len(left) < len(todo) else []
                sweep.reasons |= {job.number: one_line(error) for job in todo if job not in again}
                todo = again
            else:
                sweep.reasons |= {job.number: why for job, why in zip(todo, problems, strict=True) if why}
                break


def write_reasons(sweep: Sweep) -> None:
    """Write into the plan why jobs left no result, where that is known or was and has changed."""
    assert sweep.plan is not None
    assert sweep.directory is not None
    without = {job.number for job in sweep.plan.jobs if not (sweep.directory / job.directory / FILE_NAME).exists()}
    plan = sweep.plan.with_reasons({number: why for number, why in sweep.reasons.items() if number in without})
    if plan == sweep.plan:
        return
    sweep.plan = plan
    try:
        write_plan(plan, sweep.directory)
    except OSError as error:
        print(f"runner: warning: {sweep.directory / PLAN_NAME}: cannot be written: {error}", file=sys.stderr)


@contextmanager
def _held(directory: Path) -> Iterator[None]:
    """Keep other processes from running the sweep in `directory`. Raises ConfigError where one does."""
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(directory / LOCK_NAME, timeout=0):
            yield
    except Timeout as error:
        raise ConfigError(f"{directory}: another runner is at work on this sweep; wait for it, or stop it") from error


def _check_outputs(config: DictConfig, plan: SweepPlan, directory: Path) -> None:
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


def _start_mark(directory: Path) -> int | None:
    """Changes when a job is started in `directory`: Hydra then writes the job's configuration there."""
    return _modified(directory / ".hydra" / "overrides.yaml")


def _modified(file: Path) -> int | None:
    """When `file` was written, in nanoseconds; None where there is none."""
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return None


@contextmanager
def _watched(sweep: Sweep, plan: SweepPlan, directory: Path) -> Iterator[None]:
    """Within the block, report each job of `plan` whose result arrives in `directory`, whichever process wrote it."""
    out = Console()
    console = out if out.is_terminal else Console(stderr=True)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(),
    )  # fmt: skip
    waiting = [job for job in plan.jobs if good_result(directory / job.directory) is None]
    before = {job.number: _modified(directory / job.directory / FILE_NAME) for job in waiting}
    stop = threading.Event()
    with Progress(
        *columns, console=console, transient=True, refresh_per_second=2, disable=not console.is_terminal
    ) as progress:
        bar = progress.add_task("sweep", total=len(plan.jobs), completed=len(plan.jobs) - len(waiting))

        def look() -> None:
            for job in list(waiting):
                arrived = _modified(directory / job.directory / FILE_NAME) != before[job.number]
                if arrived and _report(job, directory, out):
                    waiting.remove(job)
                    progress.advance(bar)
                    if sweep.records is not None:
                        sweep.records.add(directory / job.directory)

        def watch() -> None:
            while not stop.wait(_INTERVAL):
                look()
            look()

        thread = threading.Thread(target=watch, name="sweep-watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def _report(job: PlannedJob, directory: Path, console: Console) -> bool:
    """Print one job's result; False where it cannot be read (again)."""
    try:
        result = read_json(directory / job.directory / FILE_NAME)
    except (OSError, ValueError):
        return False
    print_line(result, console, number=job.number + 1, job=job.directory)
    if result["status"] == "error":
        print(f"runner: error: {printable(result['error']['message'])}", file=sys.stderr)
    return True
