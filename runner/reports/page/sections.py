"""The parts of the page beside the charts, as plain values for the template: failures, cards, tables."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from runner.comparison.comparison import Comparison
from runner.comparison.differences import spelled
from runner.comparison.insights import Answers, answers, leading
from runner.comparison.jobs import Job
from runner.comparison.points import checkpoint_name
from runner.results import FILE_NAME

QUESTIONS = (
    ("Is training working?", "working"),
    ("When is it ready?", "ready"),
    ("Which layer holds it back?", "layer"),
    ("Which checkpoint is best?", "best"),
)
LEVELS = {
    "excellent": "good", "good": "good", "fair": "warn", "moderate": "warn", "poor": "bad",
    "production": "good", "basic": "good", "continue": "warn", "early": "bad",
    "ok": "good", "failed": "bad", "lost": "bad", "never started": "bad",
    "READY": "good", "PARTIALLY_READY": "warn", "NOT_READY": "bad",
}  # fmt: skip
_VALUES_SHOWN = 12
_LONGEST_VALUE = 80


def cards(comparison: Comparison) -> list[dict[str, Any]]:
    """The four questions with their answers for each series, the closest one first."""
    if not comparison.series:
        return []
    first = leading(comparison)
    numbered = sorted(enumerate(comparison.series), key=lambda pair: pair[1] is not first)
    return [
        {"label": one.label if len(numbered) > 1 else "", "colour": number, "answers": _answers(answers(one))}
        for number, one in numbered
    ]


def _answers(said: Answers) -> list[dict[str, Any]]:
    return [{"question": question, "said": getattr(said, name)} for question, name in QUESTIONS]


def failures(comparison: Comparison, page: Path) -> list[dict[str, Any]]:
    """Jobs without a result, those with one message together, in the order of the first of each."""
    groups: dict[tuple[str, str], list[Job]] = {}
    for job in comparison.failures:
        groups.setdefault((_spoken(job.status), (job.error or {}).get("message", "")), []).append(job)
    return [
        {
            "status": status,
            "message": message,
            "jobs": [{"name": job.name, "log": _link(job.log, page) if job.log else None} for job in jobs],
        }
        for (status, message), jobs in groups.items()
    ]


def findings(comparison: Comparison) -> list[dict[str, str]]:
    """Each finding once, with the jobs that have it."""
    groups: dict[str, list[Job]] = {}
    for job in comparison.jobs:
        for text in dict.fromkeys(job.findings):
            groups.setdefault(text, []).append(job)
    return [{"text": text, "where": _where(jobs, comparison.jobs)} for text, jobs in groups.items()]


def _where(jobs: Sequence[Job], every: Sequence[Job]) -> str:
    if len(jobs) == len(every) and len(jobs) > 1:
        return "(all jobs)"
    names = ", ".join(job.name for job in jobs[:4])
    return f"({names}{f' and {len(jobs) - 4} more' if len(jobs) > 4 else ''})"


def table(comparison: Comparison, page: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The columns of the table of all jobs, and its rows: failures first, then as they ran."""
    columns = [column for column in _COLUMNS if column[0] in _ALWAYS or any(column[1](job) for job in comparison.jobs)]
    same = {name for name, read, _ in columns if name in _IF_DIFFERENT and len({read(j) for j in comparison.done}) < 2}
    columns = [column for column in columns if column[0] not in same]
    ordered = sorted(comparison.jobs, key=lambda job: job.status == "ok")
    rows = [
        {"cells": [_cell(read(job), form) for _, read, form in columns], "links": _links(job, page)} for job in ordered
    ]
    return [{"name": name, "number": form not in ("", "level")} for name, _, form in columns], rows


def _spoken(status: str) -> str:
    return status.replace("_", " ")


def _verdict(name: str) -> Any:
    return lambda job: (job.verdict or {}).get(name)


def _metric(name: str) -> Any:
    return lambda job: job.metric(name)


# Name, what is read from a job, and how it is written: "" text, "level" a status, else a format of numbers.
_COLUMNS: tuple[tuple[str, Any, str], ...] = (
    ("checkpoint", checkpoint_name, ""),
    ("run", lambda job: job.run, ""),
    ("status", lambda job: _spoken(job.status), "level"),
    ("task", lambda job: job.task, ""),
    ("tier", lambda job: job.tier, ""),
    ("step", lambda job: job.step, ",d"),
    ("mse", _metric("mse"), ".4g"),
    ("cosine", _metric("cosine"), ".4f"),
    ("KL", _metric("kl"), ".4g"),
    ("top-1", _metric("top1"), ".1%"),
    ("progress", _verdict("progress"), ".0f"),
    ("verdict", _verdict("status"), "level"),
    ("readiness", _verdict("readiness"), "level"),
    (
        "failed checks",
        lambda job: ", ".join(str(row.get("name")) for row in job.checks if row.get("status") == "fail"),
        "",
    ),
    ("overall", lambda job: job.overall, "level"),
    ("seconds", lambda job: job.seconds, ".1f"),
    ("job", lambda job: job.name, ""),
)
_ALWAYS = ("checkpoint", "job", "status")
_IF_DIFFERENT = ("run", "task", "tier")


def _cell(value: Any, form: str) -> dict[str, Any]:
    if value is None or value == "":
        return {"text": "–", "sort": None, "number": form not in ("", "level"), "level": ""}
    if form in ("", "level"):
        level = LEVELS.get(str(value), "unknown") if form == "level" else ""
        return {"text": str(value), "sort": None, "number": False, "level": level}
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return {"text": format(value, form) if number else str(value), "sort": value, "number": True, "level": ""}


def _links(job: Job, page: Path) -> list[dict[str, str]]:
    files = {"log": job.log, "result": job.sweep / job.name / FILE_NAME}
    return [{"text": text, "href": _link(file, page)} for text, file in files.items() if file and file.is_file()]


def _link(file: Path, page: Path) -> str:
    """Relative, so that the folder can be moved or sent; a colon in a name is no scheme after `./`."""
    relative = Path(os.path.relpath(file.absolute(), page.absolute())).as_posix()
    return quote(relative if relative.startswith(".") else f"./{relative}")


def differences(comparison: Comparison) -> list[dict[str, Any]]:
    """Each config key that differs, with its values and how many jobs have each."""
    rows = []
    for key, values in comparison.differences.items():
        counts: dict[str, int] = {}
        for value in values:
            counts[spelled(value)] = counts.get(spelled(value), 0) + 1
        shown = [{"text": _cut(text), "count": count if count > 1 else 0} for text, count in counts.items()]
        if len(shown) > _VALUES_SHOWN:
            more = {"text": f"… {len(shown)} values …", "count": 0}
            shown = [*shown[: _VALUES_SHOWN // 2], more, *shown[-_VALUES_SHOWN // 3 :]]
        rows.append({"key": key, "choices": shown})
    return rows


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 1]}…"
