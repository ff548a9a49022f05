"""Which config keys differ between the jobs of a sweep."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from runner.comparison.jobs import Job

# What a job is called and where it writes, not how it measures.
_NAMING = ("ckpt", "step", "output", "cache", "verbose", "task")
_NAMING_GROUPS = ("tracker.", "tier.", "merge.output", "convert.output")


def varying(jobs: Sequence[Job]) -> dict[str, tuple[Any, ...]]:
    """Key → its value in each of `jobs`, for the config keys whose values differ between jobs that have a config.

    What follows from the choice of a group (tier.measures from tier.name) is left out.
    """
    known = [job.config for job in jobs if job.config]
    keys = dict.fromkeys(key for config in known for key in config)
    values = {key: [_comparable(config.get(key)) for config in known] for key in keys}
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


def spelled(value: Any) -> str:
    """A config value as it is written on the command line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _comparable(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
