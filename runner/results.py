"""The result contract: what a run leaves in `result.json`, whatever its task.

Only what the task has is written; a field that is None or empty is left out, but for `verdict`, which is null where
a verdict was not given. Floats have full precision; a number that is not finite is null, and a finding says so.

    task, status        what ran; "ok" or "error"
    error               {type, message}; only with status error, and then beside task, status and ckpt alone
    ckpt, base, reference   what was measured, what it runs on, what it was compared with (paths or hub names)
    step                the step that the checkpoint's own state reports
    family, format, tier
    metrics             mse, cosine, kl, kl_reverse, top1, top5, …: over data.prompts; metrics.text: over text data
    per_prompt          [{prompt, tokens, mse, cosine, kl, top1, …}]
    layers              [{layer, modulation, np_rank, num_ranks, parameters}], with mse, cosine, kl in the full tier
    progressive         [{layers, mse, cosine, kl}]: the lowest n NPT layers active
    generation          [{prompt, …}]: continuations; of diagnose beside the reference's (temperature, tokens,
                        reference_tokens, agreement, first_divergence, repetition), of generate as its page says
    checks              [{name, status, score, details, recommendation, seconds, peak_bytes}]
    overall             READY, PARTIALLY_READY, NOT_READY
    verdict             {status, cosine_status, progress, remaining, readiness, reason, recommendation}
    findings            [text]: what the reader should know before trusting a number
    timing, versions    seconds by phase; versions of the libraries that computed this

Other fields belong to one task and stand in that task's page (`details` here, top level in the file).
"""

import math
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, TypeAlias, TypeGuard

import runner
from runner.errors import RunnerError

FILE_NAME = "result.json"
JsonObject: TypeAlias = dict[str, Any]
_PACKAGES = ("torch", "transformers", "safetensors", "peft", "hydra-core", "omegaconf", "wandb")


@dataclass(kw_only=True)
class Result:
    """What one run found. `to_dict()` is the JSON of the contract above."""

    task: str
    status: str = "ok"
    error: dict[str, str] | None = None
    ckpt: str | None = None
    base: str | None = None
    reference: str | None = None
    step: int | None = None
    family: str | None = None
    format: str | None = None
    tier: str | None = None
    metrics: JsonObject = field(default_factory=dict)
    per_prompt: list[JsonObject] = field(default_factory=list)
    layers: list[JsonObject] = field(default_factory=list)
    progressive: list[JsonObject] = field(default_factory=list)
    generation: list[JsonObject] = field(default_factory=list)
    checks: list[JsonObject] = field(default_factory=list)
    overall: str | None = None
    verdict: JsonObject | None = None
    findings: list[str] = field(default_factory=list)
    timing: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    details: JsonObject = field(default_factory=dict)
    exit_code: int = 0  # of the process, not in the file: 1 where a task whose purpose it is found a failure

    @classmethod
    def failed(cls, task: str, error: RunnerError, ckpt: str | None = None) -> "Result":
        """The result of a job that ended in `error`."""
        return cls(task=task, status="error", ckpt=ckpt, error={"type": type(error).__name__, "message": str(error)})

    def to_dict(self) -> JsonObject:
        """The contract as plain JSON values."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("details", "exit_code")}
        kept = {name: value for name, value in values.items() if value not in (None, {}, [])}
        if self.status == "ok" and self.task == "diagnose":
            kept.setdefault("verdict", None)
        return finite({**kept, **self.details})


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a finite number: True and False are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf


def finite(value: Any) -> Any:
    """`value` as JSON holds it: lists for tuples, and None for every float that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def versions() -> dict[str, str]:
    """Installed versions by package name, as their metadata say it: nothing is imported."""
    found = {"runner": runner.__version__, "python": platform.python_version()}
    installed = _installed()
    for package in _PACKAGES:
        if (known := installed.get(package.replace("-", "_"))) is not None:
            found[package] = known
    return found


@cache
def _installed() -> dict[str, str]:
    """Version by package from the names of the directories of metadata, the first on sys.path; faster than reading."""
    found: dict[str, str] = {}
    for place in filter(os.path.isdir, sys.path):
        for name in os.listdir(place):  # noqa: PTH208 - thousands of names
            package, _, rest = name.partition("-")
            if rest.endswith(".dist-info"):
                found.setdefault(package.lower(), rest.removesuffix(".dist-info"))
    return found
