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
from pathlib import Path
from typing import Any

from runner.errors import ConfigError
from runner.results import FILE_NAME, read_json, write_json

PLAN_NAME = "sweep.json"
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Job:
    """One job of a sweep; `directory` is a name inside the sweep's directory."""

    number: int
    directory: str
    overrides: tuple[str, ...]
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a sweep was meant to do."""

    task: str
    command: tuple[str, ...]
    cwd: str
    launcher: str
    jobs: tuple[Job, ...]

    def with_reasons(self, reasons: Mapping[int, str]) -> "Plan":
        """The same plan; each job that `reasons` names by its number has that reason, the others have none."""
        return replace(self, jobs=tuple(replace(job, reason=reasons.get(job.number)) for job in self.jobs))


def write_plan(plan: Plan, directory: Path) -> None:
    """Write `sweep.json`, atomically. Raises OSError."""
    jobs = [
        {"number": job.number, "directory": job.directory, "overrides": list(job.overrides)}
        | ({"reason": job.reason} if job.reason else {})
        for job in plan.jobs
    ]
    content = {"version": VERSION, "task": plan.task, "command": list(plan.command), "cwd": plan.cwd}
    write_json(directory / PLAN_NAME, {**content, "launcher": plan.launcher, "jobs": jobs})


def read_plan(directory: Path) -> Plan:
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
        return Plan(
            task=str(content["task"]),
            command=_words(content["command"]),
            cwd=str(content["cwd"]),
            launcher=str(content["launcher"]),
            jobs=tuple(_job(job, index) for index, job in enumerate(content["jobs"])),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: is not what runner writes ({type(error).__name__}: {error})") from error


def _job(content: Mapping[str, Any], index: int) -> Job:
    number, directory, reason = content["number"], content["directory"], content.get("reason")
    if number != index or Path(directory).name != directory or directory in ("", ".", ".."):
        raise ValueError(f"job {index} has the number {number!r} and the directory {directory!r}")
    overrides = _words(content["overrides"])
    return Job(number=index, directory=directory, overrides=overrides, reason=None if reason is None else str(reason))


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
