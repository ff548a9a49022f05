"""The score of the estimate of remaining steps on points that it did not see: an instrument of the tests."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from runner.metrics import forecast_fit as curves
from runner.metrics.forecast import LEAST_POINTS, Forecast, TargetEstimate, forecast
from runner.metrics.forecast_fit import MeasuredPoints

_LEAST_HELD = 2


@dataclass(frozen=True, kw_only=True)
class HeldPoint:
    """One point that the fit did not see; `lower` to `upper` is where a measured mse was expected."""

    step: float
    mse: float
    lower: float
    predicted: float
    upper: float


@dataclass(frozen=True, kw_only=True)
class HeldTarget:
    """A target that the fitted part had not reached. `seen`: the step at which the series did, or None.

    `held`: whether the interval agrees with that; where it was not seen, whether the interval goes on to or beyond the
    last step.
    """

    estimate: TargetEstimate
    seen: float | None
    held: bool


@dataclass(frozen=True, kw_only=True)
class Backtest:
    """The score. `refusal`: why there is none, else None.

    `inside`: share of the held points within their bounds; `typical_error`: the mean of |log(measured/predicted)| as a
    ratio less one (0.1 is 10 %); `bias`: measured over predicted, as a geometric mean (above 1: it promised too much).
    """

    refusal: str | None = None
    fitted_points: int = 0
    fitted_until: float | None = None
    points: tuple[HeldPoint, ...] = ()
    inside: float | None = None
    typical_error: float | None = None
    bias: float | None = None
    targets: tuple[HeldTarget, ...] = ()


def backtest(
    steps: Sequence[float | None],
    mses: Sequence[float | None],
    targets: Sequence[float],
    *,
    share: float = 0.6,
    learning_rates: Sequence[float | None] | None = None,
    changes: Sequence[float] = (),
    confidence: float = 0.9,
) -> Backtest:
    """Fit the first `share` of the points (at least six), hold the others (at least two) against the prediction.

    The other arguments are those of `forecast`. Raises ValueError as it does, and for a share outside (0, 1).
    """
    if not 0 < share < 1:
        raise ValueError(f"share={share} must lie between 0 and 1")
    series = curves.points_of(steps, mses, learning_rates, changes)
    first = max(LEAST_POINTS, math.ceil(share * len(series.steps)))
    rest = len(series.steps) - first
    if rest < _LEAST_HELD:
        needed = LEAST_POINTS + _LEAST_HELD
        return Backtest(refusal=f"too few points ({len(series.steps)}; a back-test needs {needed})")
    known = forecast(
        series.steps[:first], series.mses[:first], targets, confidence=confidence, band_steps=series.steps[first:]
    )
    if known.refusal is not None:
        why = "is not falling" if known.refusal == "not_falling" else "fits neither family"
        return Backtest(refusal=f"the first part {why}", fitted_points=first, fitted_until=series.steps[first - 1])
    points = _held_points(series, first, known)
    errors = np.array([math.log(point.mse / point.predicted) for point in points])
    return Backtest(
        fitted_points=first,
        fitted_until=series.steps[first - 1],
        points=points,
        inside=float(np.mean([point.lower <= point.mse <= point.upper for point in points])),
        typical_error=float(np.expm1(np.abs(errors).mean())),
        bias=float(np.exp(errors.mean())),
        targets=tuple(_held_target(series, e) for e in known.targets if e.status != "reached"),
    )


def _held_points(series: MeasuredPoints, first: int, known: Forecast) -> tuple[HeldPoint, ...]:
    """The band holds the curve; a measured point also scatters around it, so the two widths add as squares."""
    assert known.band is not None
    scatter = min(family.noise for family in known.families if family.accepted)
    scatter *= math.sqrt(curves.f_quantile(1, first - curves.PARAMETERS, known.confidence))
    band = known.band
    rows = zip(band.steps, series.mses[first:], band.lower, band.median, band.upper, strict=True)
    return tuple(
        HeldPoint(
            step=step,
            mse=mse,
            lower=middle * math.exp(-math.hypot(math.log(middle / lower), scatter)),
            predicted=middle,
            upper=middle * math.exp(math.hypot(math.log(upper / middle), scatter)),
        )
        for step, mse, lower, middle, upper in rows
    )


def _held_target(series: MeasuredPoints, estimate: TargetEstimate) -> HeldTarget:
    """The curve meets its target after the last step before any figure below it, and by the first that stays below."""
    lower = math.inf if estimate.lower is None else estimate.lower
    upper = math.inf if estimate.upper is None else estimate.upper
    seen = curves.reached(series, estimate.target)
    if seen is None:
        return HeldTarget(estimate=estimate, seen=None, held=upper >= series.steps[-1])
    points = list(zip(series.seen_steps, series.seen, strict=True))
    first_below = next(step for step, mse in points if mse < estimate.target)
    before = max((step for step, _ in points if step < first_below), default=0.0)
    return HeldTarget(estimate=estimate, seen=seen, held=lower <= seen and upper >= before)
