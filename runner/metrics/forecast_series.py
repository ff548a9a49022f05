"""From what a sweep measured to points that a curve can be fitted to."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from runner.metrics.forecast_fit import PARAMETERS, Array

# Two recorded learning rates this close are one and the same setting.
_SAME_RATE = 0.1
# No real curve follows a law exactly: with many points, a residual a little above the scatter is no reason to reject.
LEAST_RATIO = 1.5


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points in ascending order of step.

    `seen_steps`, `seen`: every step with a figure, also those at step 0 and of earlier learning rates. `steps`, `mses`:
    the points for a fit, all positive, since the training last changed; `since`: the step of that change, or None.
    `notes`: what was left out or put together, and why.
    """

    seen_steps: tuple[float, ...]
    seen: tuple[float, ...]
    steps: tuple[float, ...]
    mses: tuple[float, ...]
    since: float | None
    notes: tuple[str, ...]


def series_of(
    steps: Sequence[float | None],
    mses: Sequence[float | None],
    learning_rates: Sequence[float | None] | None = None,
    changes: Sequence[float] = (),
) -> Series:
    """The points in order, without those that a fit cannot use.

    A step that was measured several times counts once, with the geometric mean: the same checkpoint measured again is
    no new evidence. `learning_rates`: one a point where known; a difference of more than 10 % between neighbours is a
    change. `changes`: steps after which training went on with other settings. Raises ValueError for other lengths.
    """
    rates = [None] * len(steps) if learning_rates is None else list(learning_rates)
    if not len(steps) == len(mses) == len(rates):
        raise ValueError(f"{len(steps)} steps, {len(mses)} figures and {len(rates)} learning rates do not match")
    left_out: dict[str, list[str]] = {}
    groups: dict[float, list[float]] = {}
    rate_at: dict[float, float | None] = {}
    for step, mse, rate in zip(steps, mses, rates, strict=True):
        if step is None or not math.isfinite(step) or step < 0:
            left_out.setdefault("no step", []).append("?")
        elif mse is None or not math.isfinite(mse) or mse < 0:
            left_out.setdefault("mse is not a finite number of at least 0", []).append(f"{step:g}")
        else:
            groups.setdefault(float(step), []).append(float(mse))
            rate_at[float(step)] = rate
    seen_steps = sorted(groups)
    seen = [_geometric_mean(groups[step]) for step in seen_steps]
    since = _last_change(seen_steps, [rate_at[step] for step in seen_steps], changes)
    kept = []
    for step, mse in zip(seen_steps, seen, strict=True):
        if step == 0:
            left_out.setdefault("before training", []).append("0")
        elif mse == 0:
            left_out.setdefault("mse is 0", []).append(f"{step:g}")
        elif since is not None and step < since:
            left_out.setdefault(f"the training changed before step {since:g}", []).append(f"{step:g}")
        else:
            kept.append((step, mse))
    notes = [f"left out, {why}: step {', '.join(where)}" for why, where in left_out.items()]
    notes += [
        f"step {step:g} was measured {len(groups[step])} times: the geometric mean is used"
        for step in seen_steps
        if len(set(groups[step])) > 1
    ]
    return Series(
        seen_steps=tuple(seen_steps),
        seen=tuple(seen),
        steps=tuple(step for step, _ in kept),
        mses=tuple(mse for _, mse in kept),
        since=since,
        notes=tuple(notes),
    )


def reached(series: Series, target: float) -> float | None:
    """The first step from which every measured mse is below `target`; None where the last one is not."""
    found = None
    for step, mse in zip(reversed(series.seen_steps), reversed(series.seen), strict=True):
        if mse >= target:
            break
        found = step
    return found


def local_noise(steps: Array, log_mses: Array) -> Array:
    """Standard deviation of log figures [B, n] around a smooth curve, from each point and its two neighbours: [B].

    The difference-based estimator of Gasser, Sroka and Jennen-Steinmetz (Biometrika 73, 1986), taken against the step
    and against its logarithm; the smaller one, since curvature can only add.
    """
    found = []
    for place in (steps, np.log(steps)):
        left = (place[2:] - place[1:-1]) / (place[2:] - place[:-2])
        off = left * log_mses[:, :-2] + (1 - left) * log_mses[:, 2:] - log_mses[:, 1:-1]
        found.append(np.sqrt(np.mean(off**2 / (left**2 + (1 - left) ** 2 + 1), axis=-1)))
    return np.minimum(*found)


def rejection_ratio(steps: Array) -> float:
    """How far a residual may stand above the local noise before a curve is rejected.

    What the right curve exceeds by chance once in a hundred series at these steps, found by simulation; at least
    LEAST_RATIO. A straight line stands for the curve: a floor that fits best at zero leaves two free parameters.
    """
    noise = np.random.default_rng(0).standard_normal((2000, len(steps)))
    basis, _ = np.linalg.qr(np.stack([np.ones(len(steps)), np.log(steps)], axis=1))
    rest = noise - (noise @ basis) @ basis.T
    ratios = np.sqrt((rest**2).sum(-1) / (len(steps) - PARAMETERS)) / local_noise(steps, noise)
    return max(LEAST_RATIO, float(np.quantile(ratios, 0.99)))


def _geometric_mean(values: Sequence[float]) -> float:
    if len(set(values)) == 1 or min(values) == 0:
        return min(values)
    return math.exp(sum(math.log(value) for value in values) / len(values))


def _last_change(steps: Sequence[float], rates: Sequence[float | None], changes: Sequence[float]) -> float | None:
    """The first step of the last stretch of training with the same settings, or None where nothing changed."""
    found = None
    last_rate = None
    for place, (step, rate) in enumerate(zip(steps, rates, strict=True)):
        passed = place > 0 and any(steps[place - 1] <= change < step for change in changes)
        other = rate is not None and last_rate is not None and abs(rate - last_rate) > _SAME_RATE * max(rate, last_rate)
        if passed or other:
            found = step
        last_rate = last_rate if rate is None else rate
    return found
