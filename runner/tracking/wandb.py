"""`tracker=wandb`: a run in Weights & Biases, on this machine's disk first and on a server where there is one.

W&B is a guest: it runs in a process of its own (runner/tracking/worker.py), and whatever goes wrong with it becomes one
line in `warnings`, and costs a bounded time. That process starts with the first run, not before. Nobody waits for a
single run: it is left on the disk for a recorder (runner/tracking/recorder.py), which outlives the command.
"""

import os
import shlex
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from runner.errors import ConfigError, printable
from runner.results import JsonObject
from runner.tracking import recorder
from runner.tracking import worker as there
from runner.tracking.base import RunIdentity, SavedView, Tracker, WorkspaceBuilder, flat_config, run_id
from runner.tracking.rows import Record, job_record
from runner.tracking.worker import OpenedRun, Session, Worker, error_line

P = ParamSpec("P")
T = TypeVar("T")
MODES = ("auto", "online", "offline")
_START_SECONDS = 30.0  # for Python, wandb and its service to start, on a busy machine
_NOT_IN_PROJECT = "/\\#?%:"
# What WANDB_MODE may say, in W&B's words.
_WANDB_MODES = {
    "online": "online", "run": "online", "shared": "online", "offline": "offline", "dryrun": "offline",
    "disabled": "disabled",
}  # fmt: skip


@dataclass
class _Process:
    """What the runs of one process share: the one that is open, wandb's worker, and whether the server has failed."""

    open_run: "WandbTracker | None" = None
    worker: Worker | None = None
    unreachable: bool = False

    def started(self, folder: Path, mode: str) -> Worker:
        """A worker for runs in `folder`: the last one where it will do. Raises what wandb raises."""
        if self.worker is None or not self.worker.fits(folder, mode):
            self.end_worker()
            self.worker = Worker(folder, mode)
        self.worker.messages.clear()
        self.worker.ask(_START_SECONDS + 5, there.start, _START_SECONDS)
        return self.worker

    def end_worker(self) -> None:
        """Run nothing more in the worker that there is."""
        if self.worker is not None:
            self.worker.kill()
            self.worker = None


_PROCESS = _Process()


@dataclass(kw_only=True, eq=False)
class WandbTracker(Tracker):
    """One run in W&B for each job.

    `mode`: online, offline, or auto: WANDB_MODE where it is set, else online where a credential is found.
    `name` replaces `<task>/<run>@<step>`. `dir`: one folder for the project, relative to the current directory.
    `init_timeout`, `finish_timeout`: seconds that W&B has for an answer, and for the upload at the end. `wait`: whether
    the command waits for its record. Raises ConfigError for values of another kind.
    """

    project: str = "runner"
    entity: str | None = None
    name: str | None = None
    mode: str = "auto"
    dir: str = "outputs/wandb"
    init_timeout: float = 15
    finish_timeout: float = 60
    wait: bool = False
    _claimed: str | None = field(default=None, init=False, repr=False)
    _identity: RunIdentity | None = field(default=None, init=False, repr=False)
    _worker: Worker | None = field(default=None, init=False, repr=False)
    _run: OpenedRun | None = field(default=None, init=False, repr=False)
    _failed: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        for key, optional in (("project", False), ("entity", True), ("name", True), ("dir", False)):
            value = getattr(self, key)
            if not (value is None and optional) and not (isinstance(value, str) and value.strip()):
                raise ConfigError(f"tracker.{key} must be a text{' or null' if optional else ''}, not {value!r}")
        if set(self.project) & set(_NOT_IN_PROJECT) or len(self.project) > 128:
            raise ConfigError(f"tracker.project: at most 128 characters, none of {' '.join(_NOT_IN_PROJECT)}")
        if not isinstance(self.wait, bool):
            raise ConfigError(f"tracker.wait must be true or false, not {self.wait!r}")
        if self.mode not in MODES:
            raise ConfigError(f"tracker.mode must be one of {', '.join(MODES)}, not {self.mode!r}")
        for key in ("init_timeout", "finish_timeout"):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise ConfigError(f"tracker.{key} must be a number of seconds above 0, not {value!r}")

    def start(self, identity: RunIdentity, config: JsonObject) -> None:
        """Begin a run, online or offline as `mode` says; offline too where the server does not answer."""
        if _PROCESS.open_run is not None:
            _PROCESS.open_run.finish(exit_code=1)  # a job of this process that ended without its own call
        mode = self._wanted_mode()
        if mode == "disabled":
            return
        self._identity = identity
        try:
            options = self._options(identity, config)
            offline = mode == "offline" or _PROCESS.unreachable
            if offline or not self._opened_online(options, mode):
                self._open(options, "offline")
        except Exception as error:
            self.warnings.append(f"W&B: this run is not logged there ({error_line(error)})")

    def log(self, row: Mapping[str, float]) -> None:
        """Log one live row."""
        self._attempt(there.log_row, row)

    def record(self, result: JsonObject, record: Record | None = None) -> None:
        """Log a finished result; what was logged is on the disk when this returns."""
        if self._identity is None:
            return
        step = result["step"] if result.get("step") is not None else self._identity.step
        logged = record or job_record(result, step)
        before = self._attempt(there.written_bytes)
        self._attempt(there.log_figures, logged)
        self._attempt(there.log_tables, logged)
        if result.get("ckpt") is not None and (path := Path(str(result["ckpt"]))).exists():
            self._attempt(there.log_checkpoint, path, self._identity.run_name, step)
        self._attempt(there.wait_for_flush, before or 0)

    def finish(self, exit_code: int) -> None:
        """End the run and wait for its upload, at most `finish_timeout` seconds (`init_timeout` after a failure)."""
        worker, run = self._worker, self._run
        if worker is None or run is None:
            return
        seconds = self.init_timeout if self._failed else self.finish_timeout + self.init_timeout
        try:
            worker.ask(seconds, there.finish_run, exit_code)
            if self._failed:  # the service that still writes the file is ended below
                worker.ask(seconds, there.wait_for_flush, -1)
        except Exception as error:
            self._fail(error, run)
        if self._failed:
            _PROCESS.end_worker()
        elif worker.messages:
            self.warnings.append(f"W&B: {worker.messages[0]}")
        _PROCESS.open_run = None
        self._run = self._worker = None

    def leave(
        self, identity: RunIdentity, config: JsonObject, result: JsonObject, exit_code: int, log: Path
    ) -> Callable[[], None]:
        """Leave the run on the disk for a recorder that outlives this process; what is returned starts that.

        With `wait` it records by itself.
        """
        if self.wait:
            return super().leave(identity, config, result, exit_code, log)
        if self._wanted_mode() == "disabled":
            return lambda: None
        settings = {each.name: getattr(self, each.name) for each in fields(WandbTracker) if each.init}
        folder = self._folder()
        try:
            own = claim_id(folder, run_id(identity, config))
            left = recorder.Left(
                tracker=settings, identity=asdict(identity), config=config, result=result, exit_code=exit_code,
                log=str(log.absolute()), run_id=own, cwd=str(Path.cwd()),
            )  # fmt: skip
            recorder.leave(folder, left)
        except OSError as error:
            self.warnings.append(f"W&B: this run is not logged there ({error_line(error)})")
            return lambda: None
        self.location = (
            f"run {own}, recorded in {self._shown(folder)} from now on; {log} says where, or what went wrong"
        )
        return partial(recorder.start, folder)

    def record_claimed(self, left: recorder.Left) -> None:
        """Record what `leave` left, in the place of what an earlier attempt that was killed made of it."""
        for cut_off in self._folder().glob(f"*run-*-{left.run_id}"):
            shutil.rmtree(cut_off, ignore_errors=True)
        self._claimed = left.run_id
        self.start(RunIdentity(**left.identity), left.config)
        self.record(left.result)
        self.finish(left.exit_code)

    def save_workspace(self, build: WorkspaceBuilder) -> SavedView | None:
        """Save a workspace; None, and at most one warning, where that is not possible."""
        mode = self._wanted_mode()
        if mode in ("offline", "disabled") or _PROCESS.unreachable:
            return None
        try:
            worker = _PROCESS.started(self._folder(), mode)
            if not worker.ask(self.init_timeout, there.has_credential):
                return None
            return worker.ask(self.init_timeout, there.save_view, build, self.entity, self.project)
        except Exception as error:
            _PROCESS.end_worker()
            _PROCESS.unreachable = True
            self.warnings.append(f"W&B: the panels are not saved there ({error_line(error)})")
            return None

    def _wanted_mode(self) -> str:
        """auto, online, offline or disabled: `mode`, or WANDB_MODE where `mode` leaves it open."""
        said = os.environ.get("WANDB_MODE", "").strip().lower()
        if self.mode != "auto" or not said:
            return self.mode
        if said not in _WANDB_MODES:
            self.warnings.append(
                f"W&B: WANDB_MODE={printable(said)} is not online, offline or disabled: logged offline"
            )
        return _WANDB_MODES.get(said, "offline")

    def _folder(self) -> Path:
        """`dir`, under the name that W&B gives its folder, wherever it lies."""
        folder = Path(self.dir).expanduser().absolute()
        return folder if folder.name == "wandb" else folder / "wandb"

    def _options(self, identity: RunIdentity, config: JsonObject) -> JsonObject:
        """What `wandb.init` is told about the run. Raises OSError where its folder cannot be written."""
        folder = self._folder()
        return {
            "project": self.project,
            "entity": self.entity,
            "name": self.name or identity.name,
            "group": identity.series,
            "job_type": identity.task,
            "tags": identity.tags,
            "id": self._claimed or claim_id(folder, run_id(identity, config)),
            "dir": str(folder.parent),
            "config": flat_config(identity, config),
        }

    def _opened_online(self, options: JsonObject, mode: str) -> bool:
        """Whether a run is open now. Where the server did not answer, this process does not ask it again."""
        try:
            run = self._open(options, mode)
            if mode == "online" and run.offline:
                self.warnings.append("W&B: logged offline, no credential (WANDB_API_KEY, or `wandb login`)")
            return True
        except Exception as error:
            _PROCESS.end_worker()
            _PROCESS.unreachable = True
            self.warnings.append(f"W&B: logged offline, the server could not be used ({error_line(error)})")
        for leftover in self._folder().glob(f"run-*-{options['id']}"):
            shutil.rmtree(leftover, ignore_errors=True)  # an empty run, which viewers would show beside the real one
        return False

    def _open(self, options: JsonObject, mode: str) -> OpenedRun:
        worker = _PROCESS.started(self._folder(), mode)
        if mode != "offline":  # without a credential wandb itself would ask for one, and wait
            mode = "online" if worker.ask(self.init_timeout, there.has_credential) else "offline"
        # wandb keeps to init_timeout by itself, unless its service hangs
        run = worker.ask(
            self.init_timeout + 5,
            there.open_run,
            {**options, "mode": mode},
            self.init_timeout,
            self.finish_timeout,
        )
        self._worker, self._run, _PROCESS.open_run = worker, run, self
        self.location = run.url or self._on_disk(run)
        return run

    def _attempt(self, function: Callable[Concatenate[Session, P], T], *args: P.args, **options: P.kwargs) -> T | None:
        if self._run is not None and self._worker is not None and not self._failed:
            try:
                return self._worker.ask(self.init_timeout, function, *args, **options)
            except Exception as error:
                self._fail(error, self._run)
        return None

    def _fail(self, error: Exception, run: OpenedRun) -> None:
        """Log no more: what failed once would fail, or wait, again. The runs after an online one go offline."""
        if not self._failed:
            self._failed = True
            self.warnings.append(f"W&B: not everything was logged ({error_line(error)})")
            self.location = self._on_disk(run)
        _PROCESS.unreachable = _PROCESS.unreachable or not run.offline

    def _on_disk(self, run: OpenedRun) -> str:
        """Where the run lies and how it is uploaded; a comparison goes with all the runs that it compares."""
        shown = self._shown(run.path)
        if self._identity is not None and self._identity.task == "compare":
            return f"{shown} (upload all runs with: wandb sync {self._shown(run.path.parent)}/offline-run-*)"
        return f"{shown} (upload it with: wandb sync {shown})"

    def _shown(self, path: Path) -> str:
        """`path` as a shell takes it, relative where it lies below the current directory."""
        return shlex.quote(str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path))


def record_left(folder: str) -> None:
    """The recorder's whole work: what is left in `folder`."""
    for left in recorder.left_in(Path(folder)):
        tracker = WandbTracker(**left.tracker)
        tracker.record_claimed(left)
        recorder.log(left, tracker.warnings, tracker.location)


def claim_id(folder: Path, wanted: str) -> str:
    """`wanted`, or `wanted-2`, `wanted-3`, … where it was logged before: each id is given out once in `folder`.

    Raises OSError where the folder cannot be written.
    """
    attempt = 1
    while True:
        candidate = wanted if attempt == 1 else f"{wanted}-{attempt}"
        try:
            (folder / "ids" / candidate).mkdir(parents=True)
            return candidate
        except FileExistsError:
            if not (folder / "ids").is_dir():
                raise
            attempt += 1
