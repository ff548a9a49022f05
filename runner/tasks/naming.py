"""From `ckpt` and `step` of a config to the one checkpoint that they name. No model is imported here."""

from pathlib import Path

from runner.checkpoints.checkpoint import Checkpoint
from runner.checkpoints.runs import resolve
from runner.config import CheckpointConfig
from runner.errors import ConfigError
from runner.installation import demo_run

DEMO = "demo"


def checkpoint_path(config: CheckpointConfig) -> Path:
    """The one checkpoint that `ckpt` and `step` name; of `demo` the last step is the default."""
    if config.step is not None and (isinstance(config.step, bool) or not isinstance(config.step, int)):
        raise ConfigError(f"step={config.step}: a step is a whole number; several steps are a sweep: add -m")
    if config.ckpt != DEMO:
        return resolve(Path(config.ckpt).expanduser(), config.step)
    return resolve(demo_run(), -1 if config.step is None else config.step)


def cache_directory(cache: str | None) -> Path:
    """Where things are kept between runs: `cache`, or its default."""
    return Path(cache).expanduser() if cache else Path.home() / ".cache" / "runner"


def check_family(config: CheckpointConfig, checkpoint: Checkpoint) -> None:
    """Raise ConfigError where the family that was asked for is not the checkpoint's."""
    if config.family.name not in ("auto", checkpoint.family):
        raise ConfigError(
            f"family={config.family.name}, but {checkpoint.path} is of the family {checkpoint.family} "
            f"(format {checkpoint.format}: {checkpoint.evidence})"
        )
