"""`-m resume=SWEEP_DIR`: the command line that finishes a sweep in its own directory."""

from dataclasses import replace
from pathlib import Path

from runner.errors import ConfigError
from runner.overrides import CommandLine, parse
from runner.sweeps.plan import Plan, read_plan

# What may be another the second time: how the jobs run, not what they are.
_FREE = ("hydra/launcher", "hydra.launcher", "hydra.sweeper")


def resume(line: CommandLine) -> tuple[CommandLine, Plan]:
    """The command line of the sweep that `line` names with resume=, and its plan.

    Launchers may be given anew. Raises ConfigError for a directory that is no sweep, and for an option that differs
    from what the sweep was started with.
    """
    directory = Path(line.get("resume") or "").expanduser()
    if not line.multirun:
        raise ConfigError(f"resume={directory} goes on with a sweep: add -m")
    plan = read_plan(directory)
    before = parse(plan.command)
    given = [(key, value) for key, value in line.overrides if key != "resume"]
    for key, value in given:
        if not _is_free(key) and (key, value) not in before.overrides:
            then = before.get(key)
            was = f"the sweep was started with {key}={then}" if then is not None else "the sweep was started without it"
            raise ConfigError(f"resume={directory}: {key}={value} does not fit: {was}; leave it out")
    if str(Path.cwd()) != plan.cwd:
        raise ConfigError(f"resume={directory}: that sweep was started in {plan.cwd}; go there first")
    anew = {key for key, _ in given if _is_free(key)}
    if "hydra/launcher" in anew:
        anew |= {key for key, _ in before.overrides if key.startswith("hydra.launcher.")}
    kept = [(key, value) for key, value in before.overrides if key not in anew and key != "hydra.sweep.dir"]
    added = [(key, value) for key, value in given if _is_free(key)]
    target = [("hydra.sweep.dir", str(directory.absolute()))]
    return replace(before, overrides=(*kept, *added, *target)), plan


def _is_free(key: str) -> bool:
    return any(key.lstrip("+~") == name or key.lstrip("+~").startswith(f"{name}.") for name in _FREE)
