"""Where the configs lie: inside the installed package, or beside it in a checkout."""

from pathlib import Path

from runner.errors import ConfigError


def config_directory() -> Path:
    """The absolute path of conf/. Raises ConfigError for an installation without it."""
    package = Path(__file__).resolve().parent
    for directory in (package / "conf", package.parent / "conf"):
        if (directory / "config.yaml").is_file():
            return directory
    raise ConfigError("the installation has no conf/ directory; install runner again")
