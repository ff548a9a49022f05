"""Which checks there are, by the names that a tier lists. Nothing heavy is imported until a check runs."""

from collections.abc import Callable, Iterable
from importlib import import_module

from runner.checks.bench import Bench
from runner.checks.check import Check, Outcome
from runner.config import did_you_mean
from runner.errors import ConfigError


def late(place: str) -> Callable[[Bench], Outcome]:
    """`"roundtrip.loading"`: the function `loading` of runner/checks/roundtrip.py, imported when it is called."""
    module, _, name = place.partition(".")

    def run(bench: Bench) -> Outcome:
        outcome: Outcome = getattr(import_module(f"runner.checks.{module}"), name)(bench)
        return outcome

    return run


def by_name(*checks: Check) -> dict[str, Check]:
    """The checks under their names."""
    assert len({check.name for check in checks}) == len(checks), "two checks of one name"
    return {check.name: check for check in checks}


# Of the machine: they need no checkpoint.
ENVIRONMENT = by_name()
# Of every checkpoint.
SHARED = by_name()
# Of the checkpoints of one family.
OF_FAMILY = {
    "npt": by_name(),
    "gpt": by_name(),
    "lora_moe": by_name(),
    "hf": by_name(),
}


def checks_for(family: str | None, names: Iterable[str]) -> list[Check]:
    """The checks that `names` call for, in that order; those that the family has not are left out.

    `family`: that of the checkpoint, or None where there is none: then only the environment is checked. Raises
    ConfigError for a name that no family has.
    """
    own = ENVIRONMENT if family is None else {**ENVIRONMENT, **SHARED, **OF_FAMILY.get(family, {})}
    known = {name for group in (ENVIRONMENT, SHARED, *OF_FAMILY.values()) for name in group}
    names = tuple(names)
    for name in names:
        if name not in known:
            raise ConfigError(f"tier.checks: {name!r} is unknown{did_you_mean(name, sorted(known))}")
    return [own[name] for name in names if name in own]
