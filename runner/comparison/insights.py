"""What a curve says, in words: is training working, when is it ready, which layer holds it back, which is best.

Every sentence states the figures that it rests on, and says so where they are too few.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from runner.checkpoints.runs import spell
from runner.comparison.answer import Answer
from runner.comparison.jobs import Job
from runner.comparison.points import checkpoint_name, figures, layer_mses, prompt_mses
from runner.comparison.series import Series
from runner.comparison.thresholds import thresholds
from runner.comparison.trend import trend


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
