"""The measured points that count; which decaying curves with a floor they allow, and when those reach a target.

Both families are one function of a coordinate x that is 1 at the first step and 0 at the last:

    f(x) = A · (φ + (1 − φ) · e^(κx)),     0 ≤ φ ≤ 1, κ > 0

With x linear in the step this is an exponential, with x linear in log(step) a power law; the floor is A·φ. Residuals
are taken in log f. The parameters are those that data determine best: `level` = log A (the curve at the last step),
`drop` = log f(1)/f(0), and `share` = drop/κ in (0, 1], which is 1 where the floor is zero.

A profile-likelihood interval of any function of the curve is the range of that function over the curves whose sum of
squares is at most RSS + s²·F(1, n−3) (Bates and Watts, Nonlinear Regression Analysis, 1988, ch. 6): maximising the
likelihood at a fixed target step and cutting the profile gives the same set. `level` enters linearly and is solved for
in closed form, as is the step at which a curve meets a target; the other two parameters are covered by a grid that
follows the region. All functions take a batch of series, so that a simulation costs little more than its arithmetic.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

PARAMETERS = 3
FAMILIES = ("power law", "exponential")
# Figures are written with about six digits: no fit is believed to be closer than that.
LEAST_NOISE = 1e-6
_LEAST_DROP, _MOST_DROP = 1e-6, 60.0
_LEAST_SHARE = 0.0025
_SHARES, _ZOOMS = 32, 5
_STRETCH = np.linspace(-1.3, 1.3, 15)
# Two recorded learning rates this close are one and the same setting.
_SAME_RATE = 0.1
# No real curve follows a law exactly: with many points, a residual a little above the scatter is no reason to reject.
LEAST_RATIO = 1.5


@dataclass(frozen=True, kw_only=True)
class Region:
    """The curves that each of B series allows, as J candidates a series: arrays [B, J] unless said otherwise.

    `slack`: how far the level may move up or down at that drop and share; NaN where the candidate is not allowed.
    `best`: [B], the candidate that fits best; `rss`: [B], its sum of squares in log units; `noise`: [B], the residual
    standard deviation √(RSS / (n − 3)).
    """

    drop: Array
    share: Array
    level: Array
    slack: Array
    best: NDArray[np.intp]
    rss: Array
    noise: Array


@dataclass(frozen=True, kw_only=True)
class MeasuredPoints:
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


def points_of(
    steps: Sequence[float | None],
    mses: Sequence[float | None],
    learning_rates: Sequence[float | None] | None = None,
    changes: Sequence[float] = (),
) -> MeasuredPoints:
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
    return MeasuredPoints(
        seen_steps=tuple(seen_steps),
        seen=tuple(seen),
        steps=tuple(step for step, _ in kept),
        mses=tuple(mse for _, mse in kept),
        since=since,
        notes=tuple(notes),
    )


def reached(series: MeasuredPoints, target: float) -> float | None:
    """The first step from which every measured mse is below `target`; None where the last one is not."""
    backwards = zip(reversed(series.seen_steps), reversed(series.seen), strict=True)
    below = list(takewhile(lambda point: point[1] < target, backwards))
    return below[-1][0] if below else None


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


@cache
def f_quantile(tested: int, free: int, confidence: float) -> float:
    """The quantile of the F distribution with `tested` (1 or 2) and `free` (at least 1) degrees of freedom.

    F(2, n) has a closed form. F(1, n) is the square of Student's t, whose distribution is a finite sum in the angle
    θ = arctan(t/√n) (Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4): θ is bisected.
    `confidence` is above 0 and below 1.
    """
    if tested == 2:
        return free / 2 * math.expm1(-2 / free * math.log1p(-confidence))
    low, high = 0.0, math.pi / 2
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if _share_within(middle, free) < confidence else (low, middle)
    return free * math.tan(low) ** 2


def _share_within(angle: float, free: int) -> float:
    """The probability that Student's t with `free` degrees of freedom is within ±√free · tan(angle)."""
    sine, cosine = math.sin(angle), math.cos(angle)
    term, total = (cosine if free % 2 else 1.0), 0.0
    for k in range(1 + free % 2, free, 2):
        total += term
        term *= cosine * cosine * k / (k + 1)
    return 2 / math.pi * (angle + sine * total) if free % 2 else sine * total


def coordinate(family: str, steps: Array, at: Array) -> Array:
    """x of the steps `at`: 1 at the first of `steps`, 0 at the last, negative beyond."""
    if family == "power law":
        return np.log(steps[-1] / at) / np.log(steps[-1] / steps[0])
    return (steps[-1] - at) / (steps[-1] - steps[0])


def step_at(family: str, steps: Array, x: Array) -> Array:
    """The inverse of `coordinate`; never below 0, and infinite at x = −∞."""
    with np.errstate(over="ignore"):
        if family == "power law":
            return np.exp(np.log(steps[-1]) - x * np.log(steps[-1] / steps[0]))
        return np.maximum(steps[-1] - x * (steps[-1] - steps[0]), 0.0)


def log_shape(x: Array, drop: Array, share: Array) -> Array:
    """log f(x)/f(0), without overflow for steep curves or far steps."""
    rate = drop / share
    rise = np.sign(x) * np.exp(rate * (np.maximum(x, 0) - 1)) * np.expm1(-rate * np.abs(x)) / np.expm1(-rate)
    return np.log(np.maximum(1 + np.expm1(drop) * rise, np.finfo(float).tiny))


def fit(y: Array, x: Array, confidence: float) -> Region:
    """The curves that the log figures `y` [B, n] at coordinates `x` [n] allow with this confidence (such as 0.9)."""
    count = len(x)
    free = count - PARAMETERS
    quantile = f_quantile(1, free, confidence)
    slope = (y * (x - x.mean())).sum(-1) / ((x - x.mean()) ** 2).sum()
    roots = np.broadcast_to(np.linspace(np.sqrt(_LEAST_SHARE), 1.0, _SHARES), (len(y), _SHARES))
    drop = np.broadcast_to(np.clip(slope, 0.05, _MOST_DROP)[:, None], roots.shape)
    for zoom in range(_ZOOMS):
        drop, curvature = _best_drop(y, x, drop, roots**2, rounds=12 if zoom == 0 else 5)
        rss, _ = _residual(y, x, drop, roots**2)
        least = rss.min(-1)
        cut = least + quantile * np.maximum(least / free, LEAST_NOISE**2)
        if zoom < _ZOOMS - 1:
            roots, drop = _zoom(roots, drop, rss <= cut[:, None])
    width = np.sqrt(np.maximum(cut[:, None] - rss, 0.0) / curvature)
    shape = (len(y), _SHARES * len(_STRETCH))
    drop = np.clip(drop[..., None] + width[..., None] * _STRETCH, _LEAST_DROP, _MOST_DROP).reshape(shape)
    share = np.broadcast_to((roots**2)[..., None], (*roots.shape, len(_STRETCH))).reshape(shape)
    rss, level = _residual(y, x, drop, share)
    best = rss.argmin(-1)
    least = np.take_along_axis(rss, best[:, None], -1)[:, 0]
    with np.errstate(invalid="ignore"):
        slack = np.sqrt((cut[:, None] - rss) / count)
    slack[np.arange(len(y)), best] = np.fmax(slack[np.arange(len(y)), best], 0.0)
    return Region(drop=drop, share=share, level=level, slack=slack, best=best, rss=least, noise=np.sqrt(least / free))


def _residual(y: Array, x: Array, drop: Array, share: Array) -> tuple[Array, Array]:
    """Sum of squares and best level of each candidate, both [B, J]."""
    left = y[:, None, :] - log_shape(x, drop[..., None], share[..., None])
    level = left.mean(-1)
    return ((left - level[..., None]) ** 2).sum(-1), level


def _best_drop(y: Array, x: Array, drop: Array, share: Array, rounds: int) -> tuple[Array, Array]:
    """Gauss–Newton for the drop at each share [B, J]; also the curvature of the sum of squares there."""
    share = share[..., None]
    for _ in range(rounds):
        shape = log_shape(x, drop[..., None], share)
        nudge = 1e-6 * (1 + drop)
        slope = (log_shape(x, (drop + nudge)[..., None], share) - shape) / nudge[..., None]
        slope = slope - slope.mean(-1, keepdims=True)
        curvature = np.maximum((slope**2).sum(-1), 1e-12)
        move = ((y[:, None, :] - shape) * slope).sum(-1) / curvature
        drop = np.clip(drop + np.clip(move, -1.0, 1.0), _LEAST_DROP, _MOST_DROP)
    return drop, curvature


def _zoom(roots: Array, drop: Array, allowed: NDArray[np.bool_]) -> tuple[Array, Array]:
    """A new grid over the allowed shares and one cell on either side, with the drops interpolated."""
    last = roots.shape[1] - 1
    low = np.maximum(allowed.argmax(-1) - 1, 0)
    high = np.minimum(last - allowed[:, ::-1].argmax(-1) + 1, last)
    place = low[:, None] + (high - low)[:, None] * np.linspace(0.0, 1.0, last + 1)
    before = np.minimum(place.astype(int), last - 1)
    part = place - before

    def between(values: Array) -> Array:
        left = np.take_along_axis(values, before, -1)
        return left + part * (np.take_along_axis(values, before + 1, -1) - left)

    return between(roots), between(drop)


def reach(region: Region, log_target: float) -> tuple[Array, Array, Array]:
    """x at which the curves meet the target: earliest, best and latest, each [B]; −∞ where the floor is above it."""
    rate = region.drop / region.share
    floor = np.expm1(region.drop - rate) / np.expm1(-rate)
    log_rest = np.log(np.expm1(region.drop)) - rate - np.log(-np.expm1(-rate))

    def meet(level: Array) -> Array:
        with np.errstate(divide="ignore", invalid="ignore"):
            above = np.exp(log_target - level) - floor
            return np.where(above > 0, (np.log(above) - log_rest) / rate, np.where(np.isnan(level), np.nan, -np.inf))

    best = np.take_along_axis(meet(region.level), region.best[:, None], -1)[:, 0]
    earliest = np.nanmax(meet(region.level - region.slack), -1)
    return earliest, best, np.nanmin(meet(region.level + region.slack), -1)


def curve_band(region: Region, x: Array) -> tuple[Array, Array, Array]:
    """log f at the coordinates `x` [S]: lower, best and upper of the curves that are allowed, each [B, S]."""
    shape = log_shape(x, region.drop[..., None], region.share[..., None])
    middle = region.level[..., None] + shape
    slack = region.slack[..., None]
    best = np.take_along_axis(middle, region.best[:, None, None], 1)[:, 0]
    return np.nanmin(middle - slack, 1), best, np.nanmax(middle + slack, 1)


def log_floor(region: Region) -> tuple[Array, Array, Array]:
    """log of the floor: lower, best and upper over the curves that are allowed, each [B]; −∞ where it is zero."""
    rate = region.drop / region.share
    with np.errstate(divide="ignore"):
        middle = region.level + np.log(np.maximum(np.expm1(region.drop - rate) / np.expm1(-rate), 0.0))
    best = np.take_along_axis(middle, region.best[:, None], -1)[:, 0]
    return np.nanmin(middle - region.slack, -1), best, np.nanmax(middle + region.slack, -1)
