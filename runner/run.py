"""One run: the composed config, its task, and what is left of it: `result.json`, the report, the tracker's record."""

import logging
import os
import re
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import fields
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from rich.console import Console

from runner.config import (
    TASKS,
    CommonConfig,
    config_directory,
    did_you_mean,
    list_keys,
    one_as_list,
    register,
    translated,
    unknown_key,
)
from runner.errors import ConfigError, RunnerError
from runner.imports import uncollected
from runner.overrides import quoted
from runner.reports.console import print_result
from runner.results import FILE_NAME, Result, write_json
from runner.tasks.context import Context
from runner.tracking.base import NullTracker, RunIdentity, Tracker

log = logging.getLogger(__name__)
# The exit code of the last job that ran in this process: Hydra gives no way to return one.
exit_code = 0
# Tasks that log while they run, not only at the end.
_LIVE = ("train",)
# Tasks that tell the tracker themselves, or that are about its runs and have none of their own.
_UNTRACKED = ("compare", "panels")
# What Python says of a call with an argument too much or too few.
_ARGUMENT = re.compile(r"unexpected keyword argument '(?P<unknown>\w+)'|missing \d+ required .*?'(?P<missing>\w+)'")


def job(cfg: DictConfig) -> str | None:
    """What Hydra calls for each job. It never raises but for an interrupt: a failure is written to `result.json`.

    Of a sweep's job the parent process tells, from what lies in its directory; returned is what kept it from there.
    """
    global exit_code
    logging.captureWarnings(True)
    logging.raiseExceptions = False  # where the disk is full the result says so, not a traceback of the log
    hydra = HydraConfig.get()
    directory = Path(hydra.runtime.output_dir)
    sweep = Path(hydra.sweep.dir).name if hydra.mode == RunMode.MULTIRUN else None
    if sweep is not None:
        # A result from before a sweep was cut off says nothing about this attempt.
        (directory / FILE_NAME).unlink(missing_ok=True)
    result, exit_code, location = _run_and_record(cfg, directory, sweep)
    if sweep is not None:
        return None if (directory / FILE_NAME).exists() else f"{FILE_NAME} could not be written"
    if result["status"] == "ok":
        try:
            print_result(result, Console(), verbose=cfg.verbose, directory=directory, tracked=location)
            sys.stdout.flush()
        except BrokenPipeError:
            # Whoever reads (`| head`) has seen enough; what was found still decides the exit code.
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123 - for the interpreter's own flush at exit
    else:
        print(f"runner: error: {result['error']['message']}", file=sys.stderr)
    return None


def call(task: str, path: str | Path, **options: Any) -> dict[str, Any]:
    """One task for notebooks: the dict of `result.json`, nothing written.

    `options` are the keys of the command line: base, reference, tier, format, step, dtype, device, accuracy, …
    (a nested key as `**{"data.path": …}`). Raises the RunnerError that the command line would print.
    """
    overrides = [f"task={task}", "tracker=none", f"ckpt={quoted(str(path))}"]
    for key, value in options.items():
        if value is not None:
            spelled = quoted(str(value)) if isinstance(value, (str, Path)) else str(value).replace("'", '"')
            overrides.append(f"{key}={spelled}")
    setup()
    try:
        with initialize_config_dir(config_dir=str(config_directory()), version_base="1.3"):
            cfg = compose("config", overrides=overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise translated(error, task, {key: str(value) for key, value in options.items()}) from error
    with tempfile.TemporaryDirectory() as directory:
        return _run(cfg, Path(directory), NullTracker()).to_dict()


def setup() -> None:
    """Make the typed roots known to Hydra."""
    register()


def _run_and_record(cfg: DictConfig, directory: Path, sweep: str | None) -> tuple[dict[str, Any], int, str | None]:
    """Run the task, write the result, then tell the tracker. Returns result, exit code and where the tracker put it."""
    tracker: Tracker = NullTracker()
    code = 0
    try:
        tracker = tracker_of(cfg)
        if cfg.task in _LIVE:
            tracker.start(_identity(cfg, {}, sweep), _plain(cfg))
        outcome = _run(cfg, directory, tracker, in_sweep=sweep is not None)
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
    if result["status"] == "ok" and cfg.task not in _UNTRACKED:
        if cfg.task not in _LIVE:
            tracker.start(_identity(cfg, result, sweep), _plain(cfg))
        tracker.record(result)
    tracker.finish(code)
    for warning in tracker.warnings:
        print(f"runner: warning: {warning}", file=sys.stderr)
    if tracker.location:
        log.info("%s", tracker.location)
    return result, code, tracker.location


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
    ckpt = OmegaConf.select(cfg, "ckpt")
    return Result.failed(cfg.task, error, None if ckpt is None else str(ckpt))


def _write(result: dict[str, Any], cfg: DictConfig, directory: Path) -> int:
    """Write `result.json` and `output=FILE`. 2, and one line, where that is not possible."""
    paths = [directory / FILE_NAME, *([Path(cfg.output).expanduser()] if cfg.output else [])]
    for path in paths:
        try:
            write_json(path, result)
        except OSError as error:
            print(f"runner: error: {path}: cannot be written: {error.strerror}", file=sys.stderr)
            return 2
    return 0


def _run(cfg: DictConfig, directory: Path, tracker: Tracker, *, in_sweep: bool = False) -> Result:
    """Check the config, build its components, run the task's page; a sweep's job shows no progress of its own."""
    config = _typed(cfg)
    console = Console(stderr=True, quiet=in_sweep)
    context = Context(directory=directory, tracker=tracker, progress=console, in_sweep=in_sweep)
    return _page(config.task).run(config, context)


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
        if OmegaConf.is_dict(cfg[name]) and "_target_" not in cfg[name]:
            raise ConfigError(f"{name}: its YAML has no _target_; begin it as those of conf/{name}/ begin")
        try:
            if OmegaConf.is_dict(cfg[name]):
                one_as_list(cfg[name], list_keys(get_object(cfg[name]["_target_"])))
            built[name] = instantiate(cfg[name], _convert_="all")
        except RunnerError:
            raise
        except Exception as error:
            cause = error.__cause__ or error
            if isinstance(cause, RunnerError):
                raise cause from error
            if isinstance(cause, MissingMandatoryValue):
                key = str(cause).splitlines()[0].rpartition(" ")[2]
                raise ConfigError(f"{key} is needed; give it as {key}=…") from error
            if match := _ARGUMENT.search(str(cause)):
                raise _bad_argument(name, cfg[name]["_target_"], match) from error
            raise ConfigError(f"{name}: {str(cause).splitlines()[0]}") from error
    return built


def _bad_argument(group: str, target: str, match: re.Match[str]) -> ConfigError:
    """A key too much, or one too few, in a YAML that a user wrote."""
    if match["missing"]:
        return ConfigError(f"{group}.{match['missing']} is needed: its YAML does not say it")
    known = [str(name) for name in signature(get_object(target)).parameters]
    return ConfigError(f"{group}.{match['unknown']} is unknown{did_you_mean(match['unknown'], known)}")


def tracker_of(cfg: DictConfig) -> Tracker:
    """The tracker that a composed config names. Raises ConfigError."""
    tracker: Tracker = _components(cfg, ["tracker"])["tracker"]
    return tracker


def _plain(cfg: DictConfig) -> dict[str, Any]:
    container: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    return container


def _identity(cfg: DictConfig, result: Mapping[str, Any], sweep: str | None) -> RunIdentity:
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
