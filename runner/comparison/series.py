"""The curves of a comparison: one for each run and tier, over the checkpoints' steps.

The learning rate that a checkpoint was trained with, as its own config says.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import TypeVar

from runner.comparison.differences import variants
from runner.comparison.estimate import Estimate, estimate
from runner.comparison.jobs import Job, is_number
from runner.errors import CheckpointError
from runner.files.strict_json import read_object

_LARGEST_CONFIG = 1 << 20


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


# A job with one of these is a point; an mse that is not finite is one, too: it is there, as None.
_FIGURES = {"mse", "text"}
_LONG_LABEL = 40
Key = TypeVar("Key")
Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Series:
    """The jobs of one run in one tier that have a step and figures, by step.

    `variant`: what else tells them from another series of the same run and tier (`dtype=bfloat16`, a sweep's name).
    `label`: the shortest name that tells it from the other series of the comparison.
    """

    run: str
    tier: str
    variant: str
    jobs: tuple[Job, ...]
    label: str = ""
    estimate: Estimate | None = None

    @property
    def steps(self) -> list[int]:
        """Ascending; a step that was measured twice is there twice."""
        return [job.step for job in self.jobs if job.step is not None]

    def values(self, metric: str) -> list[float | None]:
        """The figure at each of `steps`."""
        return [job.metric(metric) for job in self.jobs]


def make_series(jobs: Sequence[Job]) -> tuple[Series, ...]:
    """The series of `jobs`, in the order in which their first jobs stand."""
    usable = [job for job in jobs if job.status == "ok" and job.step is not None and _FIGURES & set(job.metrics)]
    made = []
    for (_, tier), group in _grouped(usable, lambda job: (job.run_path, job.tier or "")).items():
        named = list(zip(variants(group), group, strict=True))
        for variant, members in _grouped(named, lambda pair: pair[0]).items():
            for sweep, rows in _by_sweep([job for _, job in members]).items():
                full = ", ".join(part for part in (variant, sweep) if part)
                made.append(_one(rows[0].run, tier, full, rows))
    return tuple(replace(one, label=label) for one, label in zip(made, _labels(made), strict=True))


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


def _one(run: str, tier: str, variant: str, jobs: list[Job]) -> Series:
    ordered = tuple(sorted(jobs, key=lambda job: job.step or 0))
    made = Series(run=run, tier=tier, variant=variant, jobs=ordered)
    # Progress and readiness exist where there are verdicts, and so do the thresholds that the estimate is about.
    judged = any(job.verdict for job in ordered)
    rates = [learning_rate(job) for job in ordered] if judged else []
    return replace(made, estimate=estimate(made.steps, made.values("mse"), rates)) if judged else made


def _by_sweep(jobs: list[Job]) -> dict[str, list[Job]]:
    """The jobs apart by sweep where several sweeps measured the same step, else together under ``."""
    sweeps = {job.sweep for job in jobs}
    repeated = Counter(job.step for job in jobs).most_common(1)[0][1] > 1
    return _grouped(jobs, lambda job: job.sweep.resolve().name) if len(sweeps) > 1 and repeated else {"": jobs}


def _grouped(items: Sequence[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
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
