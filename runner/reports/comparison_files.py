"""What a comparison leaves: the page, a table, everything as JSON, and the main plot as pictures."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from runner.comparison.comparison import Comparison
from runner.comparison.export import to_csv, to_dict
from runner.reports.page.build import page
from runner.reports.picture import pictures
from runner.results import write_whole

PAGE_NAME = "comparison.html"


@dataclass(frozen=True, kw_only=True)
class Written:
    """`files`: those that were written, by kind (html, csv, json, png, svg); `problem`: why not all, in one line."""

    files: dict[str, Path]
    problem: str | None = None


def write_files(comparison: Comparison, directory: Path) -> Written:
    """Write `comparison.*` into `directory`, each file whole or not at all; the first that fails ends it.

    Nothing that a job left is touched.
    """
    drawn = pictures(comparison)
    contents: dict[str, Callable[[], bytes]] = {
        "json": lambda: (
            json.dumps(to_dict(comparison), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        ).encode(),
        "csv": lambda: to_csv(comparison).encode(),
        **{kind: lambda kind=kind: drawn[kind] for kind in drawn},  # type: ignore[misc]
        "html": lambda: page(comparison, directory, picture=bool(drawn)).encode(),
    }
    files: dict[str, Path] = {}
    for kind, content in contents.items():
        path = directory / f"comparison.{kind}"
        try:
            write_whole(path, content())
        except OSError as error:
            return Written(files=files, problem=f"{path}: cannot be written: {error.strerror or error}")
        files[kind] = path
    return Written(files=files)
