"""Whether a curve falls: told from its points alone, and no more than they show."""

from collections.abc import Sequence
from itertools import accumulate, combinations

from runner.comparison.answer import Answer
from runner.comparison.thresholds import thresholds

# Of all pairs of checkpoints, the share in which the later one is closer: above it the curve falls, below 1 − it not.
_STEADY = 0.75
# What is not this much closer than all before it has levelled off.
_GAIN = 0.95
# The last checkpoint is worse than the best one by more than this factor: the curve has turned.
_TURNED = 1.5
# Below this share of the first mse a curve has fallen, however flat it is now, and however few its points are.
_FALLEN = 0.8


def trend(points: Sequence[tuple[int, float]]) -> Answer:
    """Whether the mse of (step, mse) `points`, steps ascending, falls."""
    (first_step, first), (last_step, final) = points[0], points[-1]
    if first_step == last_step:
        words = f"Cannot tell from one checkpoint (step {last_step})."
        return Answer(level="unknown", short="one checkpoint shows no trend", words=words)
    span = f"from {first:.4g} at step {first_step} to {final:.4g} at step {last_step}"
    few = f" (only {len(points)} checkpoints)" if len(points) < 4 else ""
    share = _falling_share(points)
    excellent = thresholds().mse["excellent"]
    if share < _STEADY and max(mse for _, mse in points) < excellent:
        words = f"Nothing is left to learn: the mse is below {excellent:g} at each step, {span}{few}."
        return Answer(level="good", short="the mse is excellent at every step", words=words)
    if share <= 1 - _STEADY:
        words = f"No: the mse went {span}{few}."
        return Answer(level="bad", short="training does not work: the mse does not fall", words=words)
    if final > _TURNED * min(mse for _, mse in points):
        return _turned(points)
    since = _level_since(points) if final < _FALLEN * first else None
    if since is not None and final >= excellent:
        words = f"It did: the mse fell {span}, but hardly any more since step {since}."
        return Answer(level="warn", short="training has levelled off", words=words)
    if since is None and (share < _STEADY or final >= first):
        words = f"Unclear: the mse went {span}, up and down on the way{few}."
        return Answer(level="warn", short="it is unclear whether training works", words=words)
    if few and final >= _FALLEN * first:
        words = f"Unclear yet: the mse fell {span}, {1 - final / first:.0%}{few}."
        return Answer(level="warn", short="too few checkpoints to tell whether training works", words=words)
    return Answer(level="good", short="training works", words=f"Yes: the mse fell {span}{few}.")


def _falling_share(points: Sequence[tuple[int, float]]) -> float:
    """Of all pairs of points at different steps, the share in which the later one is lower."""
    falls = [later < earlier for (s, earlier), (t, later) in combinations(points, 2) if s < t]
    return sum(falls) / len(falls)


def _turned(points: Sequence[tuple[int, float]]) -> Answer:
    """The curve was much lower than it is: at the point before, which may be chance, or longer ago."""
    best_step, lowest = min(points, key=lambda point: point[1])
    last_step, final = points[-1]
    words = f"It did: the mse was lowest at step {best_step} ({lowest:.4g}), now {final:.4g}."
    if best_step == points[-2][0]:
        words = (
            f"Unclear: the mse was {lowest:.4g} at step {best_step} and is {final:.4g} at step {last_step}; one point."
        )
        return Answer(level="warn", short="the last checkpoint is worse than the one before", words=words)
    return Answer(level="warn", short="training has turned: the mse rises again", words=words)


def _level_since(points: Sequence[tuple[int, float]]) -> int | None:
    """The step since which no point is clearly closer, where at least the final third is so."""
    tail = len(points) // 3
    if tail < 2:
        return None
    lows = [mse for _, mse in points]
    until, after = list(accumulate(lows, min)), list(accumulate(reversed(lows), min))[::-1]
    level = [i for i in range(len(points) - tail) if after[i + 1] > _GAIN * until[i]]
    return points[level[0]][0] if level else None
