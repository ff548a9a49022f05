"""`tracker=wandb`: a run in Weights & Biases, on this machine's disk first and on a server where there is one.

W&B is a guest: whatever goes wrong with it becomes one line in `warnings`, and costs a bounded time. The module
`wandb` is imported when a run starts, not before.

What is done to one open run of wandb: how it is made, and how a result is written into it.

The module `wandb` is an argument: importing it takes more than a second and is done by the session.
"""

import os
import re
import shlex
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from runner.errors import ConfigError, printable
from runner.tracking.base import RunIdentity, SavedView, flat_config, run_id
from runner.tracking.rows import AXES, Chart, Record, job_record
from runner.tracking.session import wandb_session, within

# Seconds between two writes of the run's file; a row that is not yet written is lost when the process is killed.
FLUSH_SECONDS = 0.02
_LONGEST_FLUSH_SECONDS = 2.0


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


def has_credential(wandb: ModuleType) -> bool:
    """Whether a key or token is there: no question is asked and no server is."""
    return bool(wandb.login(prompt=False, verify=False))


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What a run is called, where it is kept (`folder`, whose last part is `wandb`), and how long W&B may take."""

    project: str
    entity: str | None
    name: str
    group: str | None
    job_type: str
    tags: tuple[str, ...]
    identifier: str
    folder: Path
    config: Mapping[str, Any]
    init_timeout: float
    finish_timeout: float


def open_run(wandb: ModuleType, plan: RunPlan, mode: str) -> Any:
    """A new run, "online" or "offline", with its axes defined. Raises what wandb raises."""
    settings = wandb.Settings(  # a new object each time: wandb changes the one that it is given
        console="off",
        silent=True,
        disable_git=True,
        disable_code=True,
        x_disable_stats=True,
        x_disable_meta=True,
        x_disable_machine_info=True,
        init_timeout=plan.init_timeout,
        finish_timeout=plan.finish_timeout,
        finish_timeout_raises=True,
        x_transaction_log_flush_interval=FLUSH_SECONDS,
        use_dot_wandb=False,
    )
    run = wandb.init(
        project=plan.project,
        entity=plan.entity,
        group=plan.group,
        job_type=plan.job_type,
        name=plan.name,
        tags=plan.tags,
        id=plan.identifier,
        dir=str(plan.folder.parent),
        mode=mode,
        config=dict(plan.config),
        reinit="finish_previous",
        settings=settings,
    )
    for pattern, axis in AXES.items():
        run.define_metric(axis, hidden=True)
        run.define_metric(pattern, step_metric=axis)
    return run


def log_figures(run: Any, record: Record) -> None:
    """The rows and the summary, and the keys that the config gains."""
    for pattern, axis in record.axes.items():
        run.define_metric(axis, hidden=True)
        run.define_metric(pattern, step_metric=axis)
    run.config.update(dict(record.config), allow_val_change=True)
    for row in record.rows:
        run.log(dict(row))
    run.summary.update(dict(record.summary))


def log_tables(wandb: ModuleType, run: Any, record: Record) -> None:
    """The tables and charts, in one row."""
    made = {
        name: wandb.Table(columns=table.columns, data=table.rows, allow_mixed_types=True)
        for name, table in record.tables.items()
    }
    made |= {name: _line_series(wandb, chart) for name, chart in record.charts.items()}
    if made:
        run.log(made)


def _line_series(wandb: ModuleType, chart: Chart) -> Any:
    xs, ys = ([[point[i] for point in points] for points in chart.lines.values()] for i in (0, 1))
    return wandb.plot.line_series(xs=xs, ys=ys, keys=list(chart.lines), title=chart.title, xname=chart.x)


def log_checkpoint(wandb: ModuleType, run: Any, ckpt: object, identity: RunIdentity, step: int | None) -> None:
    """The checkpoint as an artifact that only refers to its files: nothing is read, copied or uploaded."""
    path = Path(str(ckpt))
    if ckpt is None or not path.exists():
        return
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", identity.run_name)[:100]
    artifact = wandb.Artifact(f"checkpoint-{name}", type="checkpoint", metadata={"ckpt_step": step})
    artifact.add_reference(path.absolute().as_uri(), checksum=False)
    run.log_artifact(artifact, aliases=["latest", *([f"step-{step}"] if step is not None else [])])


def save_view(wandb: ModuleType, build: Callable[[str, str], Any], entity: str | None, project: str) -> SavedView:
    """Save the workspace that `build` makes; where no entity is given it is that of WANDB_ENTITY, or the user's own."""
    own = entity or wandb.setup().settings.entity or wandb.Api().default_entity
    made = build(str(own), project)
    made.save()
    return SavedView(url=made.url, id=made._internal_id, name=made._internal_name)


def written_bytes(run: Any) -> int:
    """The size of the run's file, now. Raises OSError where it is gone."""
    return Path(run.settings.sync_file).stat().st_size


def wait_for_flush(run: Any, before: int) -> None:
    """Return once the run's file has grown beyond `before` bytes and is then left alone for three intervals.

    Raises OSError where it does not grow in two seconds: wandb says nothing when the disk is full.
    """
    deadline = time.monotonic() + _LONGEST_FLUSH_SECONDS
    size, quiet = -1, 0
    while (quiet < 3 or size <= before) and time.monotonic() < deadline:
        time.sleep(FLUSH_SECONDS)
        now = written_bytes(run)
        size, quiet = now, quiet + 1 if now == size else 0
    if size <= before:
        raise OSError("its file does not grow: is the disk full?")


T = TypeVar("T")
MODES = ("auto", "online", "offline")
_NOT_IN_PROJECT = "/\\#?%:"
# What WANDB_MODE may say, in W&B's words.
_WANDB_MODES = {
    "online": "online", "run": "online", "shared": "online", "offline": "offline", "dryrun": "offline",
    "disabled": "disabled",
}  # fmt: skip


@dataclass
class _Process:
    """What the runs of one process share: the one that is open, and whether the server has failed."""

    open_run: "WandbTracker | None" = None
    unreachable: bool = False


_PROCESS = _Process()


@dataclass(kw_only=True, eq=False)
class WandbTracker:
    """One run in W&B for each job.

    `mode`: online, offline, or auto: WANDB_MODE where it is set, else online where a credential is found.
    `name` replaces `<task>/<run>@<step>`. `dir`: one folder for the project, relative to the current directory.
    `init_timeout`, `finish_timeout`: seconds that W&B has for an answer, and for the upload at the end.
    Raises ConfigError for values of another kind.
    """

    project: str = "runner"
    entity: str | None = None
    name: str | None = None
    mode: str = "auto"
    dir: str = "outputs/wandb"
    init_timeout: float = 15
    finish_timeout: float = 60
    warnings: list[str] = field(default_factory=list, init=False)
    location: str | None = field(default=None, init=False)
    _identity: RunIdentity | None = field(default=None, init=False, repr=False)
    _wandb: ModuleType | None = field(default=None, init=False, repr=False)
    _run: Any = field(default=None, init=False, repr=False)
    _failed: bool = field(default=False, init=False, repr=False)
    _messages: list[str] = field(default_factory=list, init=False, repr=False)
    _session: ExitStack = field(default_factory=ExitStack, init=False, repr=False)

    def __post_init__(self) -> None:
        for key, optional in (("project", False), ("entity", True), ("name", True), ("dir", False)):
            value = getattr(self, key)
            if not (value is None and optional) and not (isinstance(value, str) and value.strip()):
                raise ConfigError(f"tracker.{key} must be a text{' or null' if optional else ''}, not {value!r}")
        if set(self.project) & set(_NOT_IN_PROJECT) or len(self.project) > 128:
            raise ConfigError(f"tracker.project: at most 128 characters, none of {' '.join(_NOT_IN_PROJECT)}")
        if self.mode not in MODES:
            raise ConfigError(f"tracker.mode must be one of {', '.join(MODES)}, not {self.mode!r}")
        for key in ("init_timeout", "finish_timeout"):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise ConfigError(f"tracker.{key} must be a number of seconds above 0, not {value!r}")

    def start(self, identity: RunIdentity, config: Mapping[str, Any]) -> None:
        """Begin a run, online or offline as `mode` says; offline too where the server does not answer."""
        if _PROCESS.open_run is not None:
            _PROCESS.open_run.finish(exit_code=1)  # a job of this process that ended without its own call
        mode = self._wanted_mode()
        if mode == "disabled":
            return
        self._identity = identity
        try:
            plan = self._plan(identity, config)
            offline = mode == "offline" or _PROCESS.unreachable
            if offline or not self._opened_online(plan, mode):
                self._open(plan, "offline")
        except Exception as error:
            self._close()
            self.warnings.append(f"W&B: this run is not logged there ({_line(error)})")

    def log(self, row: Mapping[str, float]) -> None:
        """Log one live row."""
        self._attempt(lambda: self._run.log(dict(row)))

    def record(self, result: Mapping[str, Any], record: Record | None = None) -> None:
        """Log a finished result; what was logged is on the disk when this returns."""
        wandb, run, identity = self._wandb, self._run, self._identity
        if wandb is None or identity is None:
            return
        step = result["step"] if result.get("step") is not None else identity.step
        logged = record or job_record(result, step)
        before = self._attempt(lambda: written_bytes(run))
        self._attempt(lambda: log_figures(run, logged))
        self._attempt(lambda: log_tables(wandb, run, logged))
        self._attempt(lambda: log_checkpoint(wandb, run, result.get("ckpt"), identity, step))
        self._attempt(lambda: wait_for_flush(run, before or 0))

    def finish(self, exit_code: int) -> None:
        """End the run and wait for its upload, at most `finish_timeout` seconds (`init_timeout` after a failure)."""
        run = self._run
        if run is not None:
            seconds = self.init_timeout if self._failed else self.finish_timeout + self.init_timeout
            try:
                within(seconds, lambda: run.finish(exit_code=exit_code))
            except Exception as error:
                self._fail(error)
        self._close()
        if self._messages and not self._failed:
            self.warnings.append(f"W&B: {self._messages[0]}")

    def save_workspace(self, build: Callable[[str, str], Any]) -> SavedView | None:
        """Save a workspace, in a session of its own; None, and at most one warning, where that is not possible."""
        mode = self._wanted_mode()
        if mode in ("offline", "disabled") or _PROCESS.unreachable:
            return None
        try:
            with wandb_session(self._folder(), mode, self._messages.append) as wandb:
                if not within(self.init_timeout, lambda: has_credential(wandb)):
                    return None
                return within(self.init_timeout, lambda: save_view(wandb, build, self.entity, self.project))
        except Exception as error:
            _PROCESS.unreachable = True
            self.warnings.append(f"W&B: the panels are not saved there ({_line(error)})")
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

    def _plan(self, identity: RunIdentity, config: Mapping[str, Any]) -> RunPlan:
        folder = self._folder()
        return RunPlan(
            project=self.project,
            entity=self.entity,
            name=self.name or identity.name,
            group=identity.series,
            job_type=identity.task,
            tags=identity.tags,
            identifier=claim_id(folder, run_id(identity, config)),
            folder=folder,
            config=flat_config(identity, config),
            init_timeout=self.init_timeout,
            finish_timeout=self.finish_timeout,
        )

    def _opened_online(self, plan: RunPlan, mode: str) -> bool:
        """Whether a run is open now. Where the server did not answer, this process does not ask it again."""
        try:
            self._open(plan, mode)
            if mode == "online" and self._run.offline:
                self.warnings.append("W&B: logged offline, no credential (WANDB_API_KEY, or `wandb login`)")
            return True
        except Exception as error:
            self._close()
            self._messages.clear()
            _PROCESS.unreachable = True
            self.warnings.append(f"W&B: logged offline, the server could not be used ({_line(error)})")
        for leftover in plan.folder.glob(f"run-*-{plan.identifier}"):
            shutil.rmtree(leftover, ignore_errors=True)  # an empty run, which viewers would show beside the real one
        return False

    def _open(self, plan: RunPlan, mode: str) -> None:
        session = wandb_session(plan.folder, mode, self._messages.append)
        wandb = self._session.enter_context(session)
        if mode != "offline":  # without a credential wandb itself would ask for one, and wait
            mode = "online" if within(plan.init_timeout, lambda: has_credential(wandb)) else "offline"
            self._messages.clear()
        # wandb keeps to init_timeout by itself, unless its service hangs
        run = within(plan.init_timeout + 5, lambda: open_run(wandb, plan, mode))
        self._wandb, self._run = wandb, run
        self.location = run.url if mode == "online" else self._on_disk(run)
        _PROCESS.open_run = self

    def _attempt(self, call: Callable[[], T]) -> T | None:
        if self._run is not None and not self._failed:
            try:
                return within(self.init_timeout, call)
            except Exception as error:
                self._fail(error)
        return None

    def _fail(self, error: Exception) -> None:
        """Log no more: what failed once would fail, or wait, again. The runs after an online one go offline."""
        if not self._failed:
            self._failed = True
            self.warnings.append(f"W&B: not everything was logged ({_line(error)})")
            self.location = self._on_disk(self._run)
        _PROCESS.unreachable = _PROCESS.unreachable or not self._run.offline

    def _on_disk(self, run: Any) -> str:
        """Where the run lies and how it is uploaded; a comparison goes with all the runs that it compares."""
        path = Path(run.settings.sync_dir)
        path = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
        shown = shlex.quote(str(path))
        if self._identity is not None and self._identity.task == "compare":
            return f"{shown} (upload all runs with: wandb sync {shlex.quote(str(path.parent))}/offline-run-*)"
        return f"{shown} (upload it with: wandb sync {shown})"

    def _close(self) -> None:
        if _PROCESS.open_run is self:
            _PROCESS.open_run = None
        self._run = self._wandb = None
        try:
            self._session.close()
        except Exception as error:
            self._messages.append(_line(error))


def _line(error: BaseException) -> str:
    """An error of W&B on one line, without the advice that follows its first."""
    text = str(error).strip().partition("\n")[0] or type(error).__name__
    return printable(text)[:200]
