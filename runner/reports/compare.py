"""What a comparison leaves: its files, the report of `task=compare`, and what a sweep prints when its jobs are done."""

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from runner.comparison.comparison import Comparison, grouped, without_shared_ends
from runner.comparison.export import to_csv, to_dict
from runner.comparison.insights import failed_checks, headline, insights, leading
from runner.comparison.jobs import Job
from runner.errors import printable
from runner.files.atomic import write_whole
from runner.reports.console import COLOURS, Fact, Rows, Tables, known, number, percent, print_rows
from runner.reports.generation import step_rows
from runner.reports.page.build import page
from runner.reports.picture import pictures
from runner.results import JsonObject

_LEVEL_WORDS = {"good": "good", "warn": "fair", "bad": "poor"}
_QUESTIONS = {"working": "Training", "ready": "Readiness", "layer": "Layers", "best": "Best Checkpoint"}
# What a narrow terminal does without, first to last.
_SPARED = ("top1", "kl", "status", "progress", "readiness", "run")
# A run's name beyond this loses what all runs' names share.
_LONG_RUN = 16
# What tells rows of one checkpoint apart.
_TELLING = ("run", "tier", "variant")
# A panel's frame and padding.
_FRAME = 6
# Jobs with one reason that get a line each.
_OWN_LINES = 3
_CHECK_WORDS = ("pass", "warning", "fail", "skipped")


@dataclass(frozen=True, kw_only=True)
class ComparisonFiles:
    """`files`: those that were written, by kind (html, csv, json, png, svg); `problem`: why not all, in one line."""

    files: dict[str, Path]
    problem: str | None = None


def write_files(comparison: Comparison, directory: Path) -> ComparisonFiles:
    """Write `comparison.*` into `directory`, each file whole or not at all; the first that fails ends it.

    Nothing that a job left is touched.
    """
    drawn = pictures(comparison)
    text = json.dumps(to_dict(comparison), indent=1, ensure_ascii=False, allow_nan=False)
    contents = {
        "json": f"{text}\n".encode(),
        "csv": to_csv(comparison).encode(),
        **drawn,
        "html": page(comparison, directory, picture=bool(drawn)).encode(),
    }
    files: dict[str, Path] = {}
    for kind, content in contents.items():
        path = directory / f"comparison.{kind}"
        try:
            write_whole(path, content)
        except OSError as error:
            return ComparisonFiles(files=files, problem=f"{path}: cannot be written: {error.strerror or error}")
        files[kind] = path
    return ComparisonFiles(files=files)


def summary(comparison: Comparison) -> JsonObject:
    """What the report shows, as JSON values: the sentence, the answers for the closest curve, jobs, failures."""
    said = headline(comparison)
    found = vars(insights(leading(comparison))) if comparison.series else {}
    # A curve's variant tells it from others of the same run and tier.
    variants = {(job.sweep, job.name): series.variant for series in comparison.series for job in series.jobs}
    shown = [job for job in comparison.done if job.metric("mse") is not None or job.verdict]
    return {
        "headline": {"level": said.level, "words": said.words},
        "answers": {name: {"level": found[name].level, "words": found[name].text} for name in _QUESTIONS if found},
        "jobs": _counts(comparison),
        "failed_checks": failed_checks(comparison),
        "failures": [{"job": job.name, "status": job.status, "message": job.message} for job in comparison.failures],
        "checkpoints": [_row(job, variants.get((job.sweep, job.name), "")) for job in shown],
        "tests": [_test_row(job) for job in comparison.done if job.task == "test"],
        "continuations": list(step_rows(comparison.done)),
    }


def _counts(comparison: Comparison) -> JsonObject:
    """How many jobs there are, are ok, and ended well with checks that failed."""
    unsound = sum(job.outcome != "ok" for job in comparison.done)
    counts = {"all": len(comparison.jobs), "ok": len(comparison.done) - unsound}
    return {**counts, "failed_checks": unsound} if unsound else counts


def _row(job: Job, variant: str) -> JsonObject:
    return {
        "checkpoint": job.checkpoint,
        "run": job.run,
        "tier": job.tier,
        "variant": variant,
        "step": job.step,
        **{name: job.metric(name) for name in ("mse", "cosine", "kl", "top1")},
        **{name: job.judged(name) for name in ("status", "progress", "readiness")},
        **({"status": "damaged", "readiness": None} if job.damaged else {}),
    }


def _test_row(job: Job) -> JsonObject:
    statuses = [row.get("status") for row in job.checks]
    return {
        "checkpoint": job.checkpoint,
        "tier": job.tier,
        "step": job.step,
        **{word: statuses.count(word) for word in _CHECK_WORDS},
        "overall": job.overall,
        "failed": job.failed_checks,
    }


def compare_facts(result: JsonObject) -> list[Fact]:
    """Every line of the report, in order; failures first."""
    said, jobs = result["headline"], result["jobs"]
    rows: list[tuple[str, object, str]] = [
        (status.title(), text, "poor") for status, text in failures(result["failures"])
    ]
    rows.append(("Comparison", said["words"], _LEVEL_WORDS.get(said["level"], "")))
    rows += _answer_lines(result["answers"])
    rows.append(("Jobs", _count_words(jobs), "poor" if jobs.get("failed_checks") else ""))
    files = dict(result["files"])
    rows += [("Page", files.pop("html", None), ""), ("Beside It", ", ".join(Path(f).name for f in files.values()), "")]
    return known(rows)


def _count_words(jobs: Mapping[str, int]) -> str:
    unsound = jobs.get("failed_checks")
    return f"{jobs['ok']} of {jobs['all']} ok{f', {unsound} with failed checks' if unsound else ''}"


def failures(rows: Sequence[Mapping[str, str]]) -> list[tuple[str, str]]:
    """(status, `job: why`) for each job without a result; many of one kind share a line."""
    lines = []
    for (status, message), found in grouped(
        rows, lambda row: (row["status"].replace("_", " "), row["message"])
    ).items():
        jobs = [row["job"] for row in found]
        several = len(jobs) > _OWN_LINES
        names = [f"{len(jobs)} jobs, {jobs[0]} … {jobs[-1]}"] if several else jobs
        lines += [(status, f"{printable(name)}: {printable(message)}") for name in names]
    return lines


def _answer_lines(said: Mapping[str, Mapping[str, str]]) -> list[tuple[str, object, str]]:
    return [
        (label, said[name]["words"], _LEVEL_WORDS.get(said[name]["level"], ""))
        for name, label in _QUESTIONS.items()
        if name in said
    ]


def compare_tables(result: JsonObject, verbose: bool) -> Tables:
    """The checkpoints as rows of finished cells, as many columns as the terminal has room for."""
    width = shutil.get_terminal_size().columns - _FRAME if sys.stdout.isatty() and not verbose else None
    rows = fitting(checkpoint_rows(result["checkpoints"], drawn=sys.stdout.isatty()), width, gap=2)
    tables = (("checkpoints", rows), ("tests", test_rows(result["tests"])), ("continuations", result["continuations"]))
    return [(title, rows) for title, rows in tables if rows]


def test_rows(tests: Sequence[JsonObject]) -> Rows:
    """Finished cells: how many checks of each checkpoint ended how, and which failed."""
    return [
        {
            "checkpoint": printable(row["checkpoint"]),
            "tier": printable(row["tier"] or "–"),
            **{word: row[word] for word in _CHECK_WORDS},
            "overall": printable(row["overall"] or "–"),
            "details": printable(", ".join(row["failed"])),
        }
        for row in tests
    ]


def checkpoint_rows(checkpoints: Sequence[JsonObject], *, drawn: bool) -> Rows:
    """Finished cells; run, tier and variant where they differ, a verdict's columns only where one was given."""
    several = {name for name in _TELLING if len({row[name] for row in checkpoints}) > 1}
    judged = any(row["status"] for row in checkpoints)
    runs = list(dict.fromkeys(row["run"] or "" for row in checkpoints))
    short_runs = dict(zip(runs, without_shared_ends(runs, _LONG_RUN), strict=True))
    checkpoints = [{**row, "run": short_runs[row["run"] or ""]} for row in checkpoints]
    return [
        {
            "checkpoint": printable(row["checkpoint"]),
            **{name: printable(row[name] or "–") for name in _TELLING if name in several},
            "step": "–" if row["step"] is None else row["step"],
            **{name: number(row[name]) for name in ("mse", "cosine", "kl")},
            "top1": percent(row["top1"]),
            **(_verdict_cells(row, drawn) if judged else {}),
        }
        for row in checkpoints
    ]


def _verdict_cells(row: JsonObject, drawn: bool) -> JsonObject:
    bar = _bar(row["progress"], drawn)
    return {"status": printable(row["status"] or "–"), "progress": bar, "readiness": printable(row["readiness"] or "–")}


def _bar(percent: object, drawn: bool) -> str:
    if not isinstance(percent, (int, float)):
        return "–"
    filled = max(0, min(5, (int(percent) + 10) // 20))
    return f"{'█' * filled}{'░' * (5 - filled)} {percent:3}%" if drawn else f"{percent}%"


def fitting(rows: Rows, width: int | None, *, gap: int) -> Rows:
    """`rows` without the columns that do not fit into `width` characters; None: all."""
    spared = [name for name in _SPARED if rows and name in rows[0]]
    while width is not None and spared and _width(rows, gap) > width:
        left_out = spared.pop(0)
        rows = [{name: value for name, value in row.items() if name != left_out} for row in rows]
    return rows


def _width(rows: Rows, gap: int) -> int:
    widest = [max(len(name), *(len(str(row[name])) for row in rows)) for name in rows[0]]
    return sum(widest) + gap * len(widest)


def print_comparison(comparison: Comparison, written: ComparisonFiles, console: Console) -> None:
    """What a sweep prints at its end: failures (to stderr), the learning curve, what it says, where the page lies."""
    found = summary(comparison)
    # A failed job's own line said why, as it ended.
    for status, text in failures([row for row in found["failures"] if row["status"] != "failed"]):
        print(f"{status.upper()} {text}", file=sys.stderr)
    terminal = console.is_terminal
    gap = 2 if console.width >= 100 else 1
    rows = checkpoint_rows(found["checkpoints"], drawn=terminal)
    title = f"jobs: {_count_words(found['jobs'])}"
    print_rows(title, fitting(rows, console.width if terminal else None, gap=gap), console, gap=gap)
    print_rows("tests", test_rows(found["tests"]), console, gap=gap)
    print_rows("continuations", step_rows(comparison.done), console, gap=gap)
    said = found["headline"]
    lines = known(
        [("Comparison", said["words"], _LEVEL_WORDS.get(said["level"], "")), *_answer_lines(found["answers"])]
    )
    for label, value, word in lines:
        line = Text.assemble(f"{label}: ", (value, COLOURS.get(word, "")))
        console.print(line, soft_wrap=not terminal)
    if written.problem is not None:
        print(f"runner: warning: {printable(written.problem)}", file=sys.stderr)
    print(f"Sweep: {', '.join(printable(path) for path in comparison.directories)}")
    if "html" in written.files:
        print(f"Page: {printable(written.files['html'])}")
