"""What a curve says, in words: is training working, when is it ready, which layer holds it back, which is best.

Every sentence states the figures that it rests on, and says so where they are too few.

One answer to a question about a sweep.

The one sentence at the top of a comparison.

Whether a curve falls: told from its points alone, and no more than they show.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, combinations

from runner.checkpoints.runs import spell
from runner.comparison.comparison import Comparison
from runner.comparison.jobs import Job
from runner.comparison.points import checkpoint_name, figures, layer_mses, prompt_mses
from runner.comparison.series import Series
from runner.metrics.verdict import thresholds


@dataclass(frozen=True, kw_only=True)
class Answer:
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


# Of all pairs of checkpoints, the share in which the later one is closer: above it the curve falls, below 1 − it not.
_STEADY = 0.75
# What is not this much closer than all before it has levelled off.
_GAIN = 0.95
# The last checkpoint is worse than the best one by more than this factor: the curve has turned.
_TURNED = 1.5
# Below this share of the first mse a curve has fallen, however flat it is now, and however few its points are.
_FALLEN = 0.8


def trend(points: Sequence[tuple[int, float]]) -> Answer:
    """Whether the mse of (step, mse) `points`, steps ascending, falls."""
    (first_step, first), (last_step, final) = points[0], points[-1]
    if first_step == last_step:
        words = f"Cannot tell from one checkpoint (step {last_step})."
        return Answer(level="unknown", short="one checkpoint shows no trend", words=words)
    span = f"from {first:.4g} at step {first_step} to {final:.4g} at step {last_step}"
    few = f" (only {len(points)} checkpoints)" if len(points) < 4 else ""
    share = _falling_share(points)
    excellent = thresholds().mse["excellent"]
    if share < _STEADY and max(mse for _, mse in points) < excellent:
        words = f"Nothing is left to learn: the mse is below {excellent:g} at each step, {span}{few}."
        return Answer(level="good", short="the mse is excellent at every step", words=words)
    if share <= 1 - _STEADY:
        words = f"No: the mse went {span}{few}."
        return Answer(level="bad", short="training does not work: the mse does not fall", words=words)
    if final > _TURNED * min(mse for _, mse in points):
        return _turned(points)
    since = _level_since(points) if final < _FALLEN * first else None
    if since is not None and final >= excellent:
        words = f"It did: the mse fell {span}, but hardly any more since step {since}."
        return Answer(level="warn", short="training has levelled off", words=words)
    if since is None and (share < _STEADY or final >= first):
        words = f"Unclear: the mse went {span}, up and down on the way{few}."
        return Answer(level="warn", short="it is unclear whether training works", words=words)
    if few and final >= _FALLEN * first:
        words = f"Unclear yet: the mse fell {span}, {1 - final / first:.0%}{few}."
        return Answer(level="warn", short="too few checkpoints to tell whether training works", words=words)
    return Answer(level="good", short="training works", words=f"Yes: the mse fell {span}{few}.")


def _falling_share(points: Sequence[tuple[int, float]]) -> float:
    """Of all pairs of points at different steps, the share in which the later one is lower."""
    falls = [later < earlier for (s, earlier), (t, later) in combinations(points, 2) if s < t]
    return sum(falls) / len(falls)


def _turned(points: Sequence[tuple[int, float]]) -> Answer:
    """The curve was much lower than it is: at the point before, which may be chance, or longer ago."""
    best_step, lowest = min(points, key=lambda point: point[1])
    last_step, final = points[-1]
    words = f"It did: the mse was lowest at step {best_step} ({lowest:.4g}), now {final:.4g}."
    if best_step == points[-2][0]:
        words = (
            f"Unclear: the mse was {lowest:.4g} at step {best_step} and is {final:.4g} at step {last_step}; one point."
        )
        return Answer(level="warn", short="the last checkpoint is worse than the one before", words=words)
    return Answer(level="warn", short="training has turned: the mse rises again", words=words)


def _level_since(points: Sequence[tuple[int, float]]) -> int | None:
    """The step since which no point is clearly closer, where at least the final third is so."""
    tail = len(points) // 3
    if tail < 2:
        return None
    lows = [mse for _, mse in points]
    until, after = list(accumulate(lows, min)), list(accumulate(reversed(lows), min))[::-1]
    level = [i for i in range(len(points) - tail) if after[i + 1] > _GAIN * until[i]]
    return points[level[0]][0] if level else None


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The four answers for one series."""

    working: Answer
    ready: Answer
    layer: Answer
    best: Answer


def answers(series: Series) -> Answers:
    """What the points of `series` say."""
    return Answers(working=working(series), ready=ready(series), layer=worst_layer(series), best=best(series))


def working(series: Series) -> Answer:
    """Does the mse fall as training goes on?"""
    last = series.jobs[-1]
    if not any("mse" in job.metrics for job in series.jobs):
        return Answer(level="unknown", short="nothing was compared", words="Cannot tell: no mse was measured.")
    if last.metric("mse") is None:
        return Answer(
            level="bad",
            short="the last checkpoint's logits are not finite",
            words=f"No: at step {last.step} there is no finite mse.",
        )
    found = trend([(job.step or 0, mse) for job in series.jobs if (mse := job.metric("mse")) is not None])
    return _with_gaps(found, [job.step or 0 for job in series.jobs if job.metric("mse") is None])


def _with_gaps(found: Answer, steps: Sequence[int]) -> Answer:
    """The answer, and at which `steps` there was no finite mse: a curve that passes over them is not all there is."""
    if not steps:
        return found
    words = f"{found.words} There is no finite mse at step{'s' if len(steps) > 1 else ''} {spell(steps)}."
    level = "warn" if found.level == "good" else found.level
    return replace(
        found, level=level, short=f"{found.short}, but not every checkpoint's logits are finite", words=words
    )


def ready(series: Series) -> Answer:
    """The last checkpoint's readiness, with its reason, the estimate and the rule of thumb."""
    verdict = series.jobs[-1].verdict
    if verdict is None and (overall := series.jobs[-1].overall) is not None:
        level = {"READY": "good", "NOT_READY": "bad"}.get(overall, "warn")
        return Answer(level=level, short=f"the checks say {overall}", words=f"The checks of task=test say {overall}.")
    if verdict is None:
        return Answer(
            level="unknown",
            short="no verdict on readiness",
            words="No verdict: readiness is defined for NPT checkpoints compared with their base.",
        )
    readiness, reason = str(verdict.get("readiness")), str(verdict.get("reason"))
    since = _since(series.jobs, readiness)
    if readiness == "production":
        return Answer(
            level="good", short="ready for production", words=f"Yes, for production since step {since}: {reason}."
        )
    words = f"For basic use since step {since}: {reason}." if readiness == "basic" else f"Not yet: {reason}."
    more = []
    if series.estimate is not None and not series.estimate.reached:
        more.append(f"Estimate: {series.estimate.words}")
    if readiness != "basic":
        more.append(f"Rule of thumb: {_lowered(str(verdict.get('remaining')))}.")
    level = "good" if readiness == "basic" else "warn"
    short = {"basic": "ready for basic use", "continue": "close, not ready yet"}.get(readiness, "not ready yet")
    return Answer(level=level, short=short, words=words, more=tuple(more))


def _since(jobs: Sequence[Job], readiness: str) -> int | None:
    """The step from which on every checkpoint is at least as ready."""
    enough = {"production": ("production",), "basic": ("production", "basic")}.get(readiness, ())
    since = jobs[-1].step
    for job in reversed(jobs):
        if (job.verdict or {}).get("readiness") not in enough:
            break
        since = job.step
    return since


def worst_layer(series: Series) -> Answer:
    """The NPT layer that is furthest from its standard layer when it runs alone."""
    job = next((job for job in reversed(series.jobs) if layer_mses(job)), None)
    if job is None:
        return Answer(
            level="unknown", short="layers not measured", words="Not measured: task=diagnose tier=full does it."
        )
    ranked = sorted(layer_mses(job).items(), key=lambda item: -item[1])
    (layer, mse), others = ranked[0], ranked[1:]
    bound = thresholds().layer_mse
    next_one = f" (next: layer {others[0][0]}, {others[0][1]:.4g})" if others else ""
    figure = f"layer {layer}, mse {mse:.4g} alone{next_one}, at step {job.step}"
    if mse < bound:
        return Answer(
            level="good",
            short="no layer holds it back",
            words=f"None: each is good by itself (mse < {bound:g}). Furthest is {figure}.",
        )
    bad = sum(value >= bound for _, value in ranked)
    return Answer(
        level="warn",
        short=f"layer {layer} holds it back",
        words=f"{_raised(figure)}; {bad} of {len(ranked)} layers {'is' if bad == 1 else 'are'} not below {bound:g}.",
    )


def best(series: Series) -> Answer:
    """The checkpoint with the lowest mse, and whether the next one is clearly worse."""
    ranked = sorted(
        (job for job in series.jobs if job.metric("mse") is not None), key=lambda job: job.metric("mse") or 0
    )
    if not ranked:
        return Answer(level="unknown", short="no best checkpoint", words="No checkpoint has a finite mse to go by.")
    first = ranked[0]
    status = f", {first.verdict.get('status')}" if first.verdict else ""
    words = f"{checkpoint_name(first)}: {figures(first)}{status}."
    if len(ranked) > 1:
        words += _runner_up(first, ranked[1])
    return Answer(level="good", short=f"best is {checkpoint_name(first)}", words=words)


def _runner_up(first: Job, second: Job) -> str:
    """Prompts are the independent units: a checkpoint that is closer on some of them is not clearly worse."""
    mses, others = prompt_mses(first), prompt_mses(second)
    common = [prompt for prompt in mses if prompt in others]
    closer = sum(others[prompt] < mses[prompt] for prompt in common)
    if not closer:
        return ""
    name = f"{checkpoint_name(second)} ({second.metric('mse'):.4g})"
    return f" {name} is closer on {closer} of {len(common)} prompts: not clearly worse."


def _lowered(text: str) -> str:
    return text[:1].lower() + text[1:]


def _raised(text: str) -> str:
    return text[:1].upper() + text[1:]


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
