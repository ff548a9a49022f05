"""`task=panels`: the W&B workspace that compares the checkpoints of sweeps, made again."""

from runner.comparison.comparison import read
from runner.config import SweepConfig
from runner.errors import ConfigError
from runner.results import Result, versions
from runner.tasks.context import Context
from runner.tracking.panels import FILE_NAME, check_installed, write_panels

_NOT_SAVED = "not saved in W&B, where runs are not online now; task=panels saves it once they are"


def run(config: SweepConfig, context: Context) -> Result:
    """Build the workspace, write it beside the sweep (beside the result, for several), save it where runs go online.

    Raises ConfigError for what is no sweep, and where the extra is not installed.
    """
    check_installed()
    with context.timed("read"):
        comparison = read(config.directories())
    directories = comparison.directories
    path = (directories[0] if len(directories) == 1 else context.directory) / FILE_NAME
    try:
        with context.timed("panels"):
            written = write_panels(comparison, context.tracker, path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error
    sections = written["spec"]["section"]["panelBankConfig"]["sections"]
    return Result(
        task="panels",
        findings=[] if "view" in written else [_NOT_SAVED],
        timing=context.timing,
        versions=versions(),
        details={
            "sweep": [str(directory) for directory in directories],
            "workspace": written["name"],
            "sections": {section["name"]: len(section["panels"]) for section in sections},
            "file": str(path),
            "url": written.get("view", {}).get("url"),
        },
    )
