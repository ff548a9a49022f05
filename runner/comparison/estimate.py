"""The estimate of the remaining steps of a series, as the comparison shows it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """`words`: one sentence; `band`: (step, lower, median, upper) of the curve, empty where nothing was fitted.

    `details` is the whole estimate as plain JSON values.
    """

    words: str
    band: tuple[tuple[float, float, float, float], ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)


def estimate(steps: Sequence[int], mses: Sequence[float]) -> Estimate | None:
    """The estimate for a series of (step, mse), steps ascending; None where none is made."""
    return None
