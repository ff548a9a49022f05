"""From a composed sweep to its list of jobs."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from runner.checkpoints.runs import step_in_name
from runner.overrides import CommandLine, unquoted
from runner.sweeps.plan import Job, Plan

_LONGEST_TAG = 60


def plan_of(config: DictConfig, loader: ConfigLoader, line: CommandLine) -> Plan:
    """The jobs of the sweep that Hydra composed `config` for: the product of all swept values, in Hydra's order."""
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(list(config.hydra.overrides.task))
    overrides = {each.get_key_element(): each for each in parsed}
    swept = [key for key, override in overrides.items() if override.is_sweep_override()]
    choices = [[(key, value) for value in _values(override)] for key, override in overrides.items()]
    jobs = []
    for number, chosen in enumerate(product(*choices)):
        directory = f"{number}_{_tag(dict(chosen), swept, config)}"
        jobs.append(Job(number=number, directory=directory, overrides=tuple(f"{k}={v}" for k, v in chosen)))
    return Plan(
        task=str(config.task),
        command=(*line.flags, *(key if value is None else f"{key}={value}" for key, value in line.overrides)),
        cwd=str(Path.cwd()),
        launcher=str(OmegaConf.select(config, "hydra.runtime.choices.hydra/launcher") or "basic"),
        jobs=tuple(jobs),
    )


def _values(override: Override) -> list[str]:
    """The values of one override as words, as Hydra's own sweeper spells them."""
    if override.is_sweep_override():
        return list(override.sweep_string_iterator())
    return [override.get_value_element_as_str()]


def _tag(values: dict[str, str], swept: Sequence[str], config: DictConfig) -> str:
    """A short name for a job's directory, of harmless characters: what is measured, then what else is swept."""
    ckpt = values.get("ckpt", OmegaConf.select(config, "ckpt"))
    step = values.get("step", OmegaConf.select(config, "step"))
    path = Path(unquoted(str(ckpt))) if ckpt is not None else Path(str(config.task))
    name = path.name
    if step not in (None, "null"):
        name += f"@{step}"
    elif step_in_name(name) is not None and path.parent.name:
        name = f"{path.parent.name}@{step_in_name(name)}"  # runs may have steps in common
    others = [Path(unquoted(values[key])).name for key in swept if key not in ("ckpt", "step")]
    tag = "_".join([name, *others])
    return "".join(c if c.isalnum() or c in "-_.@" else "_" for c in tag)[:_LONGEST_TAG]
