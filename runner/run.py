"""One run: the composed config, its task, and what is left of it: `result.json`, the report, the tracker's record."""

import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from importlib import import_module
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import TaskFunction
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from runner.checkpoints.runs import resolve
from runner.config import (
    TASKS,
    CheckpointConfig,
    CommonConfig,
    implied_family,
    list_keys,
    missing_key,
    one_as_list,
    refused,
    register,
    unknown_key,
)
from runner.errors import ConfigError, RunnerError, did_you_mean, printable
from runner.files.atomic import write_json, write_whole
from runner.installation import config_directory, demo_run, uncollected
from runner.overrides import CommandLine, quoted, spell
from runner.reports.console import print_result
from runner.results import FILE_NAME, Result
from runner.tasks.context import Context, require_checkpoint
from runner.tracking.base import RunIdentity, Tracker

log = logging.getLogger(__name__)
LOG_NAME = "runner.log"  # in a run's directory, as conf/hydra/job_logging/runner.yaml has it
# Tasks that log while they run, not only at the end.
_LIVE = ("train", "finetune")
# Tasks that tell the tracker themselves, or that are about its runs and have none of their own.
_UNTRACKED = ("compare", "panels")
# Tasks that need one checkpoint, and torch.
_HEAVY = ("diagnose", "convert", "diff")


def run_once(line: CommandLine) -> int:
    """Run the one job of a command line; its exit code. Raises ConfigError for what Hydra refuses."""
    codes: list[int] = []
    if is_follower():
        with tempfile.TemporaryDirectory() as directory:
            own = {"hydra.run.dir": directory, "hydra.output_subdir": "null", "tracker": "none", "output": "null"}
            given = {**dict(line.overrides), **own}
            hand_to_hydra(replace(line, overrides=tuple(given.items())), lambda cfg: codes.append(follow(cfg)))
        return codes[-1]
    hand_to_hydra(line, lambda cfg: codes.append(job(cfg)))
    return codes[-1] if codes else 0


def is_follower() -> bool:
    """Whether a launcher of several processes (torchrun) started this one, and another one writes and speaks."""
    return int(os.environ.get("WORLD_SIZE") or 1) > 1 and int(os.environ.get("RANK") or 0) > 0


def follow(cfg: DictConfig) -> int:
    """The share of a follower in a job: it writes nothing, and the first process says what is wrong."""
    with tempfile.TemporaryDirectory() as directory:
        try:
            return _run(cfg, Path(directory), Tracker(), in_sweep=True).exit_code
        except RunnerError as error:
            return error.exit_code


def hand_to_hydra(line: CommandLine, task: TaskFunction) -> None:
    """Let Hydra compose the config of `line` and call `task` with it, once or for each job of a sweep.

    Raises ConfigError for what Hydra refuses, and where its own files cannot be written.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # with it Hydra raises instead of printing and exiting
    overrides = [key if value is None else spell(key, value, multirun=line.multirun) for key, value in line.overrides]
    before, sys.argv = sys.argv, ["runner", *line.flags, *overrides]
    try:
        with _refusals(line.get("task") or "diagnose", dict(line.overrides), multirun=line.multirun):
            _through_hydra(line, overrides, task)
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid YAML: {' '.join(str(error).split())}") from error
    except BrokenPipeError:
        raise
    except OSError as error:
        raise ConfigError(f"{error.filename or Path.cwd()}: cannot be written: {error.strerror}") from error
    finally:
        sys.argv = before


def _through_hydra(line: CommandLine, overrides: list[str], task: TaskFunction) -> None:
    """Hydra's own main composes the config once more than is needed, to see whether it asks for a sweep."""
    if not line.flags_of_hydra and line.get("hydra.mode") is None:
        with initialize_config_dir(config_dir=str(config_directory()), job_name="runner", version_base="1.3"):
            application: Any = GlobalHydra.instance().hydra
            go = application.multirun if line.multirun else application.run
            go(config_name="config", task_function=task, overrides=overrides)
        return
    hydra.main(config_path=str(config_directory()), config_name="config", version_base="1.3")(task)()


@contextmanager
def _refusals(task: str, given: Mapping[str, str | None], *, multirun: bool = False) -> Iterator[None]:
    """Within the block, what Hydra refuses is a ConfigError; `given`: the overrides as they were typed."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise refused(error, task, given, multirun=multirun) from error
    except ValueError as error:
        # OmegaConf's own, untyped: a word in the place of a list's index.
        key = next((key for key in given if "." in key and not key.rpartition(".")[2].isdigit()), None)
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if key is None or not frame.f_globals["__name__"].startswith("omegaconf."):
            raise
        raise unknown_key(key, task) from error


def job(cfg: DictConfig) -> int:
    """The job of a single run: its result is written, shown and then tracked; its exit code.

    Raises nothing but an interrupt.
    """
    directory = Path(HydraConfig.get().runtime.output_dir)
    finished = _run_and_write(cfg, directory, None)
    recording = _recording(finished, cfg, directory, None)
    if finished.result["status"] != "ok":
        print(f"runner: error: {finished.result['error']['message']}", file=sys.stderr)
    with _read_no_more():
        if finished.result["status"] == "ok":
            print_result(finished.result, verbose=cfg.verbose, directory=directory)
            sys.stdout.flush()
    recording()
    _say_where(finished.tracker)
    with _read_no_more():
        if finished.result["status"] == "ok" and finished.tracker.location:
            print(f"W&B: {printable(finished.tracker.location)}")
            sys.stdout.flush()
    return finished.code


@contextmanager
def _read_no_more() -> Iterator[None]:
    """Whoever reads (`| head`) has seen enough where the block fails; what was found still decides the exit code."""
    try:
        yield
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123 - for the interpreter's own flush at exit


def sweep_job(cfg: DictConfig) -> str | None:
    """One job of a sweep, in whichever process: what becomes of it is told from what lies in its directory.

    Returned is what kept its result from there. Raises nothing but an interrupt.
    """
    settings = HydraConfig.get()
    directory = Path(settings.runtime.output_dir)
    # A result from before a sweep was cut off says nothing about this attempt.
    (directory / FILE_NAME).unlink(missing_ok=True)
    finished = _run_and_write(cfg, directory, Path(settings.sweep.dir).name)
    if cfg.task in _LIVE:  # the sweep tracks the others (runner/sweeps/records.py)
        _recording(finished, cfg, directory, Path(settings.sweep.dir).name)()
        _say_where(finished.tracker)
    return None if (directory / FILE_NAME).exists() else f"{FILE_NAME} could not be written"


def _spelled(value: object) -> str:
    """A value of Python in Hydra's grammar."""
    if isinstance(value, (str, Path)):
        return quoted(str(value))
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(_spelled, value))}]"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{key}:{_spelled(item)}' for key, item in value.items())}}}"
    return "null" if value is None else str(value)


def call(task: str, path: str | Path, **options: Any) -> dict[str, Any]:
    """One task for notebooks: the dict of `result.json`, nothing written.

    `options` are the keys of the command line: base, reference, tier, format, step, dtype, device, accuracy, …
    (a nested key as `**{"data.path": …}`). Raises the RunnerError that the command line would print.
    """
    overrides = [f"task={task}", "tracker=none", f"ckpt={quoted(str(path))}"]
    if family := implied_family(options):
        overrides.append(f"family={family}")
    for key, value in options.items():
        if value is not None:
            overrides.append(f"{key}={_spelled(value)}")
    setup()
    with (
        _refusals(task, {key: str(value) for key, value in options.items()}),
        initialize_config_dir(config_dir=str(config_directory()), version_base="1.3"),
    ):
        cfg = compose("config", overrides=overrides)
    with tempfile.TemporaryDirectory() as directory:
        return _run(cfg, Path(directory), Tracker()).to_dict()


def setup() -> None:
    """Make the typed roots known to Hydra."""
    register()


@dataclass(frozen=True, kw_only=True)
class _Finished:
    """A job that has ended: what it found, its exit code, and the tracker, in which a live run is still open."""

    result: dict[str, Any]
    code: int
    tracker: Tracker


def _run_and_write(cfg: DictConfig, directory: Path, sweep: str | None) -> _Finished:
    """Run the task and write its result."""
    logging.captureWarnings(True)
    logging.raiseExceptions = False  # where the disk is full the result says so, not a traceback of the log
    tracker: Tracker = Tracker()
    code = 0
    try:
        tracker = tracker_of(cfg)
        # A training that is refused has no run: it begins with the first row, or where there was none, at the end.
        started = cache(lambda: tracker.start(identity(cfg, {}, sweep), plain_config(cfg)))
        outcome = _run(cfg, directory, tracker, in_sweep=sweep is not None, started=started)
        if cfg.task in _LIVE:
            started()
        code = outcome.exit_code
    except RunnerError as error:
        log.error("%s", error)
        outcome, code = _failed(cfg, error), error.exit_code
    except Exception as error:
        log.exception("internal error")
        outcome, code = _failed(cfg, _unexpected(error, directory)), 1
    except BaseException:
        tracker.finish(1)
        raise
    result = outcome.to_dict()
    code = _write(result, cfg, directory) or code
    return _Finished(result=result, code=code, tracker=tracker)


def _recording(finished: _Finished, cfg: DictConfig, directory: Path, sweep: str | None) -> Callable[[], None]:
    """What tells the tracker of a job."""
    tracker, result = finished.tracker, finished.result
    if result["status"] == "ok" and is_tracked(cfg):
        own_log = directory / LOG_NAME
        return tracker.leave(identity(cfg, result, sweep), plain_config(cfg), result, finished.code, own_log)

    def rest() -> None:
        if result["status"] == "ok" and cfg.task in _LIVE:
            tracker.record(result)
        tracker.finish(finished.code)

    return rest


def _say_where(tracker: Tracker) -> None:
    """What went wrong with the tracker, on stderr; where the run is, into the log."""
    for warning in tracker.warnings:
        print(f"runner: warning: {printable(warning)}", file=sys.stderr)
    if tracker.location:
        log.info("%s", tracker.location)


def is_tracked(cfg: DictConfig) -> bool:
    """Whether the tracker is told of a job of this task when it has ended."""
    return cfg.task not in (*_UNTRACKED, *_LIVE)


def _unexpected(error: Exception, directory: Path) -> RunnerError:
    """What ended a task that is no error of the user's; a launcher whose time limit is near raises one inside it."""
    chain: list[BaseException] = [error]
    while following := chain[-1].__cause__ or chain[-1].__context__:  # transformers wraps what is raised in an import
        chain.append(following)
    if any(type(each).__name__ == "UncompletedJobError" for each in chain):  # submitit's
        return RunnerError(
            "out of time: stopped by the launcher's limit; give it more with hydra.launcher.timeout_min="
        )
    return RunnerError(f"internal error ({type(error).__name__}: {error}); the log in {directory} says where")


def _failed(cfg: DictConfig, error: RunnerError) -> Result:
    ckpt, step = OmegaConf.select(cfg, "ckpt"), OmegaConf.select(cfg, "step")
    if ckpt is not None and isinstance(step, int):
        with suppress(RunnerError):  # which may be the very error
            ckpt = resolve(demo_run() if ckpt == "demo" else Path(str(ckpt)).expanduser(), step)
    return Result.failed(cfg.task, error, None if ckpt is None else str(ckpt))


def _write(result: dict[str, Any], cfg: DictConfig, directory: Path) -> int:
    """Write `result.json` and `output=FILE`. 2, and one line, where that is not possible."""
    paths = [directory / FILE_NAME, *([Path(cfg.output).expanduser()] if cfg.output else [])]
    as_file = getattr(_page(cfg.task), "as_file", None) if cfg.output and result["status"] == "ok" else None
    for path in paths:
        try:
            own = as_file(result, path) if as_file and path == paths[-1] else None
            write_json(path, result) if own is None else write_whole(path, own)
        except OSError as error:
            if result["status"] == "error":  # which says what is wrong already
                return 2
            print(f"runner: error: {path}: cannot be written: {error.strerror}", file=sys.stderr)
            return 2
    return 0


def _run(
    cfg: DictConfig,
    directory: Path,
    tracker: Tracker,
    *,
    in_sweep: bool = False,
    started: Callable[[], None] | None = None,
) -> Result:
    """Check the config, build its components, run the task's page; a sweep's job shows no progress of its own."""
    config = _typed(cfg)
    if isinstance(config, CheckpointConfig) and config.task in _HEAVY:
        require_checkpoint(config)  # before torch is imported to no avail
    _try_places(config)
    context = Context(
        directory=directory, tracker=tracker, quiet=in_sweep, in_sweep=in_sweep, started=started or (lambda: None)
    )
    return _page(config.task).run(config, context)


def _try_places(config: CommonConfig) -> None:
    """Raise ConfigError where what is to be written cannot be, before anything is measured."""
    places = {"output": Path(config.output).expanduser() if config.output else None}
    places["cache"] = Path(config.cache).expanduser() if config.cache else None
    for key, path in places.items():
        if path is None:
            continue
        if key == "output" and path.is_dir():
            raise ConfigError(f"output={path}: is a directory; name the file to write, as {path / FILE_NAME}")
        directory = path.parent if key == "output" else path
        try:
            if key == "output":
                directory.mkdir(parents=True, exist_ok=True)
            while not directory.exists():  # a cache is made when something is kept in it
                directory = directory.parent
            tempfile.TemporaryFile(dir=directory).close()
        except OSError as error:
            raise ConfigError(f"{key}={path}: cannot be written: {error.strerror}") from error


def _page(task: str) -> Any:
    name = f"runner.tasks.{task}"
    if name in sys.modules:
        return import_module(name)
    with uncollected():
        return import_module(name)


def _typed(cfg: DictConfig) -> CommonConfig:
    """The config as the task's dataclass, its groups as the objects their `_target_` names."""
    known = {field.name for field in fields(TASKS[cfg.task])}
    for key in cfg:
        if str(key) not in known:
            raise unknown_key(str(key), cfg.task)
    try:
        OmegaConf.resolve(cfg)
        values = {str(key): cfg[key] for key in cfg if not OmegaConf.is_config(cfg[key])}
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0]) from error
    groups = [str(key) for key in cfg if OmegaConf.is_config(cfg[key]) and key != "tracker"]
    return TASKS[cfg.task](**values, **_components(cfg, groups))


def _components(cfg: DictConfig, names: list[str]) -> dict[str, Any]:
    """The named nodes as objects: the one place where `_target_` is followed, and only ever in our own config."""
    built = {}
    for name in names:
        node = cfg[name]
        said = (name, repr(OmegaConf.to_container(node)))
        if said in _SHARED:
            built[name] = _SHARED[said]
            continue
        if OmegaConf.is_dict(node):
            _check_arguments(name, node)
        try:
            if OmegaConf.is_dict(node):
                one_as_list(node, list_keys(get_object(node["_target_"])))
            built[name] = instantiate(node, _convert_="all")
            if _is_frozen(built[name]):
                _SHARED[said] = built[name]
        except RunnerError:
            raise
        except Exception as error:
            cause = error.__cause__ or error
            if isinstance(cause, RunnerError):
                raise cause from error
            if isinstance(cause, MissingMandatoryValue):
                raise missing_key(str(cause.full_key)) from error
            raise ConfigError(f"{name}: {str(cause).splitlines()[0]}") from error
    return built


# What has been built of a group, by what its node says: the jobs of a sweep share what cannot change.
_SHARED: dict[tuple[str, str], Any] = {}


def _is_frozen(component: object) -> bool:
    return is_dataclass(component) and bool(vars(type(component))["__dataclass_params__"].frozen)


def _check_arguments(group: str, node: DictConfig) -> None:
    """Raise ConfigError for a key too much, or one too few, in a YAML that a user wrote."""
    if "_target_" not in node:
        raise ConfigError(f"{group}: its YAML has no _target_; begin it as those of conf/{group}/ begin")
    try:
        parameters = signature(get_object(node["_target_"])).parameters
    except (ImportError, ValueError, TypeError) as error:
        raise ConfigError(f"{group}._target_: {node['_target_']} cannot be imported: {error}") from error
    if any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    given = {str(key) for key in node if not str(key).startswith("_")}
    for name in sorted(given - set(parameters)):
        raise ConfigError(f"{group}.{name} is unknown{did_you_mean(name, parameters)}")
    for name, parameter in parameters.items():
        if parameter.default is Parameter.empty and name not in given:
            raise ConfigError(f"{group}.{name} is needed: its YAML does not say it")


def tracker_of(cfg: DictConfig) -> Tracker:
    """The tracker that a composed config names. Raises ConfigError."""
    tracker: Tracker = _components(cfg, ["tracker"])["tracker"]
    return tracker


def plain_config(cfg: DictConfig) -> dict[str, Any]:
    """The config as plain values, resolved."""
    container: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    return container


def identity(cfg: DictConfig, result: Mapping[str, Any], sweep: str | None) -> RunIdentity:
    """What names the run of a job in the tracker; `sweep`: the name of the sweep that it belongs to."""
    ckpt = Path(result.get("ckpt") or cfg.task).absolute()
    return RunIdentity(
        task=cfg.task,
        run_name=ckpt.parent.name if result.get("ckpt") else "run",
        step=result.get("step"),
        series=sweep,
        family=result.get("family"),
        format=result.get("format"),
        tier=result.get("tier"),
    )
