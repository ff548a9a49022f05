"""The estimate of remaining steps: when a falling mse reaches a target, as an interval and in words.

A power law and an exponential, each with a floor, are fitted to log mse (forecast_fit.py). A family that misses the
points by far more than they scatter is rejected; the interval is the union of those of the families that are left.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from runner.metrics import forecast_fit as curves
from runner.metrics.forecast_fit import Array, MeasuredPoints, Region

LEAST_POINTS = 6
# An upper end beyond this many times the last step is none.
HORIZON = 100.0
_BAND_POINTS = 80
_MOST_LOG = 700.0
_REFUSAL_WORDS = {
    "not_falling": "not estimated: the mse is not falling (no falling curve describes it better than a constant)",
    "no_fit": "not estimated: neither a power law nor an exponential with a floor fits these points",
}


@dataclass(frozen=True, kw_only=True)
class FamilyFit:
    """One family on one series. `noise`: residual standard deviation of log mse; the floor as an interval (mse)."""

    name: str
    accepted: bool
    noise: float
    floor: float
    floor_lower: float
    floor_upper: float


@dataclass(frozen=True, kw_only=True)
class TargetEstimate:
    """When one target is reached, in steps since the start of training.

    `status`: reached (at `lower` = `best` = `upper`), between (`lower` and `upper`), at_least (`lower`; no upper end),
    not_reached (the floor of the best fit is above the target; `lower`, where not None, is the earliest if at all),
    too_few_points, not_falling, no_fit. A bound that does not exist, or lies beyond HORIZON, is None.
    """

    target: float
    status: str
    lower: float | None = None
    best: float | None = None
    upper: float | None = None


@dataclass(frozen=True, kw_only=True)
class Band:
    """The curve for a plot: mse at `steps`; lower and upper hold the true curve at each step with the confidence."""

    steps: tuple[float, ...]
    lower: tuple[float, ...]
    median: tuple[float, ...]
    upper: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """The estimate for one series; `dataclasses.asdict` of it is JSON.

    `points`: how many the fits use; `last_step`: of the last figure; `since`: where the training last changed, if it
    did; `noise`: the local scatter of log mse, None without a fit; `refusal`: the status of every target that is not
    reached, where no curve was believed, and then `band` is None; `notes`: points left out, and why.
    """

    confidence: float
    points: int
    last_step: float | None
    since: float | None
    noise: float | None
    families: tuple[FamilyFit, ...]
    targets: tuple[TargetEstimate, ...]
    refusal: str | None
    band: Band | None
    notes: tuple[str, ...]


def forecast(
    steps: Sequence[float | None],
    mses: Sequence[float | None],
    targets: Sequence[float],
    *,
    learning_rates: Sequence[float | None] | None = None,
    changes: Sequence[float] = (),
    confidence: float = 0.9,
    band_steps: Sequence[float] | None = None,
) -> Forecast:
    """Fit the series, and say for each target when it is reached.

    `learning_rates`, `changes`: see points_of; only the points since the last change are fitted. `band_steps`: where
    the band is wanted (positive); by default from the first point to a little beyond the latest finite estimate.
    The scatter of the figures is taken as independent from step to step: where it is not, intervals are too narrow.
    Raises ValueError for lengths that differ, a confidence outside (0, 1) and a target that is not positive.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must lie between 0 and 1")
    if any(not target > 0 for target in targets):
        raise ValueError(f"targets={list(targets)} must be positive")
    series = curves.points_of(steps, mses, learning_rates, changes)
    at, y = np.array(series.steps), np.log(np.array(series.mses))
    regions: dict[str, Region] = {}
    noise, refusal, most = None, None, 0.0
    if len(at) < LEAST_POINTS:
        refusal = "too_few_points"
    else:
        noise = float(curves.local_noise(at, y[None])[0])
        most = max(curves.rejection_ratio(at) * noise, curves.LEAST_NOISE)
        regions = {name: curves.fit(y[None], curves.coordinate(name, at, at), confidence) for name in curves.FAMILIES}
        refusal = _refusal(y, regions, most, confidence)
    kept = {} if refusal else {name: region for name, region in regions.items() if _accepted(region, most)}
    found = tuple(_estimate(series, kept, target, refusal) for target in targets)
    if kept and band_steps is None:
        band_steps = _band_steps(at, found)
    return Forecast(
        confidence=confidence,
        points=len(at),
        last_step=series.seen_steps[-1] if series.seen_steps else None,
        since=series.since,
        noise=noise,
        families=tuple(_family(name, region, most) for name, region in regions.items()),
        targets=found,
        refusal=refusal,
        band=_band(at, kept, np.array(band_steps)) if kept and band_steps is not None else None,
        notes=series.notes,
    )


def _accepted(region: Region, most: float) -> bool:
    return bool(region.noise[0] <= most)


def _refusal(y: Array, regions: dict[str, Region], most: float, confidence: float) -> str | None:
    """Why no step is named: a constant describes the points as well, or no family describes them."""
    free = len(y) - curves.PARAMETERS
    best = min(float(region.rss[0]) for region in regions.values())
    gain = float(((y - y.mean()) ** 2).sum()) - best
    if gain <= 2 * curves.f_quantile(2, free, confidence) * max(best / free, curves.LEAST_NOISE**2):
        return "not_falling"
    return None if any(_accepted(region, most) for region in regions.values()) else "no_fit"


def _family(name: str, region: Region, most: float) -> FamilyFit:
    lower, best, upper = (_exp(value[0]) for value in curves.log_floor(region))
    noise, accepted = float(region.noise[0]), _accepted(region, most)
    return FamilyFit(name=name, accepted=accepted, noise=noise, floor=best, floor_lower=lower, floor_upper=upper)


def _best(regions: dict[str, Region]) -> str:
    return min(regions, key=lambda name: float(regions[name].rss[0]))


def _estimate(series: MeasuredPoints, regions: dict[str, Region], target: float, refusal: str | None) -> TargetEstimate:
    step = curves.reached(series, target)
    if step is not None:
        return TargetEstimate(target=target, status="reached", lower=step, best=step, upper=step)
    if refusal:
        return TargetEstimate(target=target, status=refusal)
    at = np.array(series.steps)
    bounds = {
        name: [float(curves.step_at(name, at, x)[0]) for x in curves.reach(region, math.log(target))]
        for name, region in regions.items()
    }
    most = HORIZON * series.steps[-1]
    lower, best, upper = (
        value if value <= most else None
        for value in (min(b[0] for b in bounds.values()), bounds[_best(regions)][1], max(b[2] for b in bounds.values()))
    )
    status = "not_reached" if best is None else "at_least" if upper is None else "between"
    return TargetEstimate(target=target, status=status, lower=lower, best=best, upper=upper)


def _band_steps(at: Array, found: Sequence[TargetEstimate]) -> Sequence[float]:
    ends = [step for estimate in found for step in (estimate.best, estimate.upper) if step is not None]
    end = min(max([1.2 * step for step in ends] + [1.5 * at[-1]]), 4 * at[-1])
    return list(np.linspace(at[0], end, _BAND_POINTS))


def _band(at: Array, regions: dict[str, Region], steps: Array) -> Band:
    bands = {name: curves.curve_band(region, curves.coordinate(name, at, steps)) for name, region in regions.items()}
    return Band(
        steps=tuple(float(step) for step in steps),
        lower=_figures(np.min([band[0][0] for band in bands.values()], axis=0)),
        median=_figures(bands[_best(regions)][1][0]),
        upper=_figures(np.max([band[2][0] for band in bands.values()], axis=0)),
    )


def _figures(logs: Array) -> tuple[float, ...]:
    return tuple(_exp(value) for value in logs)


def _exp(log: float) -> float:
    """A positive finite figure, or the 0 of a floor that is not there."""
    return 0.0 if log == -math.inf else math.exp(min(max(log, -_MOST_LOG), _MOST_LOG))


def sentence(forecast: Forecast, estimate: TargetEstimate) -> str:
    """What is known about when the mse falls below one target: "mse < 0.1: between steps 34,000 and 46,000, …"."""
    return f"mse < {estimate.target:g}: {_answer(forecast, estimate)}."


def _answer(forecast: Forecast, estimate: TargetEstimate) -> str:
    if estimate.status == "reached":
        return f"reached at step {estimate.best:,.0f}"
    if estimate.status == "too_few_points":
        where = f" since the training changed before step {forecast.since:,.0f}" if forecast.since is not None else ""
        return f"too few points ({forecast.points}{where}; an estimate needs {LEAST_POINTS})"
    if estimate.status in _REFUSAL_WORDS:
        return _REFUSAL_WORDS[estimate.status]
    if estimate.status == "not_reached":
        return _not_reached(forecast, estimate)
    now = forecast.last_step or 0.0
    lower = estimate.lower or 0.0
    best = "?" if estimate.best is None else f"{float(f'{estimate.best:.3g}'):,.0f}"
    guess = f"best fit at step {best}, {forecast.confidence:.0%} interval"
    if estimate.upper is None:
        if lower <= now:
            return f"no bound on the remaining steps: soon, late or never ({guess} without ends)"
        more = _down(lower - now)
        return f"≥ {_more_steps(more)}, not before step {now + more:,.0f} ({guess} without an upper end)"
    if estimate.upper <= now:
        return f"met by step {_up(estimate.upper):,.0f} on this fit, though the last figure is not below it ({guess})"
    # The remainder is rounded, and the step follows from it: people subtract one from the other.
    most = _up(estimate.upper - now)
    if lower <= now:
        return f"at most {_more_steps(most)}, by step {now + most:,.0f} ({guess})"
    least = _down(lower - now)
    return f"between steps {now + least:,.0f} and {now + most:,.0f}, {least:,.0f} to {most:,.0f} more ({guess})"


def _not_reached(forecast: Forecast, estimate: TargetEstimate) -> str:
    best = min((family for family in forecast.families if family.accepted), key=lambda family: family.noise)
    words = f"not reached on this fit, which levels off at {best.floor:.3g}"
    if best.floor < estimate.target:
        words = "not reached on this fit, which falls too slowly"
    now = forecast.last_step or 0.0
    if estimate.lower is None:
        return words
    if estimate.lower <= now:
        return f"{words}, though the points allow it at any step"
    return f"{words}; if at all, ≥ {_more_steps(_down(estimate.lower - now))}"


def _more_steps(more: float) -> str:
    return f"{more:,.0f} more step{'' if more == 1 else 's'}"


def _down(value: float) -> float:
    unit = _unit(value)
    return math.floor(value / unit) * unit


def _up(value: float) -> float:
    unit = _unit(value)
    return math.ceil(value / unit) * unit


def _unit(value: float) -> float:
    """The place of the third digit: steps are whole, and an interval has no more digits than that."""
    return 10.0 ** max(math.floor(math.log10(value)) - 2, 0) if value > 0 else 1.0
