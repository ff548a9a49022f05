"""One job of a sweep as a row: what its folder holds, checked, whatever state the job ended in."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from runner.checkpoints.runs import step_in_name
from runner.errors import printable
from runner.files.atomic import read_json
from runner.results import FILE_NAME

# libyaml's reader where it is there: ten times as fast, which a sweep of hundreds of jobs feels.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_LOGS = ("runner.log",)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one job left. `status`: ok, failed (it says why), lost (started, no result) or never_started.

    The fields after `config` are those of the result contract (runner/results.py), empty where the job has none;
    every number in them is finite or None. `run` is a display name, unique for each run directory in a comparison;
    `passed`: the verdict of tests.
    `config`: the composed config, flat ("tier.name": "quick"). `seconds`: the sum of the phases.
    """

    name: str
    sweep: Path
    status: str
    error: Mapping[str, str] | None = None
    log: Path | None = None
    overrides: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    task: str | None = None
    ckpt: str | None = None
    step: int | None = None
    run: str = ""
    run_path: str = ""
    tier: str | None = None
    family: str | None = None
    format: str | None = None
    reference: str | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    per_prompt: tuple[Mapping[str, Any], ...] = ()
    layers: tuple[Mapping[str, Any], ...] = ()
    progressive: tuple[Mapping[str, Any], ...] = ()
    checks: tuple[Mapping[str, Any], ...] = ()
    findings: tuple[str, ...] = ()
    verdict: Mapping[str, Any] | None = None
    overall: str | None = None
    passed: bool | None = None
    seconds: float | None = None

    def metric(self, name: str) -> float | None:
        """A figure of `metrics`, or None where it is missing or not a finite number."""
        value = self.metrics.get(name)
        return value if is_number(value) else None


def read_job(sweep: Path, name: str, overrides: tuple[str, ...] = (), reason: str | None = None) -> Job:
    """The job that `sweep` keeps in its folder `name`. Never raises for what the folder holds or lacks.

    `reason`: why the launcher says that there is no result.
    """
    directory = sweep / name
    if not directory.is_dir():
        return _without_result(sweep, name, "never_started", reason or "planned, but never started", overrides, {})
    config = _config(directory)
    try:
        result = read_json(directory / FILE_NAME)
    except FileNotFoundError:
        return _without_result(sweep, name, "lost", reason or "started, but left no result", overrides, config)
    except (OSError, ValueError) as error:
        return _without_result(sweep, name, "lost", f"its {FILE_NAME} cannot be read: {error}", overrides, config)
    if not isinstance(result, dict):
        return _without_result(sweep, name, "lost", f"its {FILE_NAME} is no object", overrides, config)
    return _with_result(sweep, name, finite(result), overrides, config)


def _without_result(
    sweep: Path, name: str, status: str, why: str, overrides: tuple[str, ...], config: dict[str, Any]
) -> Job:
    given = {**dict(o.split("=", 1) for o in overrides if "=" in o), **config}
    return _with_result(
        sweep, name, {"status": status, "error": {"type": status, "message": why}, "ckpt": given.get("ckpt")},
        overrides, given,
    )  # fmt: skip


def _with_result(
    sweep: Path, name: str, result: dict[str, Any], overrides: tuple[str, ...], config: dict[str, Any]
) -> Job:
    status = str(result.get("status"))
    ckpt = _text(result.get("ckpt"))
    step = _step(result.get("step"))
    own_step = step_in_name(Path(ckpt).name) if ckpt else None
    if step is None:
        step = own_step if own_step is not None else _step(config.get("step"))
    # A checkpoint with a step belongs to the run around it; a job that failed may name the run itself.
    in_run = ckpt is not None and step is not None and (status == "ok" or own_step is not None)
    run_path = str(Path(ckpt).parent if in_run else Path(ckpt)) if ckpt else ""
    error = _mapping(result.get("error"))
    timing = [value for value in _mapping(result.get("timing")).values() if isinstance(value, (int, float))]
    return Job(
        name=name,
        sweep=sweep,
        status={"ok": "ok", "lost": "lost", "never_started": "never_started"}.get(status, "failed"),
        error={"type": printable(error.get("type", "error")), "message": printable(error.get("message", "no reason"))}
        if status != "ok"
        else None,
        log=next((path for log in _LOGS if (path := sweep / name / log).is_file()), None),
        overrides=overrides,
        config=config,
        task=_text(result.get("task")) or _text(config.get("task")),
        ckpt=ckpt,
        step=step,
        run=Path(run_path).name,
        run_path=run_path,
        tier=_text(result.get("tier")) or _text(config.get("tier.name")) or _text(config.get("tier")),
        family=_text(result.get("family")),
        format=_text(result.get("format")),
        reference=_text(result.get("reference")),
        metrics=_mapping(result.get("metrics")),
        per_prompt=_rows(result.get("per_prompt")),
        layers=_rows(result.get("layers")),
        progressive=_rows(result.get("progressive")),
        checks=_rows(result.get("checks")),
        passed=result.get("passed") if isinstance(result.get("passed"), bool) else None,
        findings=tuple(map(printable, _list(result.get("findings")))),
        verdict=_mapping(result.get("verdict")) or None,
        overall=_text(result.get("overall")),
        seconds=sum(timing) if timing else None,
    )


def _config(directory: Path) -> dict[str, Any]:
    """The job's composed config, flat; {} where there is none."""
    try:
        text = (directory / ".hydra" / "config.yaml").read_text(encoding="utf-8")
        return flat(_mapping(yaml.load(text, Loader=_LOADER)))
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def flat(config: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """A nested config with dotted keys; lists stay as they are."""
    rows: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            rows |= flat(value, f"{prefix}{key}.")
        else:
            rows[f"{prefix}{key}"] = value
    return rows


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is a number: JSON's true is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def finite(value: Any) -> Any:
    """`value` with every number that is not finite as None: a file written by hand may hold NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list) else value


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _rows(value: Any) -> tuple[Mapping[str, Any], ...]:
    return tuple(row for row in _list(value) if isinstance(row, dict))


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _step(value: Any) -> int | None:
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
