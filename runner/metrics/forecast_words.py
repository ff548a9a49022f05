"""An estimate in words: one sentence a target, rounded outwards."""

import math

from runner.metrics.forecast import LEAST_POINTS, Forecast, TargetEstimate

_REFUSALS = {
    "not_falling": "not estimated: the mse is not falling (no falling curve describes it better than a constant)",
    "no_fit": "not estimated: neither a power law nor an exponential with a floor fits these points",
}


def sentence(forecast: Forecast, estimate: TargetEstimate) -> str:
    """What is known about when the mse falls below one target: "mse < 0.1: between steps 34,000 and 46,000, …"."""
    return f"mse < {estimate.target:g}: {_rest(forecast, estimate)}."


def _rest(forecast: Forecast, estimate: TargetEstimate) -> str:
    if estimate.status == "reached":
        return f"reached at step {estimate.best:,.0f}"
    if estimate.status == "too_few_points":
        where = f" since the training changed before step {forecast.since:,.0f}" if forecast.since is not None else ""
        return f"too few points ({forecast.points}{where}; an estimate needs {LEAST_POINTS})"
    if estimate.status in _REFUSALS:
        return _REFUSALS[estimate.status]
    if estimate.status == "not_reached":
        return _not_reached(forecast, estimate)
    now = forecast.last_step or 0.0
    lower = estimate.lower or 0.0
    guess = f"best fit at step {_rounded(estimate.best)}, {forecast.confidence:.0%} interval"
    if estimate.upper is None:
        if lower <= now:
            return f"no bound on the remaining steps: soon, late or never ({guess} without ends)"
        more = _down(lower - now)
        return f"≥ {_steps(more)}, not before step {now + more:,.0f} ({guess} without an upper end)"
    if estimate.upper <= now:
        return f"met by step {_up(estimate.upper):,.0f} on this fit, though the last figure is not below it ({guess})"
    # The remainder is rounded, and the step follows from it: people subtract one from the other.
    most = _up(estimate.upper - now)
    if lower <= now:
        return f"at most {_steps(most)}, by step {now + most:,.0f} ({guess})"
    least = _down(lower - now)
    return f"between steps {now + least:,.0f} and {now + most:,.0f}, {least:,.0f} to {most:,.0f} more ({guess})"


def _not_reached(forecast: Forecast, estimate: TargetEstimate) -> str:
    fits = [family for family in forecast.families if family.accepted]
    best = min(fits, key=lambda family: family.noise)
    words = f"not reached on this fit, which levels off at {best.floor:.3g}"
    if best.floor < estimate.target:
        words = "not reached on this fit, which falls too slowly"
    now = forecast.last_step or 0.0
    if estimate.lower is None:
        return words
    if estimate.lower <= now:
        return f"{words}, though the points allow it at any step"
    return f"{words}; if at all, ≥ {_steps(_down(estimate.lower - now))}"


def _rounded(value: float | None) -> str:
    return "?" if value is None else f"{float(f'{value:.3g}'):,.0f}"


def _steps(more: float) -> str:
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
