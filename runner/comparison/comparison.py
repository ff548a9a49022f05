"""A sweep, or several, read back: every job in one row, the curves, and what differs."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from runner.comparison.jobs import Job, as_list, read_job
from runner.comparison.series import Series, display_names, make_series, varying
from runner.errors import ConfigError
from runner.files.atomic import read_json

# Written by the parent of a sweep before its jobs start: which jobs there should be.
PLAN_NAME = "sweep.json"
_JOB_FOLDER = re.compile(r"(\d+)(_|$)")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """`jobs` in the order of their numbers, those of each directory together.

    `differences`: config key → its value in each of `jobs`, for the keys whose values are not all the same.
    """

    directories: tuple[Path, ...]
    jobs: tuple[Job, ...]
    series: tuple[Series, ...]
    differences: Mapping[str, tuple[object, ...]]

    @property
    def done(self) -> list[Job]:
        """The jobs that ended well."""
        return [job for job in self.jobs if job.status == "ok"]

    @property
    def failures(self) -> list[Job]:
        """The jobs that failed, were lost or never started."""
        return [job for job in self.jobs if job.status != "ok"]


def read(sweep: Path | Sequence[Path]) -> Comparison:
    """The comparison of one sweep directory, or of several.

    Raises ConfigError for a directory that is not there, or that holds no job.
    """
    named = {path.resolve(): path for path in ([sweep] if isinstance(sweep, Path) else sweep)}
    directories = tuple(named.values())
    if not directories:
        raise ConfigError("sweep= names no directory")
    jobs = [job for directory in directories for job in _jobs(directory)]
    names = display_names([job.run_path for job in jobs])
    jobs = [replace(job, run=names[job.run_path]) for job in jobs]
    return Comparison(directories=directories, jobs=tuple(jobs), series=make_series(jobs), differences=varying(jobs))


def _jobs(directory: Path) -> list[Job]:
    if not directory.is_dir():
        hint = "; several are a list: sweep=[A,B]" if "," in str(directory) else ""
        raise ConfigError(f"sweep={directory}: {'no directory' if directory.exists() else 'no such directory'}{hint}")
    planned = _planned(directory)
    try:
        found = [path.name for path in directory.iterdir() if path.is_dir() and _JOB_FOLDER.match(path.name)]
    except OSError as error:
        raise ConfigError(f"sweep={directory}: cannot be listed: {error.strerror}") from error
    names = planned | {name: ((), None) for name in found if name not in planned}
    if not names:
        raise ConfigError(f"sweep={directory}: no sweep: it holds no job folders such as 0_checkpoint-500")
    return [read_job(directory, name, *names[name]) for name in sorted(names, key=_number)]


def _planned(directory: Path) -> dict[str, tuple[tuple[str, ...], str | None]]:
    """Job folder → its overrides, and why it has no result if the launcher knows; {} where the parent wrote no plan."""
    try:
        plan = read_json(directory / PLAN_NAME)
    except (OSError, ValueError):
        return {}
    rows = plan.get("jobs") if isinstance(plan, dict) else None
    return {
        row["directory"]: (tuple(map(str, as_list(row.get("overrides")))), row.get("reason"))
        for row in as_list(rows)
        if isinstance(row, dict) and isinstance(row.get("directory"), str) and _JOB_FOLDER.match(row["directory"])
        and Path(row["directory"]).name == row["directory"]
    }  # fmt: skip


def _number(name: str) -> tuple[int, str]:
    match = _JOB_FOLDER.match(name)
    assert match is not None
    return int(match[1]), name
