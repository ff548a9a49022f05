"""The estimate of the remaining steps of a series, as the comparison shows it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from runner.metrics.verdict import thresholds


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """When the thresholds are reached.

    `words`: for each threshold of the mse that is not reached yet, or why that cannot be said; `reached`: whether the
    last figure is below all of them. `band`: (step, lower, median, upper) of the mse, empty where nothing was fitted.
    `details`: the whole estimate (runner/metrics/forecast.py) as plain JSON values.
    """

    words: str
    reached: bool = False
    band: tuple[tuple[float, float, float, float], ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)


def estimate(
    steps: Sequence[int], mses: Sequence[float | None], rates: Sequence[float | None] | None = None
) -> Estimate:
    """The estimate for a series of (step, mse), steps ascending; a mse that is not finite is None.

    `rates`: the learning rate of each point where it is known; only the points since its last change are fitted.
    """
    # numpy, which only a comparison needs.
    from runner.metrics.forecast import forecast, sentence

    found = forecast(steps, mses, sorted(thresholds().mse.values(), reverse=True), learning_rates=rates)
    open_targets = [target for target in found.targets if target.status != "reached"] or found.targets[-1:]
    band = found.band
    reached = all(target.status == "reached" for target in found.targets)
    return Estimate(
        words=_together([sentence(found, target) for target in open_targets]),
        reached=reached,
        band=tuple(zip(band.steps, band.lower, band.median, band.upper, strict=True)) if band else (),
        details=asdict(found),
    )


def _together(sentences: Sequence[str]) -> str:
    """`mse < 0.1, mse < 0.05: too few points.`: targets of which the same is said share the words."""
    groups: dict[str, list[str]] = {}
    for text in sentences:
        target, _, rest = text.partition(": ")
        groups.setdefault(rest, []).append(target)
    return " ".join(f"{', '.join(targets)}: {rest}" for rest, targets in groups.items())
