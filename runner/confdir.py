"""Where the configs lie: inside the installed package, or beside it in a checkout."""

from pathlib import Path

import yaml

from runner.errors import ConfigError


def config_directory() -> Path:
    """The absolute path of conf/. Raises ConfigError for an installation without it."""
    package = Path(__file__).resolve().parent
    for directory in (package / "conf", package.parent / "conf"):
        if (directory / "config.yaml").is_file():
            return directory
    raise ConfigError("the installation has no conf/ directory; install runner again")


def keys_below(root: str, task: str) -> list[str]:
    """The keys `root.…` that the config files give a task: those of its own file, and of the group of that name."""
    directory = config_directory()
    own = directory / "task" / f"{task}.yaml"
    nodes = [_mapping(own).get(root)] if own.is_file() else []
    nodes += map(_mapping, sorted((directory / root).glob("*.yaml")))
    names = {name for node in nodes if isinstance(node, dict) for name in node}
    return [f"{root}.{name}" for name in sorted(names - {"defaults", "_target_"})]


def _mapping(file: Path) -> dict[str, object]:
    return yaml.safe_load(file.read_text(encoding="utf-8")) or {}
