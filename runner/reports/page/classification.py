"""Charts of classifiers: accuracy over steps with its interval, and confusion matrices."""

from collections.abc import Sequence

from runner.comparison.comparison import Comparison, Series
from runner.comparison.jobs import Job
from runner.reports.page.charts import Figure, line, plot_text, shortened, with_values
from runner.results import JsonObject, is_number

# Matrices that a page has room for: those of the last jobs.
_MOST_MATRICES = 6


def classification_charts(comparison: Comparison) -> list[Figure]:
    """Every chart that the jobs have figures for."""
    found = accuracy(comparison.series)
    matrices = [job for job in comparison.done if job.confusion and job.labels][-_MOST_MATRICES:]
    return [*([found] if found else []), *(confusion(number, job) for number, job in enumerate(matrices))]


def accuracy(series: Sequence[Series]) -> Figure | None:
    """Accuracy over steps, with the 95 % interval, and below it that of always giving the commonest class."""
    rows = with_values(series, "accuracy")
    if not rows:
        return None
    data: list[JsonObject] = []
    for number, one, values in rows:
        lows, highs = one.values("accuracy_low"), one.values("accuracy_high")
        above, below = (
            [
                abs(end - value) if end is not None and value is not None else None
                for end, value in zip(ends, values, strict=True)
            ]
            for ends in (highs, lows)
        )
        bars = {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "thickness": 1}
        data.append(line(one, number, values, error_y=bars))
        for name in sorted({name for job in one.jobs for name in job.metrics if name.startswith("test/")}):
            test = [_of_set(job, name) for job in one.jobs]
            shown = f"{one.label} · {name.removeprefix('test/')}"
            data.append(line(one, number, test, name=shown, line={"dash": "dot"}))
    guess = rows[0][1].values("majority")
    if any(value is not None for value in guess):
        base = line(rows[0][1], rows[0][0], guess, name="commonest class", line={"dash": "dash", "width": 1})
        data.append({**base, "mode": "lines"})
    return Figure(
        name="accuracy",
        title="Accuracy",
        note="Of held-out rows with its 95 % interval (Wilson); dotted: test sets; dashed: always the commonest class.",
        data=data,
        layout={
            "xaxis": {"title": {"text": "step"}, "tickformat": "~s"},
            "yaxis": {"title": {"text": "accuracy"}, "tickformat": ".0%", "rangemode": "tozero"},
        },
        wide=True,
        height=440,
    )


def _of_set(job: Job, name: str) -> float | None:
    figures = job.metrics.get(name)
    value = figures.get("accuracy") if isinstance(figures, dict) else None
    return value if is_number(value) else None


def confusion(number: int, job: Job) -> Figure:
    """Shares of each true class; the text is how many rows."""
    names = [plot_text(shortened(label, 24)) for label in job.labels]
    shares = [[count / (sum(row) or 1) for count in row] for row in job.confusion]
    trace = {
        "type": "heatmap",
        "x": names,
        "y": names,
        "z": shares,
        "zmin": 0,
        "zmax": 1,
        "text": [[str(count) for count in row] for row in job.confusion],
        "texttemplate": "%{text}",
        "hovertemplate": "true %{y}, predicted %{x}: %{text} rows, %{z:.1%}<extra></extra>",
        "xgap": 1,
        "ygap": 1,
        "showscale": False,
        "meta": {},
    }
    return Figure(
        name=f"confusion-{number}",
        title=f"Confusion · {shortened(job.checkpoint)}",
        note="Rows are the true classes, columns what was predicted; the colour is the share of the row.",
        data=[trace],
        layout={
            "xaxis": {"title": {"text": "predicted"}, "type": "category"},
            "yaxis": {"title": {"text": "true"}, "type": "category", "autorange": "reversed"},
        },
        height=max(280, 150 + 40 * len(names)),
    )
