"""The page itself: template, style and script joined with the data of one comparison."""

import base64
import gzip
import hashlib
import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from runner.comparison.comparison import Comparison
from runner.comparison.insights import headline
from runner.comparison.points import layer_mses
from runner.metrics.verdict import thresholds
from runner.reports.page import charts as curves
from runner.reports.page import charts as details
from runner.reports.page import sections
from runner.reports.page.figures import Figure, tell_apart

_PARTS = Path(__file__).parent
_FAILURES_SHOWN = 8


def page(comparison: Comparison, directory: Path, *, picture: bool) -> str:
    """The page as HTML, to be written into `directory`, from which its links lead.

    `picture`: whether comparison.png and .svg lie beside it. Everything that came from a file is escaped; nothing is
    loaded from elsewhere, and the page's own policy forbids it.
    """
    figures = charts(comparison)
    columns, jobs = sections.table(comparison, directory)
    source, packed = _plotly() if figures else ("", "")
    script = (_PARTS / "page.js").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string((_PARTS / "page.html").read_text(encoding="utf-8")).render(
        title=", ".join(path.resolve().name or str(path) for path in comparison.directories),
        directories=[str(path.resolve()) for path in comparison.directories],
        policy=_policy([script, source] if figures else [script]),
        css=Markup((_PARTS / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        plotly=Markup(packed),
        data=Markup(_json([{"data": tell_apart(f.data), "layout": f.layout} for f in figures])),
        headline=headline(comparison),
        failures=sections.failures(comparison, directory),
        failure_count=len(comparison.failures),
        shown_failures=_FAILURES_SHOWN,
        cards=sections.cards(comparison),
        findings=sections.findings(comparison),
        figures=figures,
        absent=_absent(comparison),
        columns=columns,
        jobs=jobs,
        differences=sections.differences(comparison),
        thresholds=_threshold_words(),
        picture=picture,
    )


def charts(comparison: Comparison) -> list[Figure]:
    """Every chart that the jobs have figures for, in the order of the page."""
    series = comparison.series
    found: Iterable[Figure | None] = [
        curves.mse(series),
        curves.cosine(series),
        curves.kl(series),
        curves.agreement(series),
        curves.progress(series),
        curves.perplexity(series),
        details.magnitude(series),
        *details.layers(series),
        *details.prompts(series),
        details.without_step(comparison.jobs),
    ]
    return [figure for figure in found if figure is not None]


def _absent(comparison: Comparison) -> list[str]:
    """What a reader would look for and does not find, and why."""
    if not comparison.series:
        return []
    words = []
    mses = [value for one in comparison.series for value in one.values("mse") if value is not None]
    if mses and not any(mses):
        words.append("No curve of the mse: it is 0 at every step, and a logarithmic scale does not reach that.")
    if not any(layer_mses(job) for one in comparison.series for job in one.jobs):
        words.append("No layers × steps: only tier=full of NPT checkpoints measures each layer alone.")
    if all(one.estimate is None for one in comparison.series):
        words.append("No progress, thresholds or estimate: they are defined for NPT checkpoints against their base.")
    return words


def _threshold_words() -> str:
    bounds = thresholds()
    mse = ", ".join(f"{name} < {bound:g}" for name, bound in bounds.mse.items())
    cosine = ", ".join(f"{name} > {bound:g}" for name, bound in bounds.cosine.items())
    layer = f"a layer alone is good below {bounds.layer_mse:g}"
    return f"Fixed thresholds: mse {mse}, else poor; cosine {cosine}, else poor; {layer}."


def _json(value: Any) -> str:
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
