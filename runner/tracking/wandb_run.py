"""What is done to one open run of wandb: how it is made, and how a result is written into it.

The module `wandb` is an argument: importing it takes more than a second and is done by the session.
"""

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from runner.tracking.base import RunIdentity, SavedView
from runner.tracking.rows import AXES, Chart, Record

# Seconds between two writes of the run's file; a row that is not yet written is lost when the process is killed.
FLUSH_SECONDS = 0.02
_LONGEST_FLUSH_SECONDS = 2.0


def claim_id(folder: Path, wanted: str) -> str:
    """`wanted`, or `wanted-2`, `wanted-3`, … where it was logged before: each id is given out once in `folder`.

    Raises OSError where the folder cannot be written.
    """
    attempt = 1
    while True:
        candidate = wanted if attempt == 1 else f"{wanted}-{attempt}"
        try:
            (folder / "ids" / candidate).mkdir(parents=True)
            return candidate
        except FileExistsError:
            if not (folder / "ids").is_dir():
                raise
            attempt += 1


def has_credential(wandb: ModuleType) -> bool:
    """Whether a key or token is there: no question is asked and no server is."""
    return bool(wandb.login(prompt=False, verify=False))


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What a run is called, where it is kept (`folder`, whose last part is `wandb`), and how long W&B may take."""

    project: str
    entity: str | None
    name: str
    group: str | None
    job_type: str
    tags: tuple[str, ...]
    identifier: str
    folder: Path
    config: Mapping[str, Any]
    init_timeout: float
    finish_timeout: float


def open_run(wandb: ModuleType, plan: RunPlan, mode: str) -> Any:
    """A new run, "online" or "offline", with its axes defined. Raises what wandb raises."""
    settings = wandb.Settings(  # a new object each time: wandb changes the one that it is given
        console="off",
        silent=True,
        disable_git=True,
        disable_code=True,
        x_disable_stats=True,
        x_disable_meta=True,
        x_disable_machine_info=True,
        init_timeout=plan.init_timeout,
        finish_timeout=plan.finish_timeout,
        finish_timeout_raises=True,
        x_transaction_log_flush_interval=FLUSH_SECONDS,
        use_dot_wandb=False,
    )
    run = wandb.init(
        project=plan.project,
        entity=plan.entity,
        group=plan.group,
        job_type=plan.job_type,
        name=plan.name,
        tags=plan.tags,
        id=plan.identifier,
        dir=str(plan.folder.parent),
        mode=mode,
        config=dict(plan.config),
        reinit="finish_previous",
        settings=settings,
    )
    for pattern, axis in AXES.items():
        run.define_metric(axis, hidden=True)
        run.define_metric(pattern, step_metric=axis)
    return run


def log_figures(run: Any, record: Record) -> None:
    """The rows and the summary, and the keys that the config gains."""
    for pattern, axis in record.axes.items():
        run.define_metric(axis, hidden=True)
        run.define_metric(pattern, step_metric=axis)
    run.config.update(dict(record.config), allow_val_change=True)
    for row in record.rows:
        run.log(dict(row))
    run.summary.update(dict(record.summary))


def log_tables(wandb: ModuleType, run: Any, record: Record) -> None:
    """The tables and charts, in one row."""
    made = {
        name: wandb.Table(columns=table.columns, data=table.rows, allow_mixed_types=True)
        for name, table in record.tables.items()
    }
    made |= {name: _line_series(wandb, chart) for name, chart in record.charts.items()}
    if made:
        run.log(made)


def _line_series(wandb: ModuleType, chart: Chart) -> Any:
    xs, ys = ([[point[i] for point in points] for points in chart.lines.values()] for i in (0, 1))
    return wandb.plot.line_series(xs=xs, ys=ys, keys=list(chart.lines), title=chart.title, xname=chart.x)


def log_checkpoint(wandb: ModuleType, run: Any, ckpt: object, identity: RunIdentity, step: int | None) -> None:
    """The checkpoint as an artifact that only refers to its files: nothing is read, copied or uploaded."""
    path = Path(str(ckpt))
    if ckpt is None or not path.exists():
        return
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", identity.run_name)[:100]
    artifact = wandb.Artifact(f"checkpoint-{name}", type="checkpoint", metadata={"ckpt_step": step})
    artifact.add_reference(path.absolute().as_uri(), checksum=False)
    run.log_artifact(artifact, aliases=["latest", *([f"step-{step}"] if step is not None else [])])


def save_view(wandb: ModuleType, build: Callable[[str, str], Any], entity: str | None, project: str) -> SavedView:
    """Save the workspace that `build` makes; where no entity is given it is that of WANDB_ENTITY, or the user's own."""
    own = entity or wandb.setup().settings.entity or wandb.Api().default_entity
    made = build(str(own), project)
    made.save()
    return SavedView(url=made.url, id=made._internal_id, name=made._internal_name)


def written_bytes(run: Any) -> int:
    """The size of the run's file, now. Raises OSError where it is gone."""
    return Path(run.settings.sync_file).stat().st_size


def wait_for_flush(run: Any, before: int) -> None:
    """Return once the run's file has grown beyond `before` bytes and is then left alone for three intervals.

    Raises OSError where it does not grow in two seconds: wandb says nothing when the disk is full.
    """
    deadline = time.monotonic() + _LONGEST_FLUSH_SECONDS
    size, quiet = -1, 0
    while (quiet < 3 or size <= before) and time.monotonic() < deadline:
        time.sleep(FLUSH_SECONDS)
        now = written_bytes(run)
        size, quiet = now, quiet + 1 if now == size else 0
    if size <= before:
        raise OSError("its file does not grow: is the disk full?")
