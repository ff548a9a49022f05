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


def _check(name: str, title: str, place: str, *needs: str) -> Check:
    return Check(name=name, title=title, run=late(place), needs=needs)


def _quality(name: str, title: str, place: str, *needs: str) -> Check:
    return Check(name=name, title=title, run=late(place), needs=needs, integrity=False)


# Of the machine: they need no checkpoint.
ENVIRONMENT = by_name()
# Of every checkpoint.
SHARED = by_name(
    _check("model", "the model is built, strictly", "behaviour.build", "loading", "finite"),
    _check("forward", "finite logits, short and long", "behaviour.forward", "model"),
    _check("save", "saved again, it has the same names and shapes", "roundtrip.save", "model"),
    _check("roundtrip", "reloaded, it gives the same logits", "roundtrip.roundtrip", "forward", "save", "router"),
    _check("batch", "padded batches give the logits of each alone", "behaviour.batch", "forward"),
    _check("gradients", "they reach what should train", "learning.gradients", "forward", "modes"),
    _check("optimizer_step", "a step changes nothing else", "learning.optimizer_step", "gradients"),
)
# Of the checkpoints of one family.
OF_FAMILY = {
    "npt": by_name(
        _check("modes", "switching modes leaves nothing behind", "behaviour_npt.modes", "forward"),
        _check("control", "all layers standard: the plain model", "behaviour_npt.control", "modes"),
        _quality("fidelity", "logits against the base's", "quality.fidelity", "control"),
        _quality("layers", "each NPT layer alone", "quality.layers", "control"),
        _quality("progressive", "the lowest n NPT layers", "quality.progressive", "control"),
        _quality("generation", "continuations against the base's", "quality.generation", "control"),
    ),
    "gpt": by_name(
        _check("convert", "converted there and back", "behaviour_gpt.convert", "roundtrip"),
    ),
    "lora_moe": by_name(
        _check("router", "the reloaded router is the same", "behaviour_moe.router", "save"),
        _check("skills", "the saved skill library is the same", "behaviour_moe.skills", "save"),
        _check("routing", "reloaded, each token has the same experts", "behaviour_moe.routing", "roundtrip"),
    ),
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
