"""`tracker=none`: figures go nowhere but to the run's own files."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from runner.tracking.base import RunIdentity, SavedView
from runner.tracking.rows import Record


@dataclass(kw_only=True)
class NullTracker:
    """A tracker that keeps nothing, so that no task has to ask whether there is one."""

    warnings: list[str] = field(default_factory=list, init=False)

    @property
    def location(self) -> str | None:
        """Nowhere."""
        return None

    def start(self, identity: RunIdentity, config: Mapping[str, Any]) -> None:
        """Begin nothing."""

    def log(self, row: Mapping[str, float]) -> None:
        """Log nothing."""

    def record(self, result: Mapping[str, Any], record: Record | None = None) -> None:
        """Log nothing."""

    def save_workspace(self, build: Callable[[str, str], Any]) -> SavedView | None:
        """Save nothing."""
        return None

    def finish(self, exit_code: int) -> None:
        """End nothing."""
