"""A sweep, or several, read back: every job in one row, the curves, one for each run and tier over the checkpoints'
steps, and what tells jobs apart."""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePath
from typing import TypeVar

from runner.checkpoints.runs import step_in_name
from runner.comparison.jobs import Job, as_list, read_job
from runner.errors import CheckpointError, ConfigError
from runner.files.atomic import read_json
from runner.files.strict_json import read_object
from runner.metrics.verdict import thresholds
from runner.results import JsonObject, is_number

# Written by the parent of a sweep before its jobs start: which jobs there should be.
PLAN_NAME = "sweep.json"
_JOB_FOLDER = re.compile(r"(\d+)(_|$)")
_LARGEST_CONFIG = 1 << 20
# A job with one of these is a point; an mse that is not finite is one, too: it is there, as None.
_FIGURES = {"mse", "text", "accuracy"}
_LONG_LABEL = 40
# What a job is called and where it writes, not how it measures; and the thresholds, which a version of runner fixes.
_NAMING = ("ckpt", "step", "output", "cache", "verbose", "task")
_NAMING_GROUPS = ("tracker.", "tier.", "verdict.", "merge.output", "convert.output")
Key = TypeVar("Key")
Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class RemainingSteps:
    """When the thresholds of the mse are reached.

    `words`: for each threshold that is not reached yet, or why that cannot be said; `reached`: whether the last figure
    is below all of them. `band`: (step, lower, median, upper) of the mse, empty where nothing was fitted.
    `details`: the whole estimate (runner/metrics/forecast.py) as plain JSON values.
    """

    words: str
    reached: bool = False
    band: tuple[tuple[float, float, float, float], ...] = ()
    details: JsonObject = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Series:
    """The jobs of one run in one tier that have a step in their names and figures, by step.

    `variant`: what else tells them from another series of the same run and tier (`dtype=bfloat16`, a sweep's name).
    `label`: the shortest name that tells it from the other series of the comparison.
    """

    run: str
    tier: str
    variant: str
    jobs: tuple[Job, ...]
    label: str = ""
    estimate: RemainingSteps | None = None

    @property
    def steps(self) -> list[int]:
        """Ascending; a step that was measured twice is there twice."""
        return [job.step for job in self.jobs if job.step is not None]

    def values(self, metric: str) -> list[float | None]:
        """The figure at each of `steps`."""
        return [job.metric(metric) for job in self.jobs]


def estimate(
    steps: Sequence[int], mses: Sequence[float | None], rates: Sequence[float | None] | None = None
) -> RemainingSteps:
    """The estimate for a series of (step, mse), steps ascending; a mse that is not finite is None.

    `rates`: the learning rate of each point where it is known; only the points since its last change are fitted.
    """
    # numpy, which only a comparison needs.
    from runner.metrics.forecast import forecast, sentence

    found = forecast(steps, mses, sorted(thresholds().mse.values(), reverse=True), learning_rates=rates)
    open_targets = [target for target in found.targets if target.status != "reached"]
    # Targets of which the same is said share the words: `mse < 0.1, mse < 0.05: too few points.`
    groups: dict[str, list[str]] = {}
    for target in open_targets or found.targets[-1:]:
        name, _, rest = sentence(found, target).partition(": ")
        groups.setdefault(rest, []).append(name)
    band = found.band
    return RemainingSteps(
        words=" ".join(f"{', '.join(names)}: {rest}" for rest, names in groups.items()),
        reached=not open_targets,
        band=tuple(zip(band.steps, band.lower, band.median, band.upper, strict=True)) if band else (),
        details=asdict(found),
    )


def learning_rate(job: Job) -> float | None:
    """`learning_rate` in the checkpoint's config.json: the setting, not where a schedule has brought it.

    None where the checkpoint is not here (any more), or its config does not say.
    """
    if job.ckpt is None:
        return None
    path = Path(job.ckpt)
    config = (path if path.is_dir() else path.parent) / "config.json"
    if not config.is_file():
        return None
    try:
        rate = read_object(config, "config", _LARGEST_CONFIG).get("learning_rate")
    except CheckpointError:
        # Another program's file: whoever opens the checkpoint is told what is wrong with it.
        return None
    return float(rate) if is_number(rate) and rate > 0 else None


def make_series(jobs: Sequence[Job]) -> tuple[Series, ...]:
    """The series of `jobs`, in the order in which their first jobs stand.

    Checkpoints that only share a folder are no run: those of a series have their steps in their names, and the same
    layers, kinds, ranks and base. Where a folder holds several such kinds, one checkpoint of a kind is no series.
    """
    usable = [job for job in jobs if _is_point(job)]
    made = []
    for (_, tier), group in grouped(usable, lambda job: (job.run_path, job.tier or "")).items():
        kinds = grouped(group, lambda job: job.made_of)
        alone = {kind for kind, members in kinds.items() if len(kinds) > 1 and len({job.step for job in members}) < 2}
        group = [job for job in group if job.made_of not in alone]
        words = [", ".join(filter(None, pair)) for pair in zip(variants(group), _kind_words(group), strict=True)]
        named = list(zip(words, group, strict=True))
        for variant, members in grouped(named, lambda pair: pair[0]).items():
            for sweep, rows in _by_sweep([job for _, job in members]).items():
                full = ", ".join(part for part in (variant, sweep) if part)
                ordered = tuple(sorted(rows, key=lambda job: job.step or 0))
                made.append(Series(run=rows[0].run, tier=tier, variant=full, jobs=ordered, estimate=_estimate(ordered)))
    return tuple(replace(one, label=label) for one, label in zip(made, _labels(made), strict=True))


def _is_point(job: Job) -> bool:
    named = job.ckpt is not None and step_in_name(Path(job.ckpt).name) is not None
    return job.status == "ok" and named and job.step is not None and bool(_FIGURES & set(job.metrics))


def _kind_words(jobs: Sequence[Job]) -> list[str]:
    """What tells the kinds of checkpoints in one folder apart, for each of `jobs`; `` where they are of one kind."""
    parts = []
    for job in jobs:
        names = ("layer", "modulation", "np_rank", "num_ranks")
        layers = ", ".join("-".join(str(row[name]) for name in names if name in row) for row in job.layers)
        parts.append((f"layers {layers}" if layers else "", PurePath(job.base or "").name, job.family or ""))
    telling = [i for i in range(3) if len({part[i] for part in parts}) > 1]
    return [", ".join(part[i] for i in telling if part[i]) for part in parts]


def _labels(series: Sequence[Series]) -> list[str]:
    """`run · tier · variant` of each, without the parts that all share."""
    parts = [(one.run, one.tier, one.variant) for one in series]
    telling = [i for i in range(3) if len({part[i] for part in parts}) > 1] or [0, 1, 2]
    return without_shared_ends([" · ".join(part[i] for i in telling if part[i]) or part[0] for part in parts])


def without_shared_ends(labels: list[str], longest: int = _LONG_LABEL) -> list[str]:
    """Labels, where one is longer than `longest`, without the words at their ends that all of them have."""
    if len(labels) < 2 or max(map(len, labels)) <= longest:
        return labels
    words = [re.split(r"(?<=[\s/_.-])", label) for label in labels]
    head = _shared(words)
    rest = [row[head:] for row in words]
    tail = _shared([row[::-1] for row in rest])
    kept = ["".join(row[: len(row) - tail]) for row in rest]
    if not all(kept):
        return labels
    return [f"{'…' if head else ''}{label}{'…' if tail else ''}" for label in kept]


def _shared(rows: Sequence[Sequence[str]]) -> int:
    """How many words all of `rows` have in common at their start."""
    shortest = min(map(len, rows))
    return next((i for i in range(shortest) if len({row[i] for row in rows}) > 1), shortest)


def _estimate(jobs: Sequence[Job]) -> RemainingSteps | None:
    """Progress and readiness exist where there are verdicts, and so do the thresholds that the estimate is about."""
    if not any(job.verdict for job in jobs):
        return None
    return estimate(
        [job.step or 0 for job in jobs], [job.metric("mse") for job in jobs], list(map(learning_rate, jobs))
    )


def _by_sweep(jobs: list[Job]) -> dict[str, list[Job]]:
    """The jobs apart by sweep where several sweeps measured the same step, else together under ``."""
    sweeps = {job.sweep for job in jobs}
    repeated = Counter(job.step for job in jobs).most_common(1)[0][1] > 1
    return grouped(jobs, lambda job: job.sweep.resolve().name) if len(sweeps) > 1 and repeated else {"": jobs}


def grouped(items: Sequence[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    """The items by their key, in the order of the first of each."""
    groups: dict[Key, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def display_names(paths: Sequence[str]) -> dict[str, str]:
    """Each distinct path with the shortest tail of it that no other one has: `run`, or `a/run` and `b/run`."""
    distinct = list(dict.fromkeys(paths))
    names = {}
    for path in distinct:
        parts = PurePath(path).parts
        for count in range(1, len(parts) + 1):
            tail = parts[-count:]
            if sum(PurePath(other).parts[-count:] == tail for other in distinct) == 1:
                break
        names[path] = str(PurePath(*tail)) if parts else path
    return names


def varying(jobs: Sequence[Job]) -> dict[str, tuple[object, ...]]:
    """Config key → its value in each of `jobs`, where the values of the jobs that have a config are not all the same.

    What follows from the choice of a group (tier.measures from tier.name) is left out.
    """
    known = [job.config for job in jobs if job.config]
    keys = dict.fromkeys(key for config in known for key in config)
    values = {key: [json.dumps(config.get(key), sort_keys=True, default=str) for config in known] for key in keys}
    return {
        key: tuple(job.config.get(key) for job in jobs)
        for key in keys
        if len(set(values[key])) > 1 and not _follows(key, values)
    }


def _follows(key: str, values: Mapping[str, Sequence[str]]) -> bool:
    """Whether the group's name tells the value of its `key`."""
    name = f"{key.partition('.')[0]}.name"
    if key == name or name not in values:
        return False
    return len(set(zip(values[name], values[key], strict=True))) == len(set(values[name]))


def variants(jobs: Sequence[Job]) -> list[str]:
    """What tells each of `jobs` (of one run and tier) from the others beside the step: `dtype=bfloat16`, or ``."""
    keys = [key for key in varying(jobs) if key not in _NAMING and not key.startswith(_NAMING_GROUPS)]
    return [", ".join(f"{key}={spelled(job.config.get(key))}" for key in keys) for job in jobs]


def spelled(value: object) -> str:
    """A config value as it is written on the command line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


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
    def ranking(self) -> list[Job]:
        """The jobs with an mse that are in no series, closest first; those of damaged checkpoints last."""
        drawn = {(job.sweep, job.name) for series in self.series for job in series.jobs}
        rest = [job for job in self.done if job.metric("mse") is not None and (job.sweep, job.name) not in drawn]
        return sorted(rest, key=lambda job: (job.damaged, job.metric("mse")))

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
    damaged = {job.ckpt for job in jobs if job.ckpt and job.failed_integrity}
    jobs = [replace(job, run=names[job.run_path], damaged=job.ckpt in damaged) for job in jobs]
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
    ordered = sorted(names, key=lambda name: (int(name.partition("_")[0]), name))
    return [read_job(directory, name, *names[name]) for name in ordered]


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
