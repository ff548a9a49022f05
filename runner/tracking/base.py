"""What every tracker can do, and what names a run. Nothing heavy is imported here."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.results import JsonObject

if TYPE_CHECKING:
    from runner.tracking.rows import Record

# A group that was chosen but says nothing about the checkpoint.
_UNDECIDED = "auto"


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """What was done to which step of which run.

    `run_name`: the training run that the checkpoint belongs to ("run7"); `step`: the checkpoint's training step;
    `series`: the sweep that this run is a point of; family, format, tier: as chosen, None or "auto" while unknown.
    """

    task: str
    run_name: str
    step: int | None = None
    series: str | None = None
    family: str | None = None
    format: str | None = None
    tier: str | None = None

    @property
    def name(self) -> str:
        """The name that people read: `<task>/<run>@<step>`."""
        return f"{self.task}/{self.run_name}" + (f"@{self.step}" if self.step is not None else "")

    @property
    def tags(self) -> tuple[str, ...]:
        """Family, format and tier, as far as they are known."""
        return tuple(tag for tag in (self.family, self.format, self.tier) if tag and tag != _UNDECIDED)


def run_id(identity: RunIdentity, config: JsonObject) -> str:
    """The same id for the same task, step and resolved `config`: letters, digits, `-` and `_`, at most 50 characters.

    W&B refuses ids with any of `: ; , # ? /` or quotes. Where an id was logged before, the tracker adds `-2`, `-3`, ….
    """
    canonical = json.dumps(config, sort_keys=True, ensure_ascii=True, default=str)
    digest = hashlib.sha256(canonical.encode()).hexdigest()[:12]
    task = re.sub(r"[^A-Za-z0-9_]+", "_", identity.task)[:20]
    return "-".join([task, *([str(identity.step)] if identity.step is not None else []), digest])


def flat_config(identity: RunIdentity, config: JsonObject) -> JsonObject:
    """`config` with the keys that runs are grouped and filtered by at its top level.

    Nested keys are addressed inconsistently in a W&B Workspace, so `family` and `format` are words here; the groups
    of these names keep their options as `family_options` and `format_options`.
    """
    flat = {
        "ckpt_step": identity.step,
        "family": identity.family,
        "format": identity.format,
        "task": identity.task,
        "series": identity.series,
    }
    options = {f"{key}_options": config[key] for key in flat if isinstance(config.get(key), Mapping)}
    return {**config, **options, **flat}


@dataclass(frozen=True, kw_only=True)
class SavedView:
    """A workspace on the server: its address, and its content as `runner.tracking.panels.as_json` gives it."""

    url: str
    content: JsonObject


# From (entity, project) to a workspace of `wandb-workspaces` and its content; called in another process, so picklable.
WorkspaceBuilder = Callable[[str, str], tuple[Any, JsonObject]]


@dataclass(kw_only=True)
class Tracker:
    """Where the figures of a run go beside its own files. This one, `tracker=none`, keeps nothing.

    No method raises because a service is out of reach: that is one line in `warnings`. `location`: one line for the
    console, where the run went and how to see it; None where it went nowhere.
    """

    warnings: list[str] = field(default_factory=list, init=False)
    location: str | None = field(default=None, init=False)

    def start(self, identity: RunIdentity, config: JsonObject) -> None:
        """Begin a run; `config` is the resolved config as plain values."""

    def log(self, row: Mapping[str, float]) -> None:
        """Log one live row, as {"train/step": 10, "train/loss": 0.3}. Without a started run: nothing happens."""

    def record(self, result: JsonObject, record: "Record | None" = None) -> None:
        """Log a finished result, the dict of `runner.results`; `record` in the place of what is made of it.

        Without a started run nothing happens.
        """

    def save_workspace(self, build: WorkspaceBuilder) -> SavedView | None:
        """Save the workspace that `build` makes (runner/tracking/panels.py) where runs go online.

        None where they do not. Needs no started run.
        """
        return None

    def finish(self, exit_code: int) -> None:
        """End the run; `exit_code` is that of the job."""

    def leave(
        self, identity: RunIdentity, config: JsonObject, result: JsonObject, exit_code: int, log: Path
    ) -> Callable[[], None]:
        """What records a run from its start to its end, to be called once its figures are printed.

        It may go on after that returns: then nothing is lost whatever ends this process; `log` says what went wrong.
        """

        def whole() -> None:
            self.start(identity, config)
            self.record(result)
            self.finish(exit_code)

        return whole
