"""Which config keys differ between the jobs of a sweep."""

import json
from collections.abc import Sequence
from typing import Any

from runner.comparison.jobs import Job

# What a job is called and where it writes, not how it measures.
_NAMING = ("ckpt", "step", "output", "cache", "verbose", "task")
_NAMING_GROUPS = ("tracker.", "tier.", "merge.output", "convert.output")


def varying(jobs: Sequence[Job]) -> dict[str, tuple[Any, ...]]:
    """Key → its value in each of `jobs`, for the config keys whose values differ between jobs that have a config."""
    known = [job.config for job in jobs if job.config]
    keys = dict.fromkeys(key for config in known for key in config)
    return {
        key: tuple(job.config.get(key) for job in jobs)
        for key in keys
        if len({_comparable(config.get(key)) for config in known}) > 1
    }


def variants(jobs: Sequence[Job]) -> list[str]:
    """What tells each of `jobs` (of one run and tier) from the others beside the step: `dtype=bfloat16`, or ``."""
    keys = [key for key in varying(jobs) if key not in _NAMING and not key.startswith(_NAMING_GROUPS)]
    return [", ".join(f"{key}={spelled(job.config.get(key))}" for key in keys) for job in jobs]


def spelled(value: Any) -> str:
    """A config value as it is written on the command line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _comparable(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
