"""`task=compare`: the comparison of a sweep, or of several, made again."""

from runner.comparison.comparison import read
from runner.comparison.export import series_to_dict
from runner.config import SweepConfig
from runner.errors import ConfigError
from runner.reports.compare import summary, write_files
from runner.results import Result, versions
from runner.tasks.context import Context
from runner.tracking.compare import log_comparison


def run(config: SweepConfig, context: Context) -> Result:
    """Compare the jobs of `sweep`, and write the page and its files.

    They go into the sweep's directory, those of several sweeps into the run's own. Raises ConfigError for a directory
    that is no sweep, or that cannot be written.
    """
    with context.timed("read"):
        comparison = read(config.directories())
    target = comparison.directories[0] if len(comparison.directories) == 1 else context.directory
    with context.timed("write"):
        written = write_files(comparison, target)
    if written.problem is not None:
        raise ConfigError(written.problem)
    log_comparison(comparison, context.tracker)
    return Result(
        task="compare",
        timing=context.timing,
        versions=versions(),
        details={
            "sweeps": list(map(str, comparison.directories)),
            **summary(comparison),
            "series": [series_to_dict(series) for series in comparison.series],
            "files": {kind: str(path) for kind, path in written.files.items()},
        },
    )
