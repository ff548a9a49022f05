"""The thresholds behind the verdicts, as conf/verdict.yaml has them."""

from functools import cache

import yaml

from runner.confdir import config_directory
from runner.metrics.verdict import Thresholds


@cache
def thresholds() -> Thresholds:
    """The bounds of mse and cosine and the other fixed numbers."""
    values = yaml.safe_load((config_directory() / "verdict.yaml").read_text(encoding="utf-8"))
    return Thresholds(**{key: value for key, value in values.items() if key != "_target_"})
