"""The page of a comparison: template, style and script, the charts, and the tables and cards beside them."""

import base64
import gzip
import hashlib
import json
import os
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from urllib.parse import quote

import jinja2
from markupsafe import Markup

from runner.comparison.comparison import PLAN_NAME, Comparison, grouped, spelled
from runner.comparison.insights import headline, insights, leading
from runner.comparison.jobs import Job
from runner.files.atomic import read_json
from runner.metrics.verdict import thresholds
from runner.reports.generation import step_rows
from runner.reports.page.charts import Figure, charts, shortened, tell_apart
from runner.reports.page.classification import classification_charts
from runner.results import FILE_NAME, JsonObject, is_number

_PARTS = Path(__file__).parent
_FAILURES_SHOWN = 8
_QUESTIONS = {
    "working": "Is training working?",
    "ready": "When is it ready?",
    "layer": "Which layer holds it back?",
    "best": "Which checkpoint is best?",
}
_LEVELS = {
    "excellent": "good", "good": "good", "fair": "warn", "moderate": "warn", "poor": "bad",
    "production": "good", "basic": "good", "continue": "warn", "early": "bad",
    "damaged": "bad", "ok": "good", "failed": "bad", "failed checks": "bad", "lost": "bad", "never started": "bad",
    "READY": "good", "PARTIALLY_READY": "warn", "NOT_READY": "bad",
}  # fmt: skip
_VALUES_SHOWN = 12
_LONGEST_VALUE = 80
# Name, what is read from a job, and how it is written: "" text, "level" a status, else a format of numbers.
_COLUMNS: tuple[tuple[str, Callable[[Job], object], str], ...] = (
    ("checkpoint", lambda job: job.checkpoint, ""),
    ("run", lambda job: job.run, ""),
    ("status", lambda job: _spoken(job.outcome), "level"),
    ("task", lambda job: job.task, ""),
    ("tier", lambda job: job.tier, ""),
    ("step", lambda job: job.step, ",d"),
    ("mse", lambda job: job.metric("mse"), ".4g"),
    ("cosine", lambda job: job.metric("cosine"), ".4f"),
    ("KL", lambda job: job.metric("kl"), ".4g"),
    ("top-1", lambda job: job.metric("top1"), ".1%"),
    ("accuracy", lambda job: job.metric("accuracy"), ".1%"),
    ("macro F1", lambda job: job.metric("macro_f1"), ".3f"),
    ("progress", lambda job: job.judged("progress"), ".0f"),
    ("verdict", lambda job: "damaged" if job.damaged and job.verdict else job.judged("status"), "level"),
    ("readiness", lambda job: job.judged("readiness"), "level"),
    ("failed checks", lambda job: ", ".join(job.failed_checks), ""),
    ("overall", lambda job: job.overall, "level"),
    ("seconds", lambda job: job.seconds, ".1f"),
    ("job", lambda job: job.name, ""),
)
_ALWAYS = ("checkpoint", "job", "status")
_IF_DIFFERENT = ("run", "task", "tier")


def page(comparison: Comparison, directory: Path, *, picture: bool) -> str:
    """The page as HTML, to be written into `directory`, from which its links lead.

    `picture`: whether comparison.png and .svg lie beside it. Everything that came from a file is escaped; nothing is
    loaded from elsewhere, and the page's own policy forbids it.
    """
    figures = [*charts(comparison), *classification_charts(comparison)]
    columns, jobs = table(comparison, directory)
    return render(
        "page.html",
        figures,
        title=", ".join(path.resolve().name or str(path) for path in comparison.directories),
        directories=[str(path.resolve()) for path in comparison.directories],
        headline=headline(comparison),
        failures=failures(comparison, directory),
        failure_count=len(comparison.failures),
        shown_failures=_FAILURES_SHOWN,
        cards=_cards(comparison),
        findings=_findings(comparison),
        absent=_absent(comparison),
        texts=step_rows(comparison.done),
        columns=columns,
        jobs=jobs,
        differences=differences(comparison),
        thresholds=_threshold_words() if any(job.metric("mse") is not None for job in comparison.jobs) else "",
        again=_again(comparison),
        picture=picture,
    )


def render(template: str, figures: Sequence[Figure], **values: object) -> str:
    """A self-contained page of the house: a template of this folder, its `figures`, and further `values`."""
    source, packed = _plotly() if figures else ("", "")
    script = (_PARTS / "page.js").read_text(encoding="utf-8")
    loader = jinja2.FileSystemLoader(_PARTS)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.get_template(template).render(
        policy=_policy([script, source] if figures else [script]),
        css=Markup((_PARTS / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        plotly=Markup(packed),
        data=Markup(_json([{"data": tell_apart(f.data), "layout": f.layout} for f in figures])),
        figures=figures,
        **values,
    )


def _absent(comparison: Comparison) -> list[str]:
    """What a reader would look for and does not find, and why."""
    if not comparison.series:
        return []
    words = []
    mses = [value for one in comparison.series for value in one.values("mse") if value is not None]
    if mses and not any(mses):
        words.append("No curve of the mse: it is 0 at every step, and a logarithmic scale does not reach that.")
    if not any(job.layer_mses for one in comparison.series for job in one.jobs):
        words.append("No layers × steps: only tier=full of NPT checkpoints measures each layer alone.")
    if all(one.estimate is None for one in comparison.series):
        words.append("No progress, thresholds or estimate: they are defined for NPT checkpoints against their base.")
    return words


def _again(comparison: Comparison) -> list[tuple[str, str]]:
    """What was typed for each sweep, and what makes this page again, or goes on with what failed."""
    rows = []
    for directory in comparison.directories:
        try:
            words = read_json(directory / PLAN_NAME)["command"]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # a folder of results that no sweep of ours left
        if isinstance(words, list):
            rows.append(("The sweep", shlex.join(["python", "-m", "runner", *map(str, words)])))
        if any(job.sweep == directory for job in comparison.failures):
            rows.append(("What has no result", shlex.join(["python", "-m", "runner", "-m", f"resume={directory}"])))
    paths = ",".join(map(str, comparison.directories))
    sweep = f"[{paths}]" if len(comparison.directories) > 1 else paths
    return [*rows, ("This page again", shlex.join(["python", "-m", "runner", "task=compare", f"sweep={sweep}"]))]


def _threshold_words() -> str:
    bounds = thresholds()
    mse = ", ".join(f"{name} < {bound:g}" for name, bound in bounds.mse.items())
    cosine = ", ".join(f"{name} > {bound:g}" for name, bound in bounds.cosine.items())
    layer = f"a layer alone is good below {bounds.layer_mse:g}"
    return f"Fixed thresholds: mse {mse}, else poor; cosine {cosine}, else poor; {layer}."


def _json(value: object) -> str:
    """JSON that stands in a script element whatever text it holds."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


@cache
def _plotly() -> tuple[str, str]:
    """plotly.js, and the same packed; its Python package holds the full bundle only, which packs to 2 MB."""
    import plotly

    source = (Path(plotly.__file__).parent / "package_data" / "plotly.min.js").read_text(encoding="utf-8")
    return source, base64.b64encode(gzip.compress(source.encode(), 6, mtime=0)).decode()


def _policy(scripts: Iterable[str]) -> str:
    """Only our own scripts run, and nothing is loaded."""
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{value}'" for value in hashes)
    looks = "style-src 'unsafe-inline'; img-src data: blob:"
    return f"default-src 'none'; script-src {allowed}; {looks}; base-uri 'none'; form-action 'none'"


def _cards(comparison: Comparison) -> list[JsonObject]:
    """The four questions with their answers for each series, the closest one first."""
    first = leading(comparison) if comparison.series else None
    return [
        {
            "label": one.label if len(comparison.series) > 1 else "",
            "colour": number,
            "answers": [{"question": _QUESTIONS[name], "said": said} for name, said in vars(insights(one)).items()],
        }
        for number, one in sorted(enumerate(comparison.series), key=lambda pair: pair[1] is not first)
    ]


def failures(comparison: Comparison, directory: Path) -> list[JsonObject]:
    """Jobs without a result, those with one message together, in the order of the first of each."""
    groups = grouped(comparison.failures, lambda job: (_spoken(job.status), job.message))
    return [
        {
            "status": status,
            "message": message,
            "jobs": [{"name": job.name, "log": _link(job.log, directory) if job.log else None} for job in jobs],
        }
        for (status, message), jobs in groups.items()
    ]


def _findings(comparison: Comparison) -> list[JsonObject]:
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


def table(comparison: Comparison, directory: Path) -> tuple[list[JsonObject], list[JsonObject]]:
    """The columns of the table of all jobs, and its rows: failures first, then as they ran."""
    columns = [column for column in _COLUMNS if column[0] in _ALWAYS or any(column[1](job) for job in comparison.jobs)]
    same = {name for name, read, _ in columns if name in _IF_DIFFERENT and len({read(j) for j in comparison.done}) < 2}
    columns = [column for column in columns if column[0] not in same]
    rows = [
        {"cells": [_cell(read(job), form) for _, read, form in columns], "links": _links(job, directory)}
        for job in sorted(comparison.jobs, key=lambda job: (job.status == "ok", job.outcome == "ok"))
    ]
    return [{"name": name, "number": form not in ("", "level")} for name, _, form in columns], rows


def _spoken(status: str) -> str:
    return status.replace("_", " ")


def _cell(value: object, form: str) -> JsonObject:
    numeric = form not in ("", "level")
    if value is None or value == "":
        return {"text": "–", "sort": None, "number": numeric, "level": ""}
    text = format(value, form) if numeric and is_number(value) else str(value)
    level = _LEVELS.get(text, "unknown") if form == "level" else ""
    return {"text": text, "sort": value if numeric else None, "number": numeric, "level": level}


def _links(job: Job, directory: Path) -> list[dict[str, str]]:
    files = {"log": job.log, "result": job.sweep / job.name / FILE_NAME}
    return [{"text": name, "href": _link(file, directory)} for name, file in files.items() if file and file.is_file()]


def _link(file: Path, directory: Path) -> str:
    """Relative, so that the folder can be moved or sent; a colon in a name is no scheme after `./`."""
    relative = Path(os.path.relpath(file.absolute(), directory.absolute())).as_posix()
    return quote(relative if relative.startswith(".") else f"./{relative}")


def differences(comparison: Comparison) -> list[JsonObject]:
    """Each config key that differs, with its values and how many jobs have each."""
    rows = []
    for key, values in comparison.differences.items():
        counts = Counter(map(spelled, values))
        shown = [
            {"text": shortened(text, _LONGEST_VALUE), "count": count if count > 1 else 0}
            for text, count in counts.items()
        ]
        if len(shown) > _VALUES_SHOWN:
            more = {"text": f"… {len(shown)} values …", "count": 0}
            shown = [*shown[: _VALUES_SHOWN // 2], more, *shown[-_VALUES_SHOWN // 3 :]]
        rows.append({"key": key, "choices": shown})
    return rows
