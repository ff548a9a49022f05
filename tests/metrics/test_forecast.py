import dataclasses
import json
import math

import numpy as np
import pytest
from scipy.optimize import least_squares
from scipy.special import fdtri

from runner.metrics import forecast_fit
from runner.metrics.forecast import forecast, sentence
from runner.metrics.forecast_fit import local_noise, points_of, reached, rejection_ratio
from tests.metrics.backtest import backtest

STEPS = np.arange(1, 13) * 1000.0
TARGETS = (0.5, 0.1, 0.05)
SHAPES = {
    "power law": lambda rate, steps: (steps / 1000) ** -rate,
    "exponential": lambda rate, steps: np.exp(-rate * steps / 1000),
}
# floor, height, rate, and the steps at which these curves meet 0.1 and 0.05
CURVES = {
    "power law": (0.03, 0.6, 0.8, 1000 * (0.6 / 0.07) ** 1.25, 1000 * (0.6 / 0.02) ** 1.25),
    "exponential": (0.03, 1.5, 0.25, 4000 * math.log(1.5 / 0.07), 4000 * math.log(1.5 / 0.02)),
}


def curve(family, steps=STEPS):
    floor, height, rate, *_ = CURVES[family]
    return floor + height * SHAPES[family](rate, steps)


def noisy(family, size, steps=STEPS, seed=0):
    return curve(family, steps) * np.exp(size * np.random.default_rng(seed).standard_normal(len(steps)))


def by_target(found):
    return {estimate.target: estimate for estimate in found.targets}


@pytest.mark.parametrize("family", CURVES)
def test_recovers_an_exact_curve(family):
    found = forecast(STEPS, curve(family), TARGETS)
    assert [f.name for f in found.families if f.accepted] == [family]
    fit = next(f for f in found.families if f.accepted)
    assert fit.floor == pytest.approx(0.03, rel=1e-4)
    for target, step in zip((0.1, 0.05), CURVES[family][3:], strict=True):
        estimate = by_target(found)[target]
        assert estimate.status == "between"
        assert (estimate.lower, estimate.best, estimate.upper) == pytest.approx((step, step, step), rel=1e-3)
        assert estimate.lower <= estimate.best <= estimate.upper


@pytest.mark.parametrize("target", [0.05, 0.3])
@pytest.mark.parametrize("family", CURVES)
def test_the_interval_is_that_of_a_profile_scanned_step_by_step(family, target):
    steps, mses = STEPS, noisy(family, 0.02)
    shape, y = SHAPES[family], np.log(mses)

    def least(at):
        """The least sum of squares of the curves that pass through the target at step `at`."""

        def left(free):
            floor = target / (1 + math.exp(-free[0]))
            return y - np.log(floor + (target - floor) * shape(math.exp(free[1]), steps) / shape(math.exp(free[1]), at))

        return min(2 * least_squares(left, (a, b), xtol=1e-12, ftol=1e-12).cost for a in (-1, 1) for b in (-1, 0))

    region = forecast_fit.fit(y[None], forecast_fit.coordinate(family, steps, steps), 0.9)
    low, best, high = (
        float(forecast_fit.step_at(family, steps, x)[0]) for x in forecast_fit.reach(region, math.log(target))
    )
    cut = least(best) * (1 + fdtri(1, len(steps) - 3, 0.9) / (len(steps) - 3))
    assert least(best) == pytest.approx(region.rss[0], rel=1e-3)
    assert least(low) == pytest.approx(cut, rel=0.02)
    assert least(high) == pytest.approx(cut, rel=0.02)
    assert low < best < high


REFUSED = {
    "five points": (STEPS[:5], curve("power law")[:5], "too_few_points"),
    "no points": ([], [], "too_few_points"),
    "constant": (STEPS, np.full(12, 0.7), "not_falling"),
    "constant with noise": (STEPS, noisy("power law", 0.1) / curve("power law"), "not_falling"),
    "rising": (STEPS, 0.6 * (STEPS / 1000) ** 0.5, "not_falling"),
    "falls, then diverges": (STEPS, [*curve("power law")[:9], 0.6, 2.0, 9.0], "not_falling"),
    "falls ever faster": (STEPS, 2 - (STEPS / 13000) ** 4, "no_fit"),
    "follows no law": (STEPS, np.exp(-np.cumsum([0, 0, 0, 0.1, 0.3, 0.6, 0.6, 0.3, 0.1, 0, 0, 0])), "no_fit"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    steps, mses, status = REFUSED[name]
    found = forecast(steps, mses, (0.01,))
    (estimate,) = found.targets
    assert (estimate.status, estimate.lower, estimate.best, estimate.upper) == (status, None, None, None)
    assert (found.band, found.refusal) == (None, status)
    assert ("too few points" if status == "too_few_points" else "not estimated") in sentence(found, estimate)


def test_a_floor_above_the_target_is_not_reached():
    mses = curve("exponential") + 0.1
    found = forecast(STEPS, mses, (0.05, 0.12))
    assert [e.status for e in found.targets] == ["not_reached", "not_reached"]
    assert all(e.upper is None and e.best is None for e in found.targets)
    assert sentence(found, found.targets[0]) == "mse < 0.05: not reached on this fit, which levels off at 0.13."


def test_a_curve_that_falls_too_slowly_has_no_step():
    found = forecast(STEPS, 1 - 0.001 * np.log(STEPS), (0.1,))
    assert found.targets[0].status == "not_reached"
    assert "falls too slowly" in sentence(found, found.targets[0])
    hundreds_of_times_the_last_step = forecast(STEPS, curve("power law"), (0.0301,)).targets[0]
    assert (hundreds_of_times_the_last_step.status, hundreds_of_times_the_last_step.lower) == ("not_reached", None)


def test_noise_widens_until_there_is_no_upper_end():
    """The same noise, larger: the interval of the true family grows on both sides and around the truth."""
    widths, found = [], None
    for size in (0.002, 0.005, 0.01, 0.02):
        found = by_target(forecast(STEPS, noisy("power law", size), TARGETS))[0.05]
        widths.append(found.upper - found.lower)
    assert widths == sorted(widths)
    assert widths[-1] > 5 * widths[0]
    loud = forecast(STEPS, noisy("power law", 0.1, seed=1), TARGETS)
    assert by_target(loud)[0.1].status == "at_least"
    assert by_target(loud)[0.1].upper is None
    assert "≥" in sentence(loud, by_target(loud)[0.1])


def test_confidence_widens():
    mses = noisy("power law", 0.02)
    narrow, wide = (by_target(forecast(STEPS, mses, TARGETS, confidence=c))[0.05] for c in (0.5, 0.95))
    assert wide.lower < narrow.lower < narrow.best < narrow.upper < wide.upper


@pytest.mark.parametrize("family", CURVES)
def test_units_do_not_matter(family):
    mses = noisy(family, 0.03)
    one, other = forecast(STEPS, mses, TARGETS), forecast(STEPS / 1000, 7 * mses, [7 * t for t in TARGETS])
    assert one.noise == pytest.approx(other.noise)
    for a, b in zip(one.targets, other.targets, strict=True):
        assert a.status == b.status
        for name in ("lower", "best", "upper"):
            value, scaled = getattr(a, name), getattr(b, name)
            assert scaled is value is None or 1000 * scaled == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize(("family", "count"), [("power law", 8), ("exponential", 12)])
def test_covers_the_truth_about_nine_times_in_ten(family, count):
    steps = np.linspace(1000, 12000, count)
    truth = CURVES[family][4]
    noise = np.random.default_rng(1).standard_normal((40, count))
    region = forecast_fit.fit(
        np.log(curve(family, steps)) + 0.02 * noise, forecast_fit.coordinate(family, steps, steps), 0.9
    )
    low, _, high = (forecast_fit.step_at(family, steps, x) for x in forecast_fit.reach(region, math.log(0.05)))
    assert 31 <= ((low <= truth) & (truth <= high)).sum() <= 40
    assert np.isfinite(high).sum() >= 20
    assert (low > 1.05 * steps[-1]).sum() >= 35


def test_what_a_fit_cannot_use_is_left_out_and_said():
    clean = forecast(STEPS, curve("power law"), TARGETS)
    steps = [*reversed(STEPS), 0, None, 13000, 14000, 12000, math.nan]
    mses = [*reversed(curve("power law")), 5.0, 0.3, math.nan, None, curve("power law")[-1], 0.1]
    found = forecast(steps, mses, TARGETS)
    assert found.targets == clean.targets
    assert found.points == 12
    assert found.notes == (
        "left out, no step: step ?, ?",
        "left out, mse is not a finite number of at least 0: step 13000, 14000",
        "left out, before training: step 0",
    )


def test_a_step_measured_twice_is_one_point():
    series = points_of([1, 2, 2, 3, 3], [1.0, 0.4, 0.9, 0.3, 0.3])
    assert series.steps == (1, 2, 3)
    assert series.mses == pytest.approx((1.0, 0.6, 0.3))
    assert series.notes == ("step 2 was measured 2 times: the geometric mean is used",)


def test_reached_counts_from_where_it_stays_below():
    series = points_of([1, 2, 3, 4, 5], [1.0, 0.4, 0.6, 0.3, 0.0])
    assert reached(series, 0.5) == 4
    assert reached(series, 1.5) == 1
    assert reached(series, 0.2) == 5
    assert reached(points_of([1, 2], [0.9, 0.5]), 0.5) is None
    assert reached(points_of([1, 2], [0.1, 0.9]), 0.5) is None
    found = forecast([1, 2], [0.7, 0.4], (0.5,))
    assert sentence(found, found.targets[0]) == "mse < 0.5: reached at step 2."


@pytest.mark.parametrize(
    ("given", "points"),
    [
        ({"learning_rates": [1e-3] * 12}, 12),
        ({"learning_rates": [1e-3, None] * 6}, 12),
        ({"learning_rates": [1e-3] * 5 + [5e-4] * 7}, 7),
        ({"learning_rates": [1e-3] * 5 + [None] + [5e-4] * 6}, 6),
        ({"learning_rates": [1e-3] * 7 + [1e-4] * 5}, 5),
        ({"changes": [3500]}, 9),
        ({"changes": [3000]}, 9),
        ({"changes": [500, 99000]}, 12),
        ({"changes": [8000]}, 4),
    ],
)
def test_only_points_since_the_last_change_count(given, points):
    found = forecast(STEPS, curve("power law"), TARGETS, **given)
    assert found.points == points
    assert (found.since is None) == (points == 12)
    assert found.targets[0].status == "reached"
    assert (found.targets[2].status == "too_few_points") == (points < 6)
    if points < 6:
        assert f"since the training changed before step {found.since:,.0f}" in sentence(found, found.targets[2])


@pytest.mark.parametrize("family", CURVES)
def test_the_band_holds_the_curve_and_meets_the_estimate(family):
    mses = noisy(family, 0.02)
    estimate = by_target(forecast(STEPS, mses, TARGETS))[0.05]
    at = [STEPS[0], STEPS[-1], estimate.lower, estimate.best, 60000.0]
    band = forecast(STEPS, mses, TARGETS, band_steps=at).band
    assert all(low < middle < high for low, middle, high in zip(band.lower, band.median, band.upper, strict=True))
    assert all(l < c < h for l, c, h in zip(band.lower, curve(family, np.array(at)), band.upper, strict=True))  # noqa: E741
    assert band.median[3] == pytest.approx(0.05, rel=1e-6)
    assert band.lower[2] == pytest.approx(0.05, rel=0.01)
    drawn = forecast(STEPS, mses, TARGETS).band
    assert drawn.steps[0] == STEPS[0]
    assert drawn.steps[-1] > STEPS[-1]


def test_both_families_are_joined_where_both_fit():
    mses = noisy("power law", 0.1, seed=1)
    found = forecast(STEPS, mses, (0.09,))
    assert [f.accepted for f in found.families] == [True, True]
    ends, bands = [], []
    for family in CURVES:
        region = forecast_fit.fit(np.log(mses)[None], forecast_fit.coordinate(family, STEPS, STEPS), 0.9)
        ends.append(
            [float(forecast_fit.step_at(family, STEPS, x)[0]) for x in forecast_fit.reach(region, math.log(0.09))]
        )
        x = forecast_fit.coordinate(family, STEPS, np.array(found.band.steps))
        bands.append(np.exp(forecast_fit.curve_band(region, x)))
    assert found.band.lower == pytest.approx(np.minimum(bands[0][0], bands[1][0])[0])
    assert found.band.upper == pytest.approx(np.maximum(bands[0][2], bands[1][2])[0])
    assert found.targets[0].lower == min(e[0] for e in ends)
    assert found.targets[0].upper is None
    assert max(e[2] for e in ends) > 100 * STEPS[-1]


def test_local_noise_sees_noise_and_not_the_curve():
    steps = np.linspace(1000, 12000, 60)
    noise = 0.1 * np.random.default_rng(0).standard_normal((50, 60))
    assert local_noise(steps, np.log(curve("power law", steps)) + noise).mean() == pytest.approx(0.1, rel=0.05)
    ratios = [rejection_ratio(np.linspace(1000, 12000, n)) for n in (6, 12, 60)]
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[-1] == 1.5


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "mses",
    [
        noisy("exponential", 0.02),
        noisy("exponential", 0.5),
        np.exp(-STEPS / 100),
        np.exp(np.random.default_rng(0).normal(0, 3, 12)),
        np.geomspace(1e300, 1e-300, 12),
        np.array([1e-320, 3e300] * 6),
    ],
)
def test_everything_is_json(mses):
    for found in (forecast(STEPS, mses, TARGETS), backtest(STEPS, mses, TARGETS)):
        assert json.loads(json.dumps(dataclasses.asdict(found), allow_nan=False))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"steps": STEPS[:-1]}, "11 steps, 12 figures"),
        ({"learning_rates": [1e-3]}, "1 learning rates"),
        ({"confidence": 1.0}, "confidence=1.0"),
        ({"targets": (0.1, 0.0)}, "targets"),
    ],
)
def test_wrong_arguments(given, words):
    with pytest.raises(ValueError, match=words):
        forecast(**{"steps": STEPS, "mses": curve("power law"), "targets": TARGETS, **given})


@pytest.mark.parametrize("tested", [1, 2])
@pytest.mark.parametrize("confidence", [0.01, 0.5, 0.9, 0.95, 0.999])
def test_the_quantiles_of_f_are_those_of_scipy(tested, confidence):
    for free in (*range(1, 60), 500, 501, 2000):
        found = forecast_fit.f_quantile(tested, free, confidence)
        assert found == pytest.approx(fdtri(tested, free, confidence), rel=1e-11)
