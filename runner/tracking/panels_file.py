"""`panels.json`: a workspace of comparison panels on this machine's disk, and where it is saved in W&B.

entity, project, name   of the workspace; entity and project are empty as long as it was never saved
spec                    its sections and panels, as W&B stores them
view                    {url, id, name}, once it is saved
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from runner.comparison.comparison import Comparison
from runner.results import read_json, write_json
from runner.tracking.base import Tracker
from runner.tracking.panels import as_json, workspace

FILE_NAME = "panels.json"


def keep(comparison: Comparison, tracker: Tracker, path: Path) -> dict[str, Any]:
    """Write the workspace to `path`, and save it where `tracker` is online: a new one, or the one saved from there
    before. Returns what the file holds. Raises OSError.
    """
    view = _earlier(path)
    kept = {**as_json(workspace(comparison, entity="", project="")), **view}
    write_json(path, kept)
    built: list[Any] = []

    def build(entity: str, project: str) -> Any:
        made = workspace(comparison, entity=entity, project=project)
        if (view.get("entity"), view.get("project")) == (entity, project):
            made._internal_id, made._internal_name = view["view"]["id"], view["view"]["name"]
        built.append(made)
        return made

    saved = tracker.save_workspace(build)
    if saved is not None:
        kept = {**as_json(built[0]), "view": asdict(saved)}
        write_json(path, kept)
    return kept


def _earlier(path: Path) -> dict[str, Any]:
    """Where the workspace of the file at `path` is saved: its entity, project and view; {} where it is not."""
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return {}
    view = content.get("view") if isinstance(content, dict) else None
    if not isinstance(view, dict) or not all(isinstance(view.get(key), str) for key in ("url", "id", "name")):
        return {}
    return {"entity": content.get("entity"), "project": content.get("project"), "view": view}
