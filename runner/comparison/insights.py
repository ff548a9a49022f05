"""What the curves of a sweep say: does training work, when is it ready, which layer holds it back, which is best.

Every sentence states the figures that it rests on, says so where they are too few, and claims no more than they show.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, combinations

from runner.checkpoints.runs import spell
from runner.comparison.comparison import Comparison, Series
from runner.comparison.jobs import Job
from runner.metrics.classification import difference
from runner.metrics.verdict import thresholds

_STATUS_WORDS = {"failed": "failed", "lost": "lost", "never_started": "never started"}


@dataclass(frozen=True, kw_only=True)
class Insight:
    """`level`: good, warn, bad or unknown; `short`: a clause for a headline; `words`: one or two sentences.

    `more`: what belongs to it, sentence by sentence.
    """

    level: str
    short: str
    words: str
    more: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """All of it."""
        return " ".join((self.words, *self.more))


@dataclass(frozen=True, kw_only=True)
class SeriesInsights:
    """What the points of one series say to the four questions."""

    working: Insight
    ready: Insight
    layer: Insight
    best: Insight


def insights(series: Series) -> SeriesInsights:
    """The four for `series`."""
    return SeriesInsights(working=working(series), ready=ready(series), layer=worst_layer(series), best=best(series))


def trend(points: Sequence[tuple[int, float]]) -> Insight:
    """Whether the mse of (step, mse) `points`, steps ascending, falls."""
    (first_step, first), (last_step, final) = points[0], points[-1]
    if first_step == last_step:
        words = f"Cannot tell from one checkpoint (step {last_step})."
        return Insight(level="unknown", short="one checkpoint shows no trend", words=words)
    span = f"from {first:.4g} at step {first_step} to {final:.4g} at step {last_step}"
    few = f" (only {len(points)} checkpoints)" if len(points) < 4 else ""
    bounds, excellent = thresholds().trend, thresholds().mse["excellent"]
    steady, fallen = bounds["steady"], bounds["fallen"]
    falls = [later < earlier for (s, earlier), (t, later) in combinations(points, 2) if s < t]
    share = sum(falls) / len(falls)
    if share < steady and max(mse for _, mse in points) < excellent:
        words = f"Nothing is left to learn: the mse is below {excellent:g} at each step, {span}{few}."
        return Insight(level="good", short="the mse is excellent at every step", words=words)
    if share <= 1 - steady:
        words = f"No: the mse went {span}{few}."
        return Insight(level="bad", short="training does not work: the mse does not fall", words=words)
    if final > bounds["turned"] * min(mse for _, mse in points):
        return _turned(points)
    since = _level_since(points, bounds["gain"]) if final < fallen * first else None
    if since is not None and final >= excellent:
        words = f"It did: the mse fell {span}, but hardly any more since step {since}."
        return Insight(level="warn", short="training has levelled off", words=words)
    if since is None and (share < steady or final >= first):
        words = f"Unclear: the mse went {span}, up and down on the way{few}."
        return Insight(level="warn", short="it is unclear whether training works", words=words)
    if few and final >= fallen * first:
        words = f"Unclear yet: the mse fell {span}, {1 - final / first:.0%}{few}."
        return Insight(level="warn", short="too few checkpoints to tell whether training works", words=words)
    return Insight(level="good", short="training works", words=f"Yes: the mse fell {span}{few}.")


def _turned(points: Sequence[tuple[int, float]]) -> Insight:
    """The curve was much lower than it is: at the point before, which may be chance, or longer ago."""
    best_step, lowest = min(points, key=lambda point: point[1])
    last_step, final = points[-1]
    words = f"It did: the mse was lowest at step {best_step} ({lowest:.4g}), now {final:.4g}."
    if best_step == points[-2][0]:
        words = (
            f"Unclear: the mse was {lowest:.4g} at step {best_step} and is {final:.4g} at step {last_step}; one point."
        )
        return Insight(level="warn", short="the last checkpoint is worse than the one before", words=words)
    return Insight(level="warn", short="training has turned: the mse rises again", words=words)


def _level_since(points: Sequence[tuple[int, float]], gain: float) -> int | None:
    """The step since which no point is clearly closer, where at least the final third is so."""
    tail = len(points) // 3
    if tail < 2:
        return None
    lows = [mse for _, mse in points]
    until, after = list(accumulate(lows, min)), list(accumulate(reversed(lows), min))[::-1]
    level = [i for i in range(len(points) - tail) if after[i + 1] > gain * until[i]]
    return points[level[0]][0] if level else None


def working(series: Series) -> Insight:
    """Does the mse fall as training goes on?"""
    last = series.jobs[-1]
    if not any("mse" in job.metrics for job in series.jobs):
        if any("accuracy" in job.metrics for job in series.jobs):
            return transfers(series)
        return Insight(level="unknown", short="nothing was compared", words="Cannot tell: no mse was measured.")
    if last.metric("mse") is None:
        words = f"No: at step {last.step} there is no finite mse."
        return Insight(level="bad", short="the last checkpoint's logits are not finite", words=words)
    found = trend([(job.step or 0, mse) for job in series.jobs if (mse := job.metric("mse")) is not None])
    return _with_gaps(found, [job.step or 0 for job in series.jobs if job.metric("mse") is None])


def transfers(series: Series) -> Insight:
    """Do classifiers of later checkpoints tell more apart? By the interval of the difference of first and last."""
    first, last = series.jobs[0], series.jobs[-1]
    counts = [(job.metric("accuracy") or 0.0, int(job.metric("rows") or 0)) for job in (first, last)]
    (before, before_rows), (after, after_rows) = counts
    figures = f"accuracy {before:.3f} at step {first.step}, {after:.3f} at step {last.step}"
    if len(series.jobs) < 2:
        words = f"Cannot tell from one checkpoint: {figures.partition(',')[0]}."
        return Insight(level="unknown", short="one checkpoint", words=words)
    _, low, high = difference(round(after * after_rows), after_rows, round(before * before_rows), before_rows)
    between = f"{figures}; the difference is {100 * low:+.1f} to {100 * high:+.1f} points (95 %)"
    if low > 0:
        return Insight(level="good", short="later checkpoints transfer better", words=f"Yes: {between}.")
    if high < 0:
        return Insight(level="bad", short="later checkpoints transfer worse", words=f"No: {between}.")
    return Insight(level="warn", short="no difference between checkpoints is shown", words=f"Unclear: {between}.")


def _with_gaps(found: Insight, steps: Sequence[int]) -> Insight:
    """The answer, and at which `steps` there was no finite mse: a curve that passes over them is not all there is."""
    if not steps:
        return found
    words = f"{found.words} There is no finite mse at step{'s' if len(steps) > 1 else ''} {spell(steps)}."
    short = f"{found.short}, but not every checkpoint's logits are finite"
    return replace(found, level=_at_most_fair(found), short=short, words=words)


def ready(series: Series) -> Insight:
    """The last checkpoint's readiness, with its reason, the estimate and the rule of thumb."""
    verdict = series.jobs[-1].verdict
    if verdict is None and (overall := series.jobs[-1].overall) is not None:
        level = {"READY": "good", "NOT_READY": "bad"}.get(overall, "warn")
        return Insight(level=level, short=f"the checks say {overall}", words=f"The checks of task=test say {overall}.")
    if verdict is None:
        words = "No verdict: readiness is defined for NPT checkpoints compared with their base."
        return Insight(level="unknown", short="no verdict on readiness", words=words)
    readiness, reason = str(verdict.get("readiness")), str(verdict.get("reason"))
    since, last = _since(series.jobs, readiness), series.jobs[-1].step
    if series.jobs[-1].damaged:
        words = f"No: {series.jobs[-1].checkpoint} failed an integrity check, so its figures prove nothing."
        return Insight(level="bad", short="the last checkpoint failed an integrity check", words=words)
    if since != last:  # the reason's figures are those of the last step
        reason = f"at step {last}, {reason}"
    if readiness == "production":
        words = f"Yes, for production since step {since}: {reason}."
        return Insight(level="good", short="ready for production", words=words)
    words = f"For basic use since step {since}: {reason}."
    if readiness != "basic":
        words = f"Not yet at step {last}: {reason}."
    more = []
    if series.estimate is not None and not series.estimate.reached:
        more.append(f"Estimate: {series.estimate.words}")
    if readiness != "basic":
        more.append(f"Rule of thumb: {_lowered(str(verdict.get('remaining')))}.")
    level = "good" if readiness == "basic" else "warn"
    short = {"basic": "ready for basic use", "continue": "close, not ready yet"}.get(readiness, "not ready yet")
    return Insight(level=level, short=short, words=words, more=tuple(more))


def _since(jobs: Sequence[Job], readiness: str) -> int | None:
    """The step from which on every checkpoint is at least as ready."""
    enough = {"production": ("production",), "basic": ("production", "basic")}.get(readiness, ())
    since = jobs[-1].step
    for job in reversed(jobs):
        if job.damaged or job.judged("readiness") not in enough:
            break
        since = job.step
    return since


def worst_layer(series: Series) -> Insight:
    """The NPT layer that is furthest from its standard layer when it runs alone."""
    job = next((job for job in reversed(series.jobs) if job.layer_mses), None)
    if job is None:
        words = "Not measured: task=diagnose tier=full does it."
        return Insight(level="unknown", short="layers not measured", words=words)
    ranked = sorted(job.layer_mses.items(), key=lambda item: -item[1])
    (layer, mse), others = ranked[0], ranked[1:]
    bound = thresholds().layer_mse
    next_one = f" (next: layer {others[0][0]}, {others[0][1]:.4g})" if others else ""
    figure = f"layer {layer}, mse {mse:.4g} alone{next_one}, at step {job.step}"
    if mse < bound:
        words = f"None: each is good by itself (mse < {bound:g}). Furthest is {figure}."
        return Insight(level="good", short="no layer holds it back", words=words)
    bad = sum(value >= bound for _, value in ranked)
    words = f"{_raised(figure)}; {bad} of {len(ranked)} layers {'is' if bad == 1 else 'are'} not below {bound:g}."
    return Insight(level="warn", short=f"layer {layer} holds it back", words=words)


def best(series: Series) -> Insight:
    """The sound checkpoint with the lowest mse, and whether the next one is clearly worse."""
    return _best(series.jobs)


def _best(jobs: Sequence[Job]) -> Insight:
    damaged = [job for job in jobs if job.damaged]
    having = [job for job in jobs if job.metric("mse") is not None and not job.damaged]
    if not having and damaged:
        words = "Every checkpoint with a finite mse failed an integrity check."
        return Insight(level="bad", short="no best checkpoint: all are damaged", words=words)
    if not having:
        scored = [job for job in jobs if job.metric("accuracy") is not None and not job.damaged]
        if scored:
            top = max(scored, key=lambda job: job.metric("accuracy") or 0)
            words = f"{top.checkpoint}: accuracy {top.metric('accuracy'):.3f}."
            return Insight(level="good", short=f"{top.checkpoint} is best", words=words)
        return Insight(level="unknown", short="no best checkpoint", words="No checkpoint has a finite mse to go by.")
    first, *others = sorted(having, key=lambda job: job.metric("mse") or 0)
    status = f", {first.verdict.get('status')}" if first.verdict else ""
    words = f"{first.checkpoint}: {_figures(first)}{status}."
    if others:
        words += _runner_up(first, others[0])
    if damaged:
        names = ", ".join(dict.fromkeys(job.checkpoint for job in damaged))
        words += f" Left out, as an integrity check failed: {names}."
    return Insight(level="good", short=f"best is {first.checkpoint}", words=words)


def _runner_up(first: Job, second: Job) -> str:
    """Prompts are the independent units: a checkpoint that is closer on some of them is not clearly worse."""
    mses, others = first.prompt_mses, second.prompt_mses
    common = [prompt for prompt in mses if prompt in others]
    closer = sum(others[prompt] < mses[prompt] for prompt in common)
    if not closer:
        return ""
    name = f"{second.checkpoint} ({second.metric('mse'):.4g})"
    return f" {name} is closer on {closer} of {len(common)} prompts: not clearly worse."


def _figures(job: Job) -> str:
    """`mse 0.0421, cosine 0.9982`, as far as they are there."""
    found = [(name, job.metric(name), form) for name, form in (("mse", ".4g"), ("cosine", ".4f"))]
    return ", ".join(f"{name} {value:{form}}" for name, value, form in found if value is not None)


def _at_most_fair(found: Insight) -> str:
    """The level of what is only part of the answer."""
    return "warn" if found.level == "good" else found.level


def _lowered(text: str) -> str:
    return text[:1].lower() + text[1:]


def _raised(text: str) -> str:
    return text[:1].upper() + text[1:]


def headline(comparison: Comparison) -> Insight:
    """What the comparison comes to: the curve that is furthest along speaks, jobs without a result are named."""
    missing = lacking(comparison)
    if not comparison.done:
        return Insight(level="bad", short="no job left a result", words=f"No job left a result: {missing}.")
    found = _main_words(comparison)
    if failed := failed_checks(comparison):
        all_failed = all(job.outcome != "ok" for job in comparison.done)
        found = replace(found, level="bad" if all_failed else _at_most_fair(found), words=f"{found.words} {failed}.")
    if not missing:
        return found
    return replace(found, level=_at_most_fair(found), words=f"{found.words} {_raised(missing)}.")


def lacking(comparison: Comparison) -> str:
    """`1 of 8 jobs failed, 2 lost`, or `` where every job ended well."""
    counts = Counter(job.status for job in comparison.failures)
    parts = [f"{counts[status]} {word}" for status, word in _STATUS_WORDS.items() if counts[status]]
    return f"of {len(comparison.jobs)} jobs {', '.join(parts)}" if parts else ""


def failed_checks(comparison: Comparison) -> str:
    """`Checks failed in 3 of 8 jobs: keys (3), finite (1)`, or `` where none failed."""
    unsound = [job for job in comparison.done if job.outcome != "ok"]
    names = Counter(name for job in unsound for name in dict.fromkeys(job.failed_checks))
    which = ", ".join(f"{name} ({count})" if len(unsound) > 1 else name for name, count in names.most_common())
    of = f"{len(unsound)} of {len(comparison.jobs)} jobs"
    return f"Checks failed in {of}{f': {which}' if which else ''}" if unsound else ""


def _main_words(comparison: Comparison) -> Insight:
    if comparison.series:
        return _curve_words(comparison)
    count = len(comparison.done)
    if ranked := comparison.ranking:
        first, *others = ranked
        said = [f"{job.checkpoint} ({_figures(job)})" for job in ranked[:3]]
        found = _best(ranked)
        words = f"{_raised(found.short)}." if first.damaged else f"Closest is {said[0]}"
        if not first.damaged:
            words += f", then {', '.join(said[1:])}." if others else "."
        no_curve = " They are not checkpoints of one run, so there is no curve." if others else ""
        return Insight(level="unknown", short=f"closest is {first.checkpoint}", words=f"{words}{no_curve}")
    if all(job.passed is not None for job in comparison.done):
        bad = sum(job.outcome != "ok" for job in comparison.done)
        words = f"{count} job{'s' * (count > 1)} checked{'' if bad else ', no check failed'}."
        return Insight(level="warn" if bad else "good", short="checked", words=words)
    words = f"{count} jobs done; none has both a step and figures, so there is no curve."
    return Insight(level="unknown", short="no curve", words=words)


def _curve_words(comparison: Comparison) -> Insight:
    furthest = leading(comparison)
    found = insights(furthest)
    words = f"{found.working.short}; {found.ready.short}; {best_of_all(comparison)}."
    if len(comparison.series) > 1:
        words = f"Closest of {len(comparison.series)} curves is {furthest.label}: {_lowered(words)}"
    rank = ("good", "unknown", "warn", "bad")
    known = [insight.level for insight in (found.working, found.ready) if insight.level != "unknown"]
    return Insight(level=max(known, key=rank.index, default="unknown"), short=found.working.short, words=_raised(words))


def best_of_all(comparison: Comparison) -> str:
    """The sound checkpoint with the lowest mse, whichever curve it is on, or none, in a clause."""
    found = _best([*(job for series in comparison.series for job in series.jobs), *comparison.ranking]).short
    lows = {series.label: min(sound) for series in comparison.series if (sound := _sound_mses(series))}
    several = len(comparison.series) > 1 and lows
    return f"{found} of {min(lows, key=lambda label: lows[label])}" if several else found


def _sound_mses(series: Series) -> list[float]:
    return [mse for job in series.jobs if not job.damaged and (mse := job.metric("mse")) is not None]


def leading(comparison: Comparison) -> Series:
    """The series whose last checkpoint is sound and has the lowest mse; among equals the one with figures by layer."""

    def order(series: Series) -> tuple[bool, float, bool]:
        last = series.jobs[-1]
        mse = last.metric("mse")
        return last.damaged, float("inf") if mse is None else mse, not any("mse" in row for row in last.layers)

    return min(comparison.series, key=order)
