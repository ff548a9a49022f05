"""One job of a sweep as a row: what its folder holds, checked, whatever state the job ended in."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import yaml

from runner.checkpoints.runs import step_in_name
from runner.errors import printable
from runner.files.atomic import read_json
from runner.results import FILE_NAME, JsonObject, finite, is_number

# libyaml's reader where it is there: ten times as fast, which a sweep of hundreds of jobs feels.
_LOADER: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_LOG = "runner.log"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one job left. `status`: ok, failed (it says why), lost (started, no result) or never_started.

    The fields after `config` are those of the result contract (runner/results.py), empty where the job has none; every
    number in them is finite or None. `config`: the composed config, flat ("tier.name": "quick"). `run`: a display name,
    unique for each run directory in a comparison; `passed`: the verdict of tests, or of task=verify; `seconds`: the
    sum of the phases. `damaged`: the checkpoint failed an integrity check, of this job or of another one.
    """

    name: str
    sweep: Path
    status: str
    error: Mapping[str, str] | None = None
    log: Path | None = None
    overrides: tuple[str, ...] = ()
    config: JsonObject = field(default_factory=dict)
    task: str | None = None
    ckpt: str | None = None
    base: str | None = None
    step: int | None = None
    run: str = ""
    run_path: str = ""
    tier: str | None = None
    family: str | None = None
    format: str | None = None
    reference: str | None = None
    metrics: JsonObject = field(default_factory=dict)
    per_prompt: tuple[JsonObject, ...] = ()
    layers: tuple[JsonObject, ...] = ()
    progressive: tuple[JsonObject, ...] = ()
    generation: tuple[JsonObject, ...] = ()
    checks: tuple[JsonObject, ...] = ()
    findings: tuple[str, ...] = ()
    confusion: tuple[list[int], ...] = ()
    labels: tuple[str, ...] = ()
    verdict: JsonObject | None = None
    overall: str | None = None
    passed: bool | None = None
    damaged: bool = False
    seconds: float | None = None

    @property
    def checkpoint(self) -> str:
        """The last part of the checkpoint's path, or the job's name."""
        return Path(self.ckpt).name if self.ckpt else self.name

    @property
    def failed_checks(self) -> list[str]:
        """The names of the checks that failed."""
        return [str(row.get("name")) for row in self.checks if row.get("status") == "fail"]

    @property
    def failed_integrity(self) -> list[str]:
        """The names of the failed checks that are about more than quality: all but those of task=test that say so."""
        failed = [row for row in self.checks if row.get("status") == "fail"]
        return [str(row.get("name")) for row in failed if row.get("integrity", True)]

    @property
    def outcome(self) -> str:
        """`status`, or for a job that ended well and whose checks did not, `failed checks`."""
        unsound = self.status == "ok" and (self.passed is False or self.failed_checks)
        return "failed checks" if unsound else self.status

    @property
    def made_of(self) -> str:
        """What the checkpoints of one training have in common: family, base, and its layers with kinds and ranks."""
        names = ("layer", "modulation", "np_rank", "num_ranks")
        layers = [[row.get(name) for name in names] for row in self.layers]
        return json.dumps([self.family, self.base, layers], default=str)

    @property
    def message(self) -> str:
        """Why there is no result; `` where there is one."""
        return (self.error or {}).get("message", "")

    @cached_property
    def layer_mses(self) -> dict[int | str, float]:
        """Layer → its isolated mse, for the layers that have one."""
        rows = [row for row in self.layers if is_number(row.get("mse"))]
        return {row["layer"]: row["mse"] for row in rows if isinstance(row.get("layer"), (int, str))}

    @cached_property
    def prompt_mses(self) -> dict[str, float]:
        """Prompt → its mse, for the prompts that have one."""
        return {str(row.get("prompt")): row["mse"] for row in self.per_prompt if is_number(row.get("mse"))}

    def metric(self, name: str) -> float | None:
        """A figure of `metrics`, or None where it is missing or not a finite number."""
        value = self.metrics.get(name)
        return value if is_number(value) else None

    def judged(self, name: str) -> object:
        """A field of the verdict, or None."""
        return (self.verdict or {}).get(name)


def read_job(sweep: Path, name: str, overrides: tuple[str, ...] = (), reason: str | None = None) -> Job:
    """The job that `sweep` keeps in its folder `name`. Never raises for what the folder holds or lacks.

    `reason`: why the launcher says that there is no result.
    """
    directory = sweep / name
    config: JsonObject = {}
    result: object = None
    if not directory.is_dir():
        status, why = "never_started", reason or "planned, but never started"
    else:
        config, status = _config(directory), "lost"
        try:
            result = read_json(directory / FILE_NAME)
            why = f"its {FILE_NAME} is no object"
        except FileNotFoundError:
            why = reason or "started, but left no result"
        except (OSError, ValueError) as error:
            why = f"its {FILE_NAME} cannot be read: {error}"
    if not isinstance(result, dict):
        config = {**dict(o.split("=", 1) for o in overrides if "=" in o), **config}
        result = {"status": status, "error": {"type": status, "message": why}, "ckpt": config.get("ckpt")}
    return _job(sweep, name, _object(finite(result)), overrides, config)


def _job(sweep: Path, name: str, result: JsonObject, overrides: tuple[str, ...], config: JsonObject) -> Job:
    status = str(result.get("status"))
    ckpt = _text(result.get("ckpt"))
    step = _step(result.get("step"))
    own_step = step_in_name(Path(ckpt).name) if ckpt else None
    if step is None:
        step = own_step if own_step is not None else _step(config.get("step"))
    # A checkpoint with a step belongs to the run around it; a job that failed may name the run itself.
    in_run = ckpt is not None and step is not None and (status == "ok" or own_step is not None)
    run_path = str(Path(ckpt).parent if in_run else Path(ckpt)) if ckpt else ""
    error = _object(result.get("error"))
    said = {"type": printable(error.get("type", "error")), "message": printable(error.get("message", "no reason"))}
    timing = [value for value in _object(result.get("timing")).values() if isinstance(value, (int, float))]
    log = sweep / name / _LOG
    texts: JsonObject = {key: _text(result.get(key)) for key in ("family", "format", "base", "reference", "overall")}
    rows: JsonObject = {
        key: tuple(row for row in as_list(result.get(key)) if isinstance(row, dict))
        for key in ("per_prompt", "layers", "progressive", "generation", "checks")
    }
    return Job(
        name=name,
        sweep=sweep,
        status=status if status in ("ok", "lost", "never_started") else "failed",
        error=None if status == "ok" else said,
        log=log if log.is_file() else None,
        overrides=overrides,
        config=config,
        task=_text(result.get("task")) or _text(config.get("task")),
        ckpt=ckpt,
        step=step,
        run=Path(run_path).name,
        run_path=run_path,
        tier=_text(result.get("tier")) or _text(config.get("tier.name")) or _text(config.get("tier")),
        metrics=_object(result.get("metrics")),
        passed=next((value for value in map(result.get, ("passed", "verified")) if isinstance(value, bool)), None),
        findings=tuple(map(printable, as_list(result.get("findings")))),
        **_confusion(result),
        verdict=_object(result.get("verdict")) or None,
        seconds=sum(timing) if timing else None,
        **texts,
        **rows,
    )


def _config(directory: Path) -> JsonObject:
    """The job's composed config, flat; {} where there is none."""
    try:
        text = (directory / ".hydra" / "config.yaml").read_text(encoding="utf-8")
        return flat(_object(yaml.load(text, Loader=_LOADER)))
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def flat(config: JsonObject, prefix: str = "") -> JsonObject:
    """A nested config with dotted keys; lists stay as they are."""
    rows: JsonObject = {}
    for key, value in config.items():
        rows |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return rows


def as_list(value: object) -> list[object]:
    """`value` where it is a list, else []."""
    return value if isinstance(value, list) else []


def _object(value: object) -> JsonObject:
    return value if isinstance(value, dict) else {}


def _confusion(result: JsonObject) -> JsonObject:
    """The matrix and its classes, where both are as they should be."""
    labels, matrix = as_list(result.get("labels")), as_list(result.get("confusion"))
    sound = len(matrix) == len(labels) and all(isinstance(label, str) for label in labels)
    for row in map(as_list, matrix):
        sound = sound and len(row) == len(labels) and all(type(count) is int and count >= 0 for count in row)
    return {"confusion": tuple(matrix), "labels": tuple(labels)} if sound else {}


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _step(value: object) -> int | None:
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
