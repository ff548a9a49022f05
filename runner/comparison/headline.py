"""The one sentence at the top of a comparison."""

from collections import Counter

from runner.comparison.answer import Answer
from runner.comparison.comparison import Comparison
from runner.comparison.insights import answers
from runner.comparison.series import Series

_STATUS_WORDS = {"failed": "failed", "lost": "lost", "never_started": "never started"}


def headline(comparison: Comparison) -> Answer:
    """What the comparison comes to: the curve that is furthest along speaks, jobs without a result are named."""
    missing = lacking(comparison)
    if not comparison.done:
        return Answer(level="bad", short="no job left a result", words=f"No job left a result: {missing}.")
    found = _curve_words(comparison)
    if not missing:
        return found
    level = "warn" if found.level == "good" else found.level
    return Answer(level=level, short=found.short, words=f"{found.words} {missing[:1].upper()}{missing[1:]}.")


def lacking(comparison: Comparison) -> str:
    """`1 of 8 jobs failed, 2 lost`, or `` where every job ended well."""
    counts = Counter(job.status for job in comparison.failures)
    parts = [f"{counts[status]} {word}" for status, word in _STATUS_WORDS.items() if counts[status]]
    return f"of {len(comparison.jobs)} jobs {', '.join(parts)}" if parts else ""


def _curve_words(comparison: Comparison) -> Answer:
    if not comparison.series:
        words = f"{len(comparison.done)} jobs done; none has both a step and figures, so there is no curve."
        return Answer(level="unknown", short="no curve", words=words)
    furthest = leading(comparison)
    found = answers(furthest)
    words = f"{found.working.short}; {found.ready.short}; {found.best.short}."
    words = words[:1].upper() + words[1:]
    if len(comparison.series) > 1:
        words = f"Closest of {len(comparison.series)} curves is {furthest.label}: {words[:1].lower()}{words[1:]}"
    rank = ("good", "unknown", "warn", "bad")
    known = [answer.level for answer in (found.working, found.ready) if answer.level != "unknown"]
    return Answer(level=max(known, key=rank.index, default="unknown"), short=found.working.short, words=words)


def leading(comparison: Comparison) -> Series:
    """The series whose last checkpoint has the lowest mse; among equals the one with figures by layer."""

    def order(series: Series) -> tuple[float, bool]:
        mse = series.jobs[-1].metric("mse")
        return (float("inf") if mse is None else mse, not any("mse" in row for row in series.jobs[-1].layers))

    return min(comparison.series, key=order)
