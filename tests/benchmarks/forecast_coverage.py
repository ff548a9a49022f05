"""Coverage of the estimate of remaining steps, on simulated series whose truth is known.

    nice -n 15 python tests/benchmarks/forecast_coverage.py [--series 1000] [--confidence 0.9] [--noise 0.01 0.05 0.15]

A case is a law, the noise of log mse, the number of evenly spaced points up to step 20,000, and the floor in units of
the target. With a floor below 1 the truth meets the target at step 40,000; with one above it never does. Columns, as
shares of the series:

    covered      the interval of the right law holds the truth (one without an upper end does where it begins below it)
    bounded      ... and of all intervals of the right law, those with an upper end
    width        median ratio of upper to lower end of the bounded ones
    right, wrong how often each law was rejected
    shown        the reader gets an interval (not "reached" by a lucky last point, not a refusal)
    holds        of those shown, over all laws not rejected, the ones that hold the truth
    ends         of those shown, the ones with an upper end

Expected at 0.9: `covered` from 0.85 to 0.97 where the floor is below the target; `bounded` and `ends` at most 0.10
where it is above. With 1,000 series or more (a standard error of 0.01) a case that misses is marked, and the exit
code is then 1.
"""

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from runner.metrics.forecast import Forecast, forecast  # noqa: E402
from runner.metrics.forecast_fit import FAMILIES, Array, coordinate, fit, reach, step_at  # noqa: E402

LAST, TARGET, REACHED = 20_000.0, 0.1, 40_000.0
POINTS, FLOORS = (6, 8, 12, 20), (0.0, 0.5, 1.1, 1.5)
BATCH = 250
JUDGED = 1000


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the table; `truth`: the step at which the target is met."""

    family: str
    noise: float
    points: int
    floor: float

    @property
    def truth(self) -> float:
        return REACHED if self.floor < 1 else math.inf

    @property
    def steps(self) -> Array:
        return LAST * np.arange(1, self.points + 1) / self.points

    def curve(self) -> Array:
        """The mse without noise: 0.3 to 3 at the first step."""
        floor = self.floor * TARGET
        if self.family == "power law":
            height = (TARGET - floor) * REACHED**0.7 if self.floor < 1 else TARGET * LAST**0.7
            return floor + height * self.steps**-0.7
        rate = math.log((2 - floor) / (TARGET - floor)) / REACHED if self.floor < 1 else 2.5 / LAST
        return floor + (2 - floor) * np.exp(-rate * self.steps)

    def series(self, count: int) -> Array:
        """`count` noisy series of mses, always the same ones."""
        seed = [FAMILIES.index(self.family), round(1000 * self.noise), self.points, round(10 * self.floor)]
        noise = np.random.default_rng(seed).standard_normal((count, self.points))
        return self.curve() * np.exp(self.noise * noise)


def right_law(case: Case, mses: Array, confidence: float) -> tuple[float, float, float]:
    """covered, bounded, width."""
    x = coordinate(case.family, case.steps, case.steps)
    ends = []
    for batch in np.array_split(np.log(mses), max(len(mses) // BATCH, 1)):
        earliest, _, latest = reach(fit(batch, x, confidence), math.log(TARGET))
        ends.append([step_at(case.family, case.steps, earliest), step_at(case.family, case.steps, latest)])
    low, high = np.concatenate(ends, axis=1)
    bounded = np.isfinite(high)
    width = float(np.median(high[bounded] / low[bounded])) if bounded.any() else math.nan
    return float(((low <= case.truth) & (case.truth <= high)).mean()), float(bounded.mean()), width


def reader(case: Case, mses: Array, confidence: float) -> tuple[float, float, float, float, float]:
    """right, wrong, shown, holds, ends."""
    found = [forecast(case.steps, row, (TARGET,), confidence=confidence, band_steps=(LAST,)) for row in mses]
    shown = [f.targets[0] for f in found if f.targets[0].status in ("between", "at_least", "not_reached")]
    low = np.array([math.inf if e.lower is None else e.lower for e in shown])
    high = np.array([math.inf if e.upper is None else e.upper for e in shown])
    holds = (low <= case.truth) & (case.truth <= high)
    return (
        _rejected(found, lambda name: name == case.family),
        _rejected(found, lambda name: name != case.family),
        len(shown) / len(found),
        float(holds.mean()) if shown else math.nan,
        float(np.isfinite(high).mean()) if shown else math.nan,
    )


def _rejected(found: list[Forecast], which: Callable[[str], bool]) -> float:
    return float(np.mean([not fit.accepted for f in found for fit in f.families if which(fit.name)]))


def main() -> int:
    """Print a row a case; 1 where one misses what is expected."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--series", type=int, default=1000)
    parser.add_argument("--confidence", type=float, default=0.9)
    parser.add_argument("--noise", type=float, nargs="+", default=[0.01, 0.05, 0.15])
    given = parser.parse_args()
    print(f"{given.series} series a case, nominal {given.confidence:.0%}")
    print(f"{'law':<12}{'floor':>6}{'noise':>6}{'points':>7}", end=" |")
    print(f"{'covered':>8}{'bounded':>8}{'width':>8} |{'right':>6}{'wrong':>6}{'shown':>6}{'holds':>6}{'ends':>6}")
    start, missed, cases = time.perf_counter(), 0, 0
    for family, floor, noise, points in itertools.product(FAMILIES, FLOORS, given.noise, POINTS):
        case = Case(family=family, noise=noise, points=points, floor=floor)
        mses = case.series(given.series)
        covered, bounded, width = right_law(case, mses, given.confidence)
        right, wrong, shown, holds, ends = reader(case, mses, given.confidence)
        bad = not 0.85 <= covered <= 0.97 if floor < 1 else max(bounded, ends) > 0.1
        bad = bad and given.series >= JUDGED
        cases, missed = cases + 1, missed + bad
        print(f"{family:<12}{floor:>6.1f}{noise:>6.2f}{points:>7}", end=" |")
        print(f"{covered:>8.3f}{bounded:>8.3f}{width:>8.2f} |{right:>6.3f}{wrong:>6.3f}", end="")
        print(f"{shown:>6.3f}{holds:>6.3f}{ends:>6.3f}{'  MISSED' if bad else ''}", flush=True)
    verdict = "" if given.series >= JUDGED else f" (not judged under {JUDGED} series)"
    print(f"{missed} of {cases} cases missed{verdict}; {time.perf_counter() - start:.0f} s")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
