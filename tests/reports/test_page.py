"""The page without a browser: every kind of sweep renders, nothing is loaded from elsewhere, all text is escaped."""

import base64
import gzip
import hashlib
import html
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from runner.comparison.comparison import read
from runner.reports.page.build import differences, failures, page, table
from runner.reports.page.charts import charts
from runner.reports.picture import pictures
from tests.comparison.sweeps import result, write_job, write_sweep
from tests.conftest import ROOT
from tests.reports.cases import CASES, HOSTILE


class Elements(HTMLParser):
    """The elements of a page, the addresses that they name, and the texts of its scripts."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.addresses, self.handlers, self.scripts = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "action", "data", "srcset")]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data):
        if self.get_starttag_text() and self.get_starttag_text().startswith("<script") and data.strip():
            self.scripts.append(data)


def render(path):
    return page(read(path), path, picture=False)


@pytest.mark.parametrize("name", sorted(CASES))
def test_every_kind_of_sweep_renders_without_an_address_outside(tmp_path, name):
    path = CASES[name](tmp_path / name)
    found = Elements(render(path))
    assert {"h1", "table", "main"} <= set(found.tags)
    assert all(re.match(r"\.?\.?/|comparison\.|data:,$", address) for address in found.addresses)
    assert not found.handlers
    assert found.tags.count("script") == (3 if charts(read(path)) else 2)


def test_what_a_logarithmic_scale_does_not_reach_is_said(tmp_path):
    exact = write_sweep(tmp_path / "exact", {100 * i: 0.0 for i in range(1, 5)})
    assert {"mse", "kl"}.isdisjoint(figure.name for figure in charts(read(exact)))
    assert "No curve of the mse: it is 0 at every step" in render(exact)
    partly = write_sweep(tmp_path / "partly", {100: 0.3, 200: 0.0, 300: 0.1})
    assert "Where it is 0" in next(figure for figure in charts(read(partly)) if figure.name == "mse").note


def test_a_picture_has_the_gaps_of_the_page(tmp_path):
    gap = pictures(read(write_sweep(tmp_path / "a", {100: 0.5, 200: None, 300: 0.3})))
    without = pictures(read(write_sweep(tmp_path / "b", {100: 0.5, 300: 0.3})))
    assert gap["svg"] != without["svg"]


def test_a_tall_chart_has_its_row_to_itself(tmp_path):
    layers = [{"layer": layer, "mse": 0.1} for layer in range(40)]
    write_job(tmp_path, 0, "x", result("/runs/a/checkpoint-100", 0.3, tier="full") | {"layers": layers})
    assert [figure.wide for figure in charts(read(tmp_path)) if figure.name == "layers-0"] == [True]


@pytest.mark.parametrize("name", ["two_tiers_and_runs", "not_finite", "without_steps", "hostile"])
def test_the_charts_are_what_plotly_takes(tmp_path, name):
    from plotly.graph_objects import Figure

    figures = charts(read(CASES[name](tmp_path / name)))
    assert figures
    for figure in figures:
        Figure(data=figure.data, layout=figure.layout)
        json.dumps([figure.data, figure.layout], allow_nan=False)
    assert len({figure.name for figure in figures}) == len(figures)


def test_the_charts_that_people_expect_are_there(tmp_path):
    figures = {f.name: f for f in charts(read(CASES["two_tiers_and_runs"](tmp_path / "s")))}
    assert {"mse", "cosine", "kl", "top1", "progress", "magnitude", "layers-1", "layers-3", "prompts-0"} <= set(figures)
    mse = figures["mse"]
    assert mse.layout["yaxis"]["type"] == "log"
    assert [shape["name"] for shape in mse.layout["shapes"]] == ["excellent", "good", "fair", "poor"]
    lines = [trace for trace in mse.data if trace["mode"] == "lines+markers"]
    assert [trace["name"] for trace in lines] == ["a · quick", "a · full", "b · quick", "b · full"]
    assert lines[0]["x"] == list(range(1000, 9000, 1000))
    assert [trace["line"].get("dash") for trace in mse.data if trace not in lines] == [None, None, "dash"]
    heat = figures["layers-1"].data[0]
    assert (len(heat["z"]), len(heat["z"][0])) == (8, 8)
    assert heat["zmid"] == -1


def test_text_from_results_is_text(tmp_path):
    text = render(CASES["hostile"](tmp_path / "s"))
    found = Elements(text)
    assert not {"img"} & set(found.tags)
    assert "<script>alert" not in text
    assert "49" not in re.findall(r"\$x\$ (\S+)", text)
    [data] = [script for script in found.scripts if script.startswith("[{")]
    assert "<" not in data
    names = [trace["name"] for chart in json.loads(data) for trace in chart["data"] if "name" in trace]
    assert {name.startswith(html.escape(HOSTILE, quote=False)[:50]) for name in names} == {True, False}


def test_the_policy_names_exactly_our_scripts(tmp_path):
    text = render(CASES["plain"](tmp_path / "s"))
    found = Elements(text)
    plotly, script = found.scripts[-2:]
    source = gzip.decompress(base64.b64decode(plotly))
    hashes = [base64.b64encode(hashlib.sha256(part).digest()).decode() for part in (script.encode(), source)]
    [policy] = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    allowed = policy.replace("&#39;", "'")
    assert "default-src 'none'" in allowed
    assert re.findall(r"'sha256-([^']+)'", allowed) == hashes


def test_failures_stand_first_and_lead_to_their_logs(tmp_path):
    text = render(CASES["failures"](tmp_path / "s"))
    assert text.index("14 jobs without a result") < text.index("Is training working?")
    assert '<a href="./40_x/runner.log">40_x</a>' in text
    assert "and 4 more" in text
    _, rows = table(read(tmp_path / "s"), tmp_path / "s")
    assert [row["cells"][2]["text"] for row in rows[:14]] == ["failed"] * 12 + ["lost", "never started"]


def test_links_lead_from_the_page_wherever_it_lies(tmp_path):
    folder = write_job(tmp_path / "s", 0, "a:b c%#?", None)
    [group] = failures(read(tmp_path / "s"), tmp_path / "elsewhere")
    assert group["jobs"][0]["log"] == "../s/0_a%3Ab%20c%25%23%3F/runner.log"
    assert (folder / "runner.log").is_file()


def test_a_key_with_many_values_shows_its_ends(tmp_path):
    [row] = differences(read(write_sweep(tmp_path / "s", dict.fromkeys(range(100, 5100, 100), 0.5))))
    texts = [choice["text"] for choice in row["choices"]]
    assert (row["key"], texts[0], texts[-1], len(texts)) == ("step", "100", "5000", 11)
    assert "… 50 values …" in texts


def test_the_pictures_are_the_same_each_time_and_whole(tmp_path):
    comparison = read(CASES["plain"](tmp_path / "s"))
    first = pictures(comparison)
    assert first == pictures(comparison)
    assert first["png"].startswith(b"\x89PNG")
    assert first["svg"].rstrip().endswith(b"</svg>")
    assert pictures(read(CASES["hostile"](tmp_path / "h"))).keys() == {"png", "svg"}
    assert pictures(read(CASES["checks_only"](tmp_path / "t"))) == {}


def test_the_command_line_imports_no_plotting_library():
    code = (
        "import sys, runner.cli, runner.run, runner.expand, runner.reports.console, runner.reports.tasks; "
        "print([name for name in ('plotly', 'matplotlib', 'scipy', 'jinja2') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_only_the_comparison_leads_to_the_page():
    """Whoever imports what draws would make single runs pay for it."""
    drawing = re.compile(
        r"^(?:from|import) .*(?:reports\.(?:page|picture|comparison_files|compare)|plotly|matplotlib)", re.M
    )
    found = {
        str(file.relative_to(ROOT)) for file in (ROOT / "runner").rglob("*.py") if drawing.search(file.read_text())
    }
    outside = {name for name in found if not name.startswith("runner/reports/")}
    assert outside == {"runner/tasks/compare.py", "runner/sweeps/command.py"}


def test_the_parts_of_the_page_are_in_the_package():
    assert {path.suffix for path in (Path(ROOT) / "runner/reports/page").iterdir()} >= {".html", ".css", ".js"}


def test_pills_follow_failed_checks(tmp_path):
    compared = read(CASES["checks_only"](tmp_path / "s"))
    columns, rows = table(compared, tmp_path / "s")
    place = [column["name"] for column in columns].index("status")
    assert {(row["cells"][place]["text"], row["cells"][place]["level"]) for row in rows} == {("failed checks", "bad")}


def test_the_page_says_how_it_was_made_and_how_to_go_on(tmp_path):
    sweep = write_sweep(tmp_path / "s", {100: 0.5})
    write_job(sweep, 1, "x", None)
    (sweep / "sweep.json").write_text(json.dumps({"command": ["-m", "ckpt=/runs/a b", "step=all"], "jobs": []}))
    said = html.unescape(render(sweep))
    assert "<code>python -m runner -m 'ckpt=/runs/a b' step=all</code>" in said
    assert f"<code>python -m runner -m resume={sweep}</code>" in said
    assert f"<code>python -m runner task=compare sweep={sweep}</code>" in said


def test_a_page_of_tests_has_no_thresholds_of_the_mse(tmp_path):
    assert "Fixed thresholds" not in render(CASES["checks_only"](tmp_path / "s"))
    assert "Fixed thresholds" in render(write_sweep(tmp_path / "t", {100: 0.5}))
