"""Runs as wandb's own reader sees them: `wandb-core leet inspect`, the binary in wandb's package."""

import importlib.util
import json
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Run:
    """One run, read back from its file."""

    file: Path
    header: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    axes: dict[str, str | None] = field(default_factory=dict)
    artifacts: list[dict[str, Any]] = field(default_factory=list)
    exit_code: int | None = None

    def table(self, name: str) -> dict[str, Any]:
        """The table that was logged as `name`, as wandb staged it."""
        wanted = f"{name}.table.json"
        (staged,) = [
            entry["local_path"]
            for artifact in self.artifacts
            for entry in artifact["manifest"]["contents"]
            if entry["path"] == wanted
        ]
        return json.loads(Path(staged).read_text())

    def rows(self, *keys: str) -> list[tuple[Any, ...]]:
        """The values of `keys` in each history row that has the first of them."""
        return [tuple(row.get(key) for key in keys) for row in self.history if keys[0] in row]


def run_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("run-*.wandb"))


def read_runs(folder: Path) -> list[Run]:
    """All runs under `folder`, in the order of their start."""
    return sorted((read_run(file) for file in run_files(folder)), key=lambda run: run.header["start_time"])


def read_run(file: Path) -> Run:
    specification = importlib.util.find_spec("wandb")
    assert specification is not None
    assert specification.origin is not None
    reader = Path(specification.origin).parent / "bin" / "wandb-core"
    command = [str(reader), "leet", "inspect", "--json", "--no-observability", "--run-file", str(file)]
    # The reader keeps its own settings in the home directory: not in that of the test.
    lines = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "HOME": str(file.parent)}
    ).stdout.splitlines()
    run = Run(file=file)
    for record in map(json.loads, lines):
        content = record.get(record["type"], {})
        match record["type"]:
            case "run":
                run.header = content
                run.config |= content["config"]["update"]
            case "config":
                run.config |= content.get("update", {})
            case "summary":
                run.summary |= content.get("update", {})
            case "history":
                run.history.append(content["item"])
            case "metric":
                run.axes[content.get("name") or content["glob_name"]] = content.get("step_metric")
            case "artifact":
                run.artifacts.append(content)
            case "exit":
                run.exit_code = content["exit_code"]
    return run
