"""The estimate of remaining steps: when a falling mse reaches a target, as an interval (spec/measures.md).

A power law and an exponential, each with a floor, are fitted to log mse (forecast_fit.py). A family that misses the
points by far more than they scatter is rejected; the interval is the union of those of the families that are left.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from runner.metrics.forecast_fit import (
    FAMILIES,
    LEAST_NOISE,
    PARAMETERS,
    Array,
    Region,
    coordinate,
    curve_band,
    f_quantile,
    fit,
    log_floor,
    reach,
    step_at,
)
from runner.metrics.forecast_series import Series, local_noise, reached, rejection_ratio, series_of

LEAST_POINTS = 6
# An upper end beyond this many times the last step is none.
HORIZON = 100.0
_BAND_POINTS = 80
_MOST_LOG = 700.0


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

    `learning_rates`, `changes`: see series_of; only the points since the last change are fitted. `band_steps`: where
    the band is wanted (positive); by default from the first point to a little beyond the latest finite estimate.
    The scatter of the figures is taken as independent from step to step: where it is not, intervals are too narrow.
    Raises ValueError for lengths that differ, a confidence outside (0, 1) and a target that is not positive.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must lie between 0 and 1")
    if any(not target > 0 for target in targets):
        raise ValueError(f"targets={list(targets)} must be positive")
    series = series_of(steps, mses, learning_rates, changes)
    at, y = np.array(series.steps), np.log(np.array(series.mses))
    regions: dict[str, Region] = {}
    noise, refusal, most = None, None, 0.0
    if len(at) < LEAST_POINTS:
        refusal = "too_few_points"
    else:
        noise = float(local_noise(at, y[None])[0])
        most = max(rejection_ratio(at) * noise, LEAST_NOISE)
        regions = {name: fit(y[None], coordinate(name, at, at), confidence) for name in FAMILIES}
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
    free = len(y) - PARAMETERS
    best = min(float(region.rss[0]) for region in regions.values())
    gain = float(((y - y.mean()) ** 2).sum()) - best
    if gain <= 2 * f_quantile(2, free, confidence) * max(best / free, LEAST_NOISE**2):
        return "not_falling"
    return None if any(_accepted(region, most) for region in regions.values()) else "no_fit"


def _family(name: str, region: Region, most: float) -> FamilyFit:
    lower, best, upper = (_exp(value[0]) for value in log_floor(region))
    return FamilyFit(
        name=name,
        accepted=_accepted(region, most),
        noise=float(region.noise[0]),
        floor=best,
        floor_lower=lower,
        floor_upper=upper,
    )


def _best(regions: dict[str, Region]) -> str:
    return min(regions, key=lambda name: float(regions[name].rss[0]))


def _estimate(series: Series, regions: dict[str, Region], target: float, refusal: str | None) -> TargetEstimate:
    step = reached(series, target)
    if step is not None:
        return TargetEstimate(target=target, status="reached", lower=step, best=step, upper=step)
    if refusal:
        return TargetEstimate(target=target, status=refusal)
    at = np.array(series.steps)
    bounds = {
        name: [float(step_at(name, at, x)[0]) for x in reach(region, math.log(target))]
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
    curves = {name: curve_band(region, coordinate(name, at, steps)) for name, region in regions.items()}
    return Band(
        steps=tuple(float(step) for step in steps),
        lower=_figures(np.min([curve[0][0] for curve in curves.values()], axis=0)),
        median=_figures(curves[_best(regions)][1][0]),
        upper=_figures(np.max([curve[2][0] for curve in curves.values()], axis=0)),
    )


def _figures(logs: Array) -> tuple[float, ...]:
    return tuple(_exp(value) for value in logs)


def _exp(log: float) -> float:
    """A positive finite figure, or the 0 of a floor that is not there."""
    return 0.0 if log == -math.inf else math.exp(min(max(log, -_MOST_LOG), _MOST_LOG))
