"""wandb in a process of its own: what it sets, prints, waits for or breaks stays there, and that process can be ended.

wandb was made to own its process: it sets environment variables, replaces `sys.exit` and `sys.excepthook`, waits for
its service (`wandb-core`) without a limit, and the service writes its crashes to stderr. `Worker` is the side that
asks; the functions below it run on the other side, each with the `Session` there.
"""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar
from weakref import finalize

import psutil

from runner.errors import printable
from runner.results import JsonObject
from runner.tracking.base import SavedView
from runner.tracking.rows import AXES, TRAINING_AXES, Chart, Record

P = ParamSpec("P")
T = TypeVar("T")
FLUSH_SECONDS = 0.02  # between two writes of the run's file; a row not yet written is lost when the process is killed
_LONGEST_FLUSH_SECONDS = 2.0


class WandbError(Exception):
    """What wandb raised, on one line, without the advice that follows its first."""


@dataclass(frozen=True, kw_only=True)
class OpenedRun:
    """An open run: whether it goes nowhere but to the directory `path`, and its address where it goes online."""

    offline: bool
    path: Path
    url: str | None


class Worker:
    """The process in which wandb runs, all of its files in `folder`. It ends when this object is gone, or its process.

    `mode` stands in for WANDB_MODE: "online", "offline", or "auto", which leaves it to the user's settings of wandb.
    What wandb would have printed as a warning is in `messages`.
    """

    def __init__(self, folder: Path, mode: str) -> None:
        self.environment = _environment(folder, mode)
        self.messages: list[str] = []
        self._pipe, theirs = Pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", f"from {__name__} import serve; serve({theirs.fileno()})"],
            env=self.environment,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in a terminal is for us
        )
        theirs.close()
        self._end = finalize(self, _end, self._pipe, self._process)

    def fits(self, folder: Path, mode: str) -> bool:
        """Whether a new worker would be like this one, and this one lives."""
        return self._process.poll() is None and self.environment == _environment(folder, mode)

    def ask(
        self, seconds: float, function: "Callable[Concatenate[Session, P], T]", *args: P.args, **options: P.kwargs
    ) -> T:
        """What `function` returns over there. Raises WandbError for what it raises.

        Where no answer comes in time, or an interrupt, the worker is ended: TimeoutError, WandbError.
        """
        try:
            self._pipe.send((function, args, options))
            if not self._pipe.poll(seconds):
                raise TimeoutError(f"no answer in {seconds:g} s")
            done, value, messages = self._pipe.recv()
        except (EOFError, OSError) as error:
            self.kill()
            raise error if isinstance(error, TimeoutError) else WandbError("wandb's process has ended") from error
        except BaseException:
            self.kill()
            raise
        self.messages += messages
        if not done:
            raise WandbError(value)
        result: T = value
        return result

    def kill(self) -> None:
        """End the worker and wandb's service, also one that hangs."""
        self._end()


def _end(pipe: Connection, process: "subprocess.Popen[bytes]") -> None:
    pipe.close()
    with suppress(psutil.NoSuchProcess):
        for below in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                below.kill()
    process.kill()
    process.wait()


def _environment(folder: Path, mode: str) -> dict[str, str]:
    """The worker's environment. WANDB_SERVICE would hand it the service of a process around this one."""
    ours = {name: value for name, value in os.environ.items() if name not in ("WANDB_SERVICE", "WANDB_MODE")}
    path = [*filter(None, [ours.get("PYTHONPATH")]), str(Path(__file__).resolve().parents[2])]
    return {
        # Tables and artifacts are staged here; `wandb sync` needs them, and the default is in the home directory.
        "WANDB_DATA_DIR": str(folder / "data"),
        "WANDB_CACHE_DIR": str(folder / "cache"),
        **ours,
        "WANDB_SILENT": "true",
        "WANDB_ERROR_REPORTING": "false",
        "PYTHONPATH": os.pathsep.join(path),
        **({} if mode == "auto" else {"WANDB_MODE": mode}),
    }


@dataclass(kw_only=True)
class Session:
    """The other side: the module `wandb` once its service runs, the open run, and what wandb has to say."""

    wandb: Any = None
    run: Any = None
    messages: list[str] = field(default_factory=list)

    def info(self, message: str) -> None:
        """What wandb would print for information."""

    def warning(self, message: str) -> None:
        """What wandb would print as a warning."""
        self.messages.append(re.sub(r"^wandb:\s*((WARNING|ERROR)\s+)?", "", message))

    error = warning


def serve(handle: int) -> None:
    """Answer what is asked over the pipe with the file descriptor `handle`, until its other end is closed."""
    pipe, session = Connection(handle), Session()
    while True:
        try:
            function, args, options = pipe.recv()
        except EOFError:
            os._exit(0)  # no exit hook of wandb's: a run that is not finished stays so
        try:
            answer: tuple[bool, Any] = (True, function(session, *args, **options))
        except BaseException as error:  # wandb may call sys.exit
            answer = (False, error_line(error))
        pipe.send((*answer, session.messages))
        session.messages.clear()


def error_line(error: BaseException) -> str:
    """An error of W&B on one line, without the advice that follows its first."""
    text = str(error).strip().partition("\n")[0] or type(error).__name__
    return printable(text)[:200]


def start(session: Session, seconds: float) -> None:
    """Import wandb and start its service, which has `seconds` for that. Raises what wandb raises."""
    if session.wandb is None:
        import wandb

        settings = wandb.Settings(silent=True, x_service_wait=seconds)
        wandb.setup(settings)
        wandb.termsetup(settings, session)
        session.wandb = wandb


def has_credential(session: Session) -> bool:
    """Whether a key or token is there: no question is asked and no server is."""
    found = bool(session.wandb.login(prompt=False, verify=False))
    session.messages.clear()
    return found


def open_run(session: Session, options: JsonObject, init_timeout: float, finish_timeout: float) -> OpenedRun:
    """Begin a run with its axes defined; `options` are those of `wandb.init`. Raises what wandb raises."""
    settings = session.wandb.Settings(  # a new object each time: wandb changes the one that it is given
        console="off",
        silent=True,
        disable_git=True,
        disable_code=True,
        x_disable_stats=True,
        x_disable_meta=True,
        x_disable_machine_info=True,
        init_timeout=init_timeout,
        finish_timeout=finish_timeout,
        finish_timeout_raises=True,
        x_transaction_log_flush_interval=FLUSH_SECONDS,
        use_dot_wandb=False,
    )
    session.run = run = session.wandb.init(**options, reinit="finish_previous", settings=settings)
    _define_axes(run, {**AXES, **(TRAINING_AXES if options["job_type"] == "train" else {})})
    return OpenedRun(offline=run.offline, path=Path(run.settings.sync_dir), url=None if run.offline else run.url)


def log_row(session: Session, row: Mapping[str, float]) -> None:
    """One live row."""
    session.run.log(dict(row))


def log_figures(session: Session, record: Record) -> None:
    """The rows and the summary, and the keys that the config gains."""
    _define_axes(session.run, record.axes)
    session.run.config.update(dict(record.config), allow_val_change=True)
    for row in record.rows:
        session.run.log(dict(row))
    session.run.summary.update(dict(record.summary))


def _define_axes(run: Any, axes: Mapping[str, str]) -> None:
    for pattern, axis in axes.items():
        run.define_metric(axis, hidden=True)
        run.define_metric(pattern, step_metric=axis)


def log_tables(session: Session, record: Record) -> None:
    """The tables and charts, in one row."""
    wandb = session.wandb
    made = {
        name: wandb.Table(columns=table.columns, data=table.rows, allow_mixed_types=True)
        for name, table in record.tables.items()
    }
    made |= {name: _line_series(wandb, chart) for name, chart in record.charts.items()}
    if made:
        session.run.log(made)


def _line_series(wandb: Any, chart: Chart) -> Any:
    xs, ys = ([[point[i] for point in points] for points in chart.lines.values()] for i in (0, 1))
    return wandb.plot.line_series(xs=xs, ys=ys, keys=list(chart.lines), title=chart.title, xname=chart.x)


def log_checkpoint(session: Session, path: Path, run_name: str, step: int | None) -> None:
    """The checkpoint as an artifact that only refers to its files: nothing is read, copied or uploaded."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", run_name)[:100]
    artifact = session.wandb.Artifact(f"checkpoint-{name}", type="checkpoint", metadata={"ckpt_step": step})
    artifact.add_reference(path.absolute().as_uri(), checksum=False)
    session.run.log_artifact(artifact, aliases=["latest", *([f"step-{step}"] if step is not None else [])])


def written_bytes(session: Session) -> int:
    """The size of the run's file, now. Raises OSError where it is gone."""
    return Path(session.run.settings.sync_file).stat().st_size


def wait_for_flush(session: Session, before: int) -> None:
    """Return once the run's file has grown beyond `before` bytes and is then left alone for three intervals.

    Raises OSError where it does not grow in two seconds: wandb says nothing when the disk is full.
    """
    deadline = time.monotonic() + _LONGEST_FLUSH_SECONDS
    size, quiet = -1, 0
    while (quiet < 3 or size <= before) and time.monotonic() < deadline:
        time.sleep(FLUSH_SECONDS)
        now = written_bytes(session)
        size, quiet = now, quiet + 1 if now == size else 0
    if size <= before:
        raise OSError("its file does not grow: is the disk full?")


def finish_run(session: Session, exit_code: int) -> None:
    """End the run and wait for its upload."""
    session.run.finish(exit_code=exit_code)


def save_view(
    session: Session, build: Callable[[str, str], tuple[Any, JsonObject]], entity: str | None, project: str
) -> SavedView:
    """Save the workspace that `build(entity, project)` makes; no entity: that of WANDB_ENTITY, or the user's own."""
    wandb = session.wandb
    own = entity or wandb.setup().settings.entity or wandb.Api().default_entity
    made, content = build(str(own), project)
    made.save()
    return SavedView(url=made.url, content=content)
