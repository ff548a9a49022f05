"""`sweep.json`: the jobs that a sweep was meant to have, written into its directory before any of them starts.

    version, task
    command      the words of the command line, with steps and globs written out: what resume= runs again
    cwd          where it was given; relative paths in it start there
    launcher     basic, joblib, …
    jobs         [{number, directory, overrides, reason}]: `directory` inside the sweep's own; `overrides` in Hydra's
                 spelling; `reason`, only where the launcher knows one, says why the job left no result

A job that was started has its directory; one that ended has `result.json` in it. So a job without its directory was
never started, and one with a directory and no result is lost.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from runner.checkpoints.runs import step_in_name
from runner.errors import ConfigError
from runner.files.atomic import read_json, write_json
from runner.overrides import CommandLine, unquoted
from runner.results import FILE_NAME

PLAN_NAME = "sweep.json"
VERSION = 1
_LONGEST_TAG = 60


@dataclass(frozen=True, kw_only=True)
class PlannedJob:
    """One job of a sweep; `directory` is a name inside the sweep's directory."""

    number: int
    directory: str
    overrides: tuple[str, ...]
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """What a sweep was meant to do."""

    task: str
    command: tuple[str, ...]
    cwd: str
    launcher: str
    jobs: tuple[PlannedJob, ...]

    def with_reasons(self, reasons: Mapping[int, str]) -> "SweepPlan":
        """The same plan; each job that `reasons` names by its number has that reason, the others have none."""
        return replace(self, jobs=tuple(replace(job, reason=reasons.get(job.number)) for job in self.jobs))


def write_plan(plan: SweepPlan, directory: Path) -> None:
    """Write `sweep.json`, atomically. Raises OSError."""
    jobs = [
        {"number": job.number, "directory": job.directory, "overrides": list(job.overrides)}
        | ({"reason": job.reason} if job.reason else {})
        for job in plan.jobs
    ]
    content = {"version": VERSION, "task": plan.task, "command": list(plan.command), "cwd": plan.cwd}
    write_json(directory / PLAN_NAME, {**content, "launcher": plan.launcher, "jobs": jobs})


def read_plan(directory: Path) -> SweepPlan:
    """The plan of the sweep in `directory`. Raises ConfigError where there is none, or it cannot be read."""
    path = directory / PLAN_NAME
    if not directory.is_dir():
        raise ConfigError(f"{directory}: no such directory; a sweep is a directory that -m wrote, under sweeps/")
    try:
        content = read_json(path)
    except FileNotFoundError as error:
        raise ConfigError(f"{directory}: holds no {PLAN_NAME}, so it is no sweep that runner started") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    try:
        return SweepPlan(
            task=str(content["task"]),
            command=_words(content["command"]),
            cwd=str(content["cwd"]),
            launcher=str(content["launcher"]),
            jobs=tuple(_job(job, index) for index, job in enumerate(content["jobs"])),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: is not what runner writes ({type(error).__name__}: {error})") from error


def _job(content: Mapping[str, Any], index: int) -> PlannedJob:
    number, directory, reason = content["number"], content["directory"], content.get("reason")
    if number != index or Path(directory).name != directory or directory in ("", ".", ".."):
        raise ValueError(f"job {index} has the number {number!r} and the directory {directory!r}")
    overrides = _words(content["overrides"])
    return PlannedJob(
        number=index, directory=directory, overrides=overrides, reason=None if reason is None else str(reason)
    )


def _words(content: Sequence[Any]) -> tuple[str, ...]:
    if not isinstance(content, list) or not all(isinstance(word, str) for word in content):
        raise TypeError("a list of words is expected")
    return tuple(content)


def good_result(directory: Path) -> dict[str, Any] | None:
    """The result that a job left in its `directory`, where it is whole and its status ok; else None."""
    try:
        result = read_json(directory / FILE_NAME)
    except (OSError, ValueError):
        return None
    return result if isinstance(result, dict) and result.get("status") == "ok" else None


def plan_of(config: DictConfig, arguments: list[str], loader: ConfigLoader, line: CommandLine) -> SweepPlan:
    """The jobs of the sweep that Hydra composed `config` for: the product of all values in its `arguments`, in order.

    Raises ConfigError for a sweep over what is no list, such as interval(0,1).
    """
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(arguments)
    overrides = {each.get_key_element(): each for each in parsed}
    swept = [key for key, override in overrides.items() if override.is_sweep_override()]
    choices = [[(key, value) for value in _values(override)] for key, override in overrides.items()]
    jobs = []
    for number, chosen in enumerate(product(*choices)):
        directory = f"{number}_{_tag(dict(chosen), swept, config)}"
        jobs.append(PlannedJob(number=number, directory=directory, overrides=tuple(f"{k}={v}" for k, v in chosen)))
    return SweepPlan(
        task=str(config.task),
        command=(*line.flags, *(key if value is None else f"{key}={value}" for key, value in line.overrides)),
        cwd=str(Path.cwd()),
        launcher=str(OmegaConf.select(config, "hydra.runtime.choices.hydra/launcher") or "basic"),
        jobs=tuple(jobs),
    )


def _values(override: Override) -> list[str]:
    """The values of one override as words, as Hydra's own sweeper spells them."""
    if override.is_sweep_override():
        if not override.is_discrete_sweep():
            raise ConfigError(f"{override.input_line}: give the values as a list or a range")
        return list(override.sweep_string_iterator())
    return [override.get_value_element_as_str()]


def _tag(values: dict[str, str], swept: Sequence[str], config: DictConfig) -> str:
    """A short name for a job's directory, of harmless characters: what is measured, then what else is swept."""
    ckpt = values.get("ckpt", OmegaConf.select(config, "ckpt"))
    step = values.get("step", OmegaConf.select(config, "step"))
    path = Path(unquoted(str(ckpt))) if ckpt is not None else Path(str(config.task))
    name = path.name
    if step not in (None, "null"):
        name += f"@{step}"
    elif step_in_name(name) is not None and path.parent.name:
        name = f"{path.parent.name}@{step_in_name(name)}"  # runs may have steps in common
    others = [Path(unquoted(values[key])).name for key in swept if key not in ("ckpt", "step")]
    tag = "_".join([name, *others])
    return "".join(c if c.isalnum() or c in "-_.@" else "_" for c in tag)[:_LONGEST_TAG]
