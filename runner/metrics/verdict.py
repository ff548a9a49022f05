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
    if mse is not None:
        for status, bound in thresholds.mse.items():
            if mse < bound:
                return status
    return "poor"


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
    readiness, reason = _readiness(mse, cosine, thresholds, layer_mses)
    said = _generation_words(generations, thresholds)
    return {
        "status": mse_status(mse, thresholds),
        "cosine_status": cosine_status(cosine, thresholds),
        "progress": percent,
        "remaining": remaining,
        "readiness": readiness,
        "reason": "; ".join([reason, *said]),
        "recommendation": _recommendation(mse, cosine, readiness, thresholds, layer_mses),
    }


def _readiness(
    mse: float | None, cosine: float | None, thresholds: Thresholds, layer_mses: Sequence[float | None] | None
) -> tuple[str, str]:
    if mse is None or cosine is None:
        return "early", "the logits are not finite"
    figures = f"mse {mse:.4g}, cosine {cosine:.4f}"
    excellent = mse < thresholds.mse["excellent"] and cosine > thresholds.cosine["excellent"]
    if excellent and layer_mses is None:
        return "basic", f"{figures}: both excellent, the layers by themselves not measured: run tier=full"
    if excellent and layer_mses:
        good = sum(value is not None and value < thresholds.layer_mse for value in layer_mses)
        share = f"{good} of {len(layer_mses)} layers good by themselves (mse < {thresholds.layer_mse:g})"
        if good / len(layer_mses) > thresholds.layer_share:
            return "production", f"{figures}, and {share}"
        return "basic", f"{figures}, but only {share}: production needs more than {thresholds.layer_share:.0%}"
    if mse < thresholds.mse["good"] and cosine > thresholds.cosine["good"]:
        return "basic", f"{figures}: under {thresholds.mse['good']:g} and over {thresholds.cosine['good']:g}"
    if mse < thresholds.close_mse and cosine > thresholds.close_cosine:
        return "continue", f"{figures}: close, not there yet"
    high_cosine = cosine > thresholds.cosine["good"]
    if mse >= thresholds.close_mse and high_cosine:
        return "early", f"{figures}: direction right, magnitude wrong"
    return "early", f"{figures}: far from the base model"


def _generation_words(generations: Sequence[Mapping[str, Any]], thresholds: Thresholds) -> list[str]:
    agreements = [g["agreement"] for g in generations if g.get("agreement") is not None]
    if not agreements:
        return []
    mean = sum(agreements) / len(agreements)
    words = [f"greedy continuations agree with the base's in {mean:.0%} of the tokens"]
    if mean < thresholds.generation_agreement:
        words[0] += f" (under {thresholds.generation_agreement:.0%})"
    extra = [
        g["repetition"] - g["reference_repetition"]
        for g in generations
        if g.get("repetition") is not None and g.get("reference_repetition") is not None
    ]
    if extra and max(extra) > thresholds.generation_repetition:
        words.append(f"they repeat themselves more than the base's (by up to {max(extra):.0%} of the 3-grams)")
    return words


def _recommendation(
    mse: float | None,
    cosine: float | None,
    readiness: str,
    thresholds: Thresholds,
    layer_mses: Sequence[float | None] | None,
) -> str:
    if mse is None or cosine is None:
        return "Look at the first layer with a value that is not finite (see the findings), and at the training before."
    if readiness == "production":
        return "Ready for use."
    if readiness == "basic":
        if mse < thresholds.mse["excellent"] and layer_mses is None:
            return "Run tier=full to see each layer by itself."
        return "Usable with minor limitations; fine-tuning can still bring it closer."
    if cosine < thresholds.cosine["moderate"]:
        return "Check the initialisation and the architecture: the outputs point in another direction."
    if mse >= thresholds.close_mse and cosine > thresholds.cosine["good"]:
        return "Direction right, magnitude wrong: more steps, and look at the learning rate."
    return "Continue training."
