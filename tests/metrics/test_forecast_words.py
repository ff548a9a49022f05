import dataclasses

from runner.metrics.forecast import forecast, sentence
from tests.metrics.test_forecast import STEPS, noisy


def test_words_round_outwards():
    found = forecast(STEPS, noisy("power law", 0.02), (0.05,))
    estimate = dataclasses.replace(found.targets[0], lower=50385.1, best=69484.7, upper=119926.2)
    assert sentence(found, estimate) == (
        "mse < 0.05: between steps 50,300 and 120,000, 38,300 to 108,000 more (best fit at step 69,500, 90% interval)."
    )
    assert "at most 2,010 more steps, by step 14,010" in sentence(
        found, dataclasses.replace(estimate, lower=11000.0, upper=14001.0)
    )
    # The two figures of a sentence agree (12,000 is the last step), also where a step has more digits than a remainder.
    assert "by step 12,001" in sentence(found, dataclasses.replace(estimate, lower=11000.0, upper=12000.5))
    assert "at most 1 more step," in sentence(found, dataclasses.replace(estimate, lower=11000.0, upper=12000.5))
    assert "between steps 12,009 and 12,101, 9 to 101 more" in sentence(
        found, dataclasses.replace(estimate, lower=12009.5, upper=12100.5)
    )
    assert "met by step 11,000 on this fit, though the last" in sentence(
        found, dataclasses.replace(estimate, lower=9000.0, upper=10980.0)
    )
    assert "soon, late or never" in sentence(
        found, dataclasses.replace(estimate, status="at_least", lower=11000.0, upper=None)
    )
