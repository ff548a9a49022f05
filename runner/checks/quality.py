"""How close an NPT model comes to its base: what decides READY, PARTIALLY_READY or NOT_READY, and never fails a run.

Words for one comparison (those of the field's own scripts): PASS, WARNING or FAIL by its mse and its cosine, by the
bounds of conf/verdict.yaml. A check's score is the mean over what it compares (prompts, layers, depths) of
1 for PASS, 0.5 for WARNING and 0 for FAIL; that of generation is the share of tokens that agree with the base's, times
one minus what the model repeats more than the base does. The word of layers, progressive and generation follows from
the score, WARNING from the score on where each comparison is a WARNING. PASS is the status pass; both other words are
the status warning.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from runner.checks.check import skipped
from runner.checks.context import PASS, WARNING, CheckContext, Outcome
from runner.evaluation.evaluator import Evaluator
from runner.evaluation.forward import limits
from runner.metrics import layers as layer_measures
from runner.metrics.fidelity import summarise
from runner.metrics.verdict import judge, thresholds

TEMPERATURES = (0.1, 0.7, 1.0)
SCORES = {"PASS": 1.0, "WARNING": 0.5, "FAIL": 0.0}


def grade(mse: float | None, cosine: float | None) -> str:
    """PASS, WARNING or FAIL of one comparison; FAIL where a figure is not finite."""
    if mse is None or cosine is None:
        return "FAIL"
    bounds = thresholds().quality
    return next((word for word, at in bounds.items() if mse < at["mse"] and cosine > at["cosine"]), "FAIL")


def word_of(score: float) -> str:
    """PASS, WARNING or FAIL of several comparisons."""
    bounds = thresholds().quality_score
    return "PASS" if score > bounds["PASS"] else "WARNING" if score >= bounds["WARNING"] else "FAIL"


def fidelity(context: CheckContext, evaluator: Evaluator) -> Outcome:
    """Logits of the prompts against the base's."""
    compared = [evaluator.compare(ids) for ids in context.prompts()]
    figures = summarise(compared)
    rows = [{"mse": c.mse, "cosine": c.cosine} if c.finite else {"mse": None, "cosine": None} for c in compared]
    verdict = judge(figures["mse"], figures["cosine"], context.config.verdict)
    return _outcome(
        grade(figures["mse"], figures["cosine"]),
        _mean_score(rows),
        f"{_figures(figures)} over {len(rows)} prompts: {verdict['status']}, about {verdict['progress']} % trained",
        verdict["recommendation"],
        {**{name: figures.get(name) for name in ("mse", "cosine", "kl", "top1")}, "prompts": rows},
    )


def layers(context: CheckContext, evaluator: Evaluator) -> Outcome:
    """Each NPT layer alone, all others standard, on the layer prompt."""
    token_ids = context.prompt_ids(context.config.data.layer_prompt)
    reference, run = evaluator.layer_run(token_ids)
    rows = layer_measures.isolation(run, reference, token_ids, list(evaluator.switchable.npt_layers))
    score = _mean_score(rows)
    worst = max(rows, key=lambda row: math.inf if row["mse"] is None else row["mse"])
    poor = [str(row["layer"]) for row in rows if grade(row["mse"], row["cosine"]) == "FAIL"]
    return _outcome(
        word_of(score),
        score,
        f"{_counts(rows)} of {len(rows)} layers alone; worst is layer {worst['layer']}: {_figures(worst)}",
        f"Train further, by layer: {', '.join(poor)}." if poor else None,
        {"layers": rows},
    )


def progressive(context: CheckContext, evaluator: Evaluator) -> Outcome:
    """The lowest 1, 2, … n NPT layers together, on the layer prompt."""
    token_ids = context.prompt_ids(context.config.data.layer_prompt)
    reference, run = evaluator.layer_run(token_ids)
    rows = layer_measures.progressive(run, reference, token_ids, list(evaluator.switchable.npt_layers))
    score = _mean_score(rows)
    trend = layer_measures.trend([row["mse"] for row in rows])
    first_poor = next((row["count"] for row in rows if grade(row["mse"], row["cosine"]) == "FAIL"), None)
    return _outcome(
        word_of(score),
        score,
        f"{_counts(rows)} of {len(rows)} depths; all together: {_figures(rows[-1])}{f', {trend}' if trend else ''}",
        f"The error is large once the lowest {first_poor} of the NPT layers are active." if first_poor else None,
        {"progressive": rows},
    )


def generation(context: CheckContext, evaluator: Evaluator) -> Outcome:
    """Continuations of the prompts at temperatures 0.1, 0.7 and 1.0, from the same seed as the base's."""
    longest = limits(context.model)[1]
    rows = []
    for text in context.config.data.prompts:
        token_ids = context.prompt_ids(text)
        count = min(context.config.tier.new_tokens, (longest or 1 << 30) - len(token_ids))
        for temperature in TEMPERATURES if count > 0 else ():
            rows.append({"prompt": text, **evaluator.continuation(token_ids, count, temperature=temperature)})
    if not rows:
        return skipped(f"the prompts fill the model's {longest} positions")
    score = sum(map(_generation_score, rows)) / len(rows)
    by_temperature = [
        f"{fmean([row['agreement'] for row in rows if row['temperature'] == t]):.0%} at {t}" for t in TEMPERATURES
    ]
    word = word_of(score)
    return _outcome(
        word,
        score,
        f"tokens that agree with the base's: {', '.join(by_temperature)}; repeated 3-grams "
        f"{fmean([row['repetition'] or 0.0 for row in rows]):.0%}, the base's "
        f"{fmean([row['reference_repetition'] or 0.0 for row in rows]):.0%}",
        None if word == "PASS" else "Continuations part from the base's: train further.",
        {"generation": rows},
    )


def _generation_score(row: Mapping[str, Any]) -> float:
    extra = (row["repetition"] or 0.0) - (row["reference_repetition"] or 0.0)
    return float(row["agreement"] * (1 - max(0.0, extra)))


def _outcome(word: str, score: float, details: str, recommendation: str | None, data: Mapping[str, Any]) -> Outcome:
    return Outcome(
        status=PASS if word == "PASS" else WARNING,
        details=f"{word}: {details}",
        score=score,
        recommendation=recommendation,
        data=data,
    )


def _mean_score(rows: Sequence[Mapping[str, Any]]) -> float:
    return fmean([SCORES[grade(row["mse"], row["cosine"])] for row in rows])


def _counts(rows: Sequence[Mapping[str, Any]]) -> str:
    words = [grade(row["mse"], row["cosine"]) for row in rows]
    return ", ".join(f"{words.count(word)} {word}" for word in SCORES if word in words)


def _figures(row: Mapping[str, Any]) -> str:
    if row["mse"] is None or row["cosine"] is None:
        return "not finite"
    return f"mse {row['mse']:.4g}, cosine {row['cosine']:.4f}"
