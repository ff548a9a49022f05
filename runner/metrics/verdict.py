"""From figures to words: status, progress, readiness; every threshold behind them stands in conf/verdict.yaml.

Progress and remaining work are a rule of thumb from the field; the estimate from a series of steps is another thing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypedDict

import yaml

from runner.installation import config_directory


class ProgressRow(TypedDict):
    """From this mse on: so much is done, and so much remains."""

    mse: float
    percent: int
    remaining: str


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """conf/verdict.yaml, which says what each is; names stand in the order in which they are tried."""

    mse: Mapping[str, float]
    cosine: Mapping[str, float]
    progress: Sequence[ProgressRow]
    layer_mse: float
    layer_share: float
    close_mse: float
    close_cosine: float
    generation_agreement: float
    generation_repetition: float
    trend: Mapping[str, float]
    quality: Mapping[str, Mapping[str, float]]
    quality_score: Mapping[str, float]
    overall: Mapping[str, float]


@cache
def thresholds() -> Thresholds:
    """Those of conf/verdict.yaml, for what runs without a composed config."""
    values = yaml.safe_load((config_directory() / "verdict.yaml").read_text(encoding="utf-8"))
    return Thresholds(**{key: value for key, value in values.items() if key != "_target_"})


def mse_status(mse: float | None, thresholds: Thresholds) -> str:
    """excellent, good, fair or poor; poor where the mse is not finite."""
    return next((status for status, bound in thresholds.mse.items() if mse is not None and mse < bound), "poor")


def cosine_status(cosine: float | None, thresholds: Thresholds) -> str:
    """excellent, good, moderate or poor; poor where the cosine is undefined. Each bound but the first is inclusive."""
    if cosine is not None:
        for number, (status, bound) in enumerate(thresholds.cosine.items()):
            if cosine > bound or (number > 0 and cosine == bound):
                return status
    return "poor"


def progress(mse: float | None, thresholds: Thresholds) -> tuple[int, str]:
    """Percent done and the remaining work in words."""
    for row in thresholds.progress:
        if mse is None or mse >= row["mse"]:
            return row["percent"], row["remaining"]
    raise ValueError("the last row of verdict.progress must begin at mse 0")


def judge(
    mse: float | None,
    cosine: float | None,
    thresholds: Thresholds,
    *,
    layer_mses: Sequence[float | None] | None = None,
    generations: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """The verdict of the result contract.

    `layer_mses`: the isolated mse of each NPT layer, None where the tier did not measure them: then readiness is
    at most basic. `generations`: greedy continuations with `agreement` and `repetition`, part of the reason.
    """
    percent, remaining = progress(mse, thresholds)
    readiness, reason, recommendation = _readiness(mse, cosine, thresholds, layer_mses)
    return {
        "status": mse_status(mse, thresholds),
        "cosine_status": cosine_status(cosine, thresholds),
        "progress": percent,
        "remaining": remaining,
        "readiness": readiness,
        "reason": "; ".join([reason, *_generation_words(generations, thresholds)]),
        "recommendation": recommendation,
    }


def _readiness(
    mse: float | None, cosine: float | None, thresholds: Thresholds, layer_mses: Sequence[float | None] | None
) -> tuple[str, str, str]:
    """Readiness, the reason for it, and what to do."""
    if mse is None or cosine is None:
        advice = (
            "Look at the first layer with a value that is not finite (see the findings), and at the training before."
        )
        return "early", "the logits are not finite", advice
    figures = f"mse {mse:.4g}, cosine {cosine:.4f}"
    low, high = thresholds.mse, thresholds.cosine
    usable = "Usable with minor limitations; fine-tuning can still bring it closer."
    if layer_mses is None and mse < low["excellent"]:
        usable = "Run tier=full to see each layer by itself."
    if mse < low["excellent"] and cosine > high["excellent"]:
        if layer_mses is None:
            return "basic", f"{figures}: both excellent, the layers by themselves not measured: run tier=full", usable
        if layer_mses:
            good = sum(value is not None and value < thresholds.layer_mse for value in layer_mses)
            share = f"{good} of {len(layer_mses)} layers good by themselves (mse < {thresholds.layer_mse:g})"
            if good / len(layer_mses) > thresholds.layer_share:
                return "production", f"{figures}, and {share}", "Ready for use."
            needed = f"production needs more than {thresholds.layer_share:.0%}"
            return "basic", f"{figures}, but only {share}: {needed}", usable
    if mse < low["good"] and cosine > high["good"]:
        return "basic", f"{figures}: under {low['good']:g} and over {high['good']:g}", usable
    magnitude = mse >= thresholds.close_mse and cosine > high["good"]
    if cosine < high["moderate"]:
        advice = "Check the initialisation and the architecture: the outputs point in another direction."
    elif magnitude:
        advice = "Direction right, magnitude wrong: more steps, and look at the learning rate."
    else:
        advice = "Continue training."
    if mse < thresholds.close_mse and cosine > thresholds.close_cosine:
        return "continue", f"{figures}: close, not there yet", advice
    return (
        "early",
        f"{figures}: {'direction right, magnitude wrong' if magnitude else 'far from the base model'}",
        advice,
    )


def _generation_words(generations: Sequence[Mapping[str, Any]], thresholds: Thresholds) -> list[str]:
    agreements = [g["agreement"] for g in generations if g.get("agreement") is not None]
    if not agreements:
        return []
    mean = sum(agreements) / len(agreements)
    words = [f"greedy continuations agree with the base's in {mean:.0%} of the tokens"]
    if mean < thresholds.generation_agreement:
        words[0] += f" (under {thresholds.generation_agreement:.0%})"
    pairs = [(g.get("repetition"), g.get("reference_repetition")) for g in generations]
    extra = [own - other for own, other in pairs if own is not None and other is not None]
    if extra and max(extra) > thresholds.generation_repetition:
        words.append(f"they repeat themselves more than the base's (by up to {max(extra):.0%} of the 3-grams)")
    return words
