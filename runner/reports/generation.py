"""The report of `task=generate`, and what a sweep of it shows: continuations side by side, and step × prompt."""

import shutil
import sys
from collections.abc import Sequence
from os.path import commonprefix

from rich.text import Text

from runner.comparison.jobs import Job
from runner.errors import printable
from runner.reports.console import Fact, Rows, Tables, chosen, known, number, percent, size
from runner.results import JsonObject

# From this width on, a checkpoint's text and the reference's stand beside each other.
_WIDE = 100
# What is said of how a text was drawn, and the value that needs no word.
_SETTINGS = {
    "temperature": None, "top_k": None, "top_p": 1, "min_p": None, "repetition_penalty": 1, "seed": None,
    "layers": None,
}  # fmt: skip
_FIGURES = ["seed", "finish", "tokens", "tokens_per_second", "logprob_mean", "repetition"]
_COMPARED = ["agreement", "first_divergence", "path_kl"]


def generate_facts(result: JsonObject) -> list[Fact]:
    """Every line of the report, in order."""
    rows, metrics = result.get("generation", []), result.get("metrics", {})
    settings = result["settings"]
    said = [f"{name} {settings[name]}" for name, idle in _SETTINGS.items() if settings[name] not in (None, idle)]
    tokens = sum(row["tokens"] for row in rows)
    lines: list[tuple[str, object, str]] = [
        ("Checkpoint", result["ckpt"], ""),
        ("Format", result["format"], ""),
        ("Step", result.get("step"), ""),
        ("Reference", result.get("reference"), ""),
        ("Drawn With", ", ".join(said) if settings["temperature"] else f"greedy, seed {settings['seed']}", ""),
        ("Tokens", f"{tokens} in {len(rows)} texts" if len(rows) != 1 else f"{tokens}, {rows[0]['finish']}", ""),
    ]
    if len(rows) == 1 and rows[0]["tokens_per_second"]:
        lines.append(("Speed", f"{rows[0]['tokens_per_second']:.1f} tokens/s", ""))
    if "path_kl" in metrics:
        lines += [
            ("Agreement", f"{percent(metrics['agreement'])} of the tokens", ""),
            ("KL Along the Text", f"{number(metrics['path_kl'])} nats/token", ""),
        ]
    return known(lines)


def generate_tables(result: JsonObject, verbose: bool) -> Tables:
    """The texts, unless they were shown while they were made; beside the reference's where there is one."""
    rows = result.get("generation", [])
    tables: Tables = []
    if rows and not result["shown"]:
        several = len({row["seed"] for row in rows}) > 1
        tables.append(("continuations", _texts(rows, several)))
    if verbose and rows:
        tables.append(("figures", chosen(rows, ["prompt", *_FIGURES, *_COMPARED])))
        if result.get("cache_bytes"):
            tables.append(("memory", [{"figure": "cache", "value": size(result["cache_bytes"])}]))
    return tables


def _texts(rows: Sequence[JsonObject], several: bool) -> Rows:
    drawn = sys.stdout.isatty()
    wide = not drawn or shutil.get_terminal_size().columns >= _WIDE
    found: list[dict[str, object]] = []
    for row in rows:
        own: dict[str, object] = {"prompt": _line(row["prompt"])}
        if several:
            own["seed"] = row["seed"]
        theirs = row.get("reference_text")
        if theirs is None:
            found.append({**own, "text": _line(row["text"]), "finish": row["finish"]})
        elif wide:
            texts = {"text": marked(row["text"], theirs), "reference_text": marked(theirs, row["text"])}
            parts = row["first_divergence"]
            found.append(
                {**own, **texts, "agreement": percent(row["agreement"]), "parts at": "–" if parts is None else parts}
            )
        else:
            found.append({**own, "of": "checkpoint", "text": marked(row["text"], theirs)})
            found.append({**dict.fromkeys(own, ""), "of": "reference", "text": marked(theirs, row["text"])})
    return found


def _line(text: str) -> str:
    return printable(text.replace("\n", " ").strip())


def marked(text: str, other: str) -> Text:
    """`text` on one line, dim as far as `other` is the same, the first word that is not the same marked."""
    text, other = _line(text), _line(other)
    same = len(commonprefix([text, other]))  # noqa: RUF071 - characters are wanted
    if same == len(text):
        return Text(text, style="dim")
    end = text.find(" ", same + 1)
    end = len(text) if end < 0 else end
    return Text.assemble((text[:same], "dim"), (text[same:end], "bold yellow"), text[end:])


def step_rows(jobs: Sequence[Job]) -> Rows:
    """Finished cells: a row for each checkpoint, in the order of the jobs, a column for each prompt's continuation.

    [] where no job generated anything.
    """
    jobs = [job for job in jobs if job.task == "generate" and job.generation]
    prompts = dict.fromkeys(_line(str(row.get("prompt"))) for job in jobs for row in job.generation)
    several = len({job.run for job in jobs}) > 1
    rows: dict[tuple[str, str], dict[str, object]] = {}
    for job in jobs:
        for row in job.generation:
            seed = row.get("seed")
            settled = {"run": printable(job.run)} if several else {}
            own = rows.setdefault(
                (job.ckpt or job.name, str(seed)),
                {**settled, "step": printable(job.checkpoint) if job.step is None else job.step, "seed": seed}
                | dict.fromkeys(prompts, "–"),
            )
            own[_line(str(row.get("prompt")))] = _line(str(row.get("text")))
    if len({row["seed"] for row in rows.values()}) == 1:
        return [{name: value for name, value in row.items() if name != "seed"} for row in rows.values()]
    return list(rows.values())
