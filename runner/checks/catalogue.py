"""Which checks there are, by the names that a tier lists. Nothing heavy is imported until a check runs."""

from collections.abc import Callable, Iterable
from importlib import import_module

from runner.checks.check import Check, Outcome
from runner.checks.context import BUILT, Bench
from runner.errors import ConfigError, did_you_mean

# The checks of a checkpoint's parts: where one of them fails, what opens it as a whole would only fail again.
PARTS = ("files", "config", "layout", "experts", "gate", "adapters", "blocks", "keys", "shapes", "hidden_size",
         "skill_library")  # fmt: skip


def late(place: str) -> Callable[[Bench], Outcome]:
    """`"checks.roundtrip.loading"`: `loading` of runner/checks/roundtrip.py, imported when it is called."""
    module, _, name = place.rpartition(".")

    def run(bench: Bench) -> Outcome:
        outcome: Outcome = getattr(import_module(f"runner.{module}"), name)(bench)
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
ENVIRONMENT = by_name(
    _check("versions", "the libraries and their versions", "checks.environment.versions"),
    _check("peft", "what the installed PEFT offers", "checks.environment.peft"),
    _check("safetensors", "written and read back equal", "checks.environment.safetensors"),
    _check("formats", "each layout is created and recognised", "checks.layouts.formats", "safetensors"),
    _check("writable", "outputs can be written, and there is room", "checks.environment.writable"),
)
# Of every checkpoint.
SHARED = by_name(
    _check(BUILT, "built and saved by the code of training", "checks.building.built"),
    _check("files", "each weights file is whole", "checks.structure.files", BUILT),
    _check("size", "as large as the shapes say, below the cap", "checks.structure.size", "files"),
    _check(
        "base",
        "the base that it names fits",
        "checks.structure.base",
        "keys",
        "shapes",
        "adapters",
        "layout",
        "hidden_size",
    ),
    _check("loading", "opened by its format, every key accounted for", "checks.structure.loading", *PARTS),
    Check(
        name="hashes",
        title="as it was written: manifest and CRCs",
        run=late("checks.structure.hashes"),
        needs=("files",),
        unless_explained=True,
    ),
    _check("finite", "no NaN or Inf in the weights", "checks.structure.finite", "loading"),
    Check(
        name="model",
        title="the model is built, strictly",
        run=late("checks.behaviour.build"),
        needs=("loading", "finite"),
        # A base that is not here yet, a hub's, is loaded all the same.
        unless_failed=("base",),
    ),
    _check("forward", "finite logits, short and long", "checks.behaviour.forward", "model"),
    _check("save", "saved again, it has the same names and shapes", "checks.roundtrip.save", "model"),
    _check(
        "roundtrip", "reloaded, it gives the same logits", "checks.roundtrip.roundtrip", "forward", "save", "router"
    ),
    _check("batch", "padded batches give the logits of each alone", "checks.behaviour.batch", "forward"),
    _check("gradients", "they reach what should train", "checks.learning.gradients", "forward", "modes"),
    _check("optimizer_step", "a step changes nothing else", "checks.learning.optimizer_step", "gradients"),
)
# Of the checkpoints of one family.
OF_FAMILY = {
    "npt": by_name(
        _check("config", "config.json of a complete model", "families.npt.checks.config", BUILT),
        _check("keys", "every NPT layer whole, nothing else", "families.npt.checks.keys", "files", "config"),
        _check("shapes", "the layers' matrices fit each other", "families.npt.checks.shapes", "keys"),
        _check("pollution", "no merged model beside the weights", "families.npt.checks.pollution", BUILT),
        _check("modes", "switching modes leaves nothing behind", "families.npt.checks.modes", "forward"),
        _check("control", "all layers standard: the plain model", "families.npt.checks.control", "modes"),
        _quality("fidelity", "logits against the base's", "checks.quality.fidelity", "control"),
        _quality("layers", "each NPT layer alone", "checks.quality.layers", "control"),
        _quality("progressive", "the lowest n NPT layers", "checks.quality.progressive", "control"),
        _quality("generation", "continuations against the base's", "checks.quality.generation", "control"),
    ),
    "gpt": by_name(
        _check("blocks", "an even number, block 7 without attention", "families.gpt.checks.blocks", "files"),
        _check("keys", "every tensor, nothing else", "families.gpt.checks.keys", "blocks"),
        _check("shapes", "widths, heads and scalars fit", "families.gpt.checks.shapes", "keys"),
        _check("convert", "converted there and back", "families.gpt.checks.convert", "roundtrip"),
    ),
    "lora_moe": by_name(
        _check("config", "config.json says how many experts", "families.lora_moe.checks.config", BUILT),
        _check("layout", "each adapter nested or flat, not both", "families.lora_moe.checks.layout", BUILT),
        _check("gate", "one router, weight and bias", "families.lora_moe.checks.gate", "files"),
        _check(
            "experts",
            "config, router and adapters agree",
            "families.lora_moe.checks.experts",
            "config",
            "layout",
            "gate",
        ),
        _check(
            "adapters", "each expert has config and weights", "families.lora_moe.checks.adapters", "files", "layout"
        ),
        _check("keys", "every A and B, nothing else", "families.lora_moe.checks.keys", "adapters"),
        _check("shapes", "ranks as the configs say", "families.lora_moe.checks.shapes", "adapters"),
        _check(
            "hidden_size",
            "router and adapters fit each other",
            "families.lora_moe.checks.hidden_size",
            "gate",
            "shapes",
        ),
        _check(
            "skill_library",
            "embeddings of the hidden size",
            "families.lora_moe.checks.skill_library",
            "files",
            "hidden_size",
        ),
        _check("pollution", "no merged model beside the adapters", "families.lora_moe.checks.pollution", BUILT),
        _check("router", "the reloaded router is the same", "families.lora_moe.checks.router", "save"),
        _check("skills", "the saved skill library is the same", "families.lora_moe.checks.skills", "save"),
        _check("routing", "reloaded, each token has the same experts", "families.lora_moe.checks.routing", "roundtrip"),
    ),
    "hf": by_name(
        _check("config", "config.json describes a model", "families.hf.checks.config", BUILT),
        _check("adapters", "the adapter has config and weights", "families.hf.checks.adapters", "files"),
        _check("keys", "every tensor, nothing else", "families.hf.checks.keys", "files", "config", "adapters"),
        _check("shapes", "shapes as the config says", "families.hf.checks.shapes", "keys"),
        _check("pollution", "no merged model beside an adapter", "families.hf.checks.pollution", BUILT),
    ),
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
