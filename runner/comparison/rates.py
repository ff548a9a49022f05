"""The learning rate that a checkpoint was trained with, as its own config says."""

from pathlib import Path

from runner.comparison.jobs import Job, is_number
from runner.errors import CheckpointError
from runner.files.strict_json import read_object

_LARGEST_CONFIG = 1 << 20


def learning_rate(job: Job) -> float | None:
    """`learning_rate` in the checkpoint's config.json: the setting, not where a schedule has brought it.

    None where the checkpoint is not here (any more), or its config does not say.
    """
    if job.ckpt is None:
        return None
    path = Path(job.ckpt)
    config = (path if path.is_dir() else path.parent) / "config.json"
    if not config.is_file():
        return None
    try:
        rate = read_object(config, "config", _LARGEST_CONFIG).get("learning_rate")
    except CheckpointError:
        # Another program's file: whoever opens the checkpoint is told what is wrong with it.
        return None
    return float(rate) if is_number(rate) and rate > 0 else None
