import numpy as np
import pytest

from tests.metrics.backtest import backtest
from tests.metrics.test_forecast import CURVES, STEPS, TARGETS, curve, noisy


@pytest.mark.parametrize("family", CURVES)
def test_back_test_scores_the_rest(family):
    steps = np.arange(1, 21) * 1000.0
    exact = backtest(steps, curve(family, steps), TARGETS)
    assert (exact.fitted_points, exact.fitted_until, len(exact.points)) == (12, 12000.0, 8)
    assert exact.typical_error < 1e-5
    assert all(target.held for target in exact.targets)
    mses = noisy(family, 0.03, steps)
    score = backtest(steps, mses, TARGETS)
    assert score.inside >= 0.75
    broken = np.where(steps > 12000, mses * 2, mses)
    worse = backtest(steps, broken, TARGETS)
    assert worse.inside < 0.3
    assert worse.bias == pytest.approx(2 * score.bias)


@pytest.mark.parametrize(("after", "seen"), [(0.02, 13000), (0.12, None)])
def test_back_test_sees_a_target_met_too_soon_and_one_not_met(after, seen):
    steps = np.arange(1, 21) * 1000.0
    mses = np.where(steps > 12000, after, noisy("exponential", 0.01, steps))
    near, far = backtest(steps, mses, (0.1, 0.03)).targets
    assert near.seen == far.seen == seen
    assert near.held == (seen is not None)
    assert far.held == (seen is None)


def test_back_test_refuses():
    assert backtest(STEPS[:7], curve("power law")[:7], TARGETS).refusal == "too few points (7; a back-test needs 8)"
    assert backtest(STEPS, np.full(12, 0.7), TARGETS).refusal == "the first part is not falling"
    assert backtest(STEPS, 2 - (STEPS / 13000) ** 4, TARGETS, share=0.8).refusal == "the first part fits neither family"


def test_wrong_share():
    with pytest.raises(ValueError, match="share=1"):
        backtest(STEPS, curve("power law"), TARGETS, share=1)
