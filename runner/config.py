"""The typed root of every task's config. Hydra and OmegaConf are imported by what needs them: `--help` does not."""

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, TypeAlias, Union, get_args, get_origin, get_type_hints

from runner.errors import ConfigError, did_you_mean
from runner.installation import config_directory

if TYPE_CHECKING:
    from omegaconf import DictConfig

# What OmegaConf takes for a value that is yet to be given: `omegaconf.MISSING`.
MISSING: Any = "???"
# The family of whatever checkpoint is opened.
AUTO = "auto"
# `reference=base`: what the checkpoint stands on, or was made from.
BASE = "base"


def config_directories() -> tuple[Path, ...]:
    """conf/, and the directory that --config-dir names where there is one."""
    if "hydra" not in sys.modules:
        return (config_directory(),)
    from hydra.core.hydra_config import HydraConfig

    sources = HydraConfig.get().runtime.config_sources if HydraConfig.initialized() else []
    given = [Path(source.path).resolve() for source in sources if source.schema == "file"]
    return tuple(dict.fromkeys((config_directory(), *given)))


def group_files(group: str) -> dict[str, Path]:
    """The YAML of each choice of a group by its name, those of --config-dir included."""
    return {
        file.stem: file for directory in config_directories() for file in sorted((directory / group).glob("*.yaml"))
    }


def keys_below(root: str, task: str) -> list[str]:
    """The keys `root.…` that the config files give a task: those of its own file, and of the group of that name."""
    directory = config_directory()
    own = directory / "task" / f"{task}.yaml"
    nodes = [_mapping(own).get(root)] if own.is_file() else []
    nodes += map(_mapping, sorted((directory / root).glob("*.yaml")))
    names = {name for node in nodes if isinstance(node, dict) for name in node}
    return [f"{root}.{name}" for name in sorted(names - {"defaults", "_target_"})]


def given_below(root: str) -> frozenset[str] | None:
    """The keys of the node `root` that the command line of this job says itself; None outside of one.

    What follows from another key of that name, as `train.seed` from `seed`, counts as said with it.
    """
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized():
        return None
    keys = [override.partition("=")[0].lstrip("+~") for override in HydraConfig.get().overrides.task]
    nested = {key.split(".")[1] for key in keys if key.startswith(f"{root}.")}
    return frozenset(nested | {key for key in keys if "." not in key})


def implied_family(keys: Iterable[str]) -> str | None:
    """The only family that has all of the `family.…` among `keys`; None where they do not say one.

    None as well where `family` itself is among them, or the default family has them.
    """
    wanted = {key.partition(".")[2] for key in keys if key.startswith("family.")}
    if not wanted or "family" in keys:
        return None
    owners = [name for name, file in group_files("family").items() if wanted <= _mapping(file).keys()]
    return owners[0] if len(owners) == 1 else None


def _mapping(file: Path) -> dict[str, object]:
    import yaml

    return yaml.safe_load(file.read_text(encoding="utf-8")) or {}


# A group of conf/: a node while Hydra composes, and in a task's hands what its `_target_` builds.
Component: TypeAlias = Any


@dataclass
class CommonConfig:
    """What every task has."""

    task: str = MISSING
    seed: int = 0
    verbose: bool = False
    output: str | None = None
    cache: str | None = None
    tracker: Component = MISSING


@dataclass
class CheckpointConfig(CommonConfig):
    """What every task that opens a checkpoint has."""

    ckpt: str = "demo"
    step: Any = None
    family: Component = MISSING
    format: Component = MISSING


@dataclass
class InspectConfig(CheckpointConfig):
    """`task=inspect`."""


@dataclass
class RunningConfig(CommonConfig):
    """What every task that runs models has."""

    base: str | None = None
    tokenizer: str | None = None
    device: str = "auto"
    dtype: str = "float32"


@dataclass
class ModelConfig(CheckpointConfig, RunningConfig):
    """What every task that runs a checkpoint's model has."""


@dataclass
class DiagnoseConfig(ModelConfig):
    """`task=diagnose`."""

    reference: str | None = None
    accuracy: bool = True
    data: Component = MISSING
    tier: Component = MISSING
    verdict: Component = MISSING

    def __post_init__(self) -> None:
        if isinstance(self.tier, Tier) and not self.tier.measures:
            raise ConfigError(
                f"tier={self.tier.name} measures nothing: it is for task=test; take tier=quick or tier=full"
            )


@dataclass
class GenerateConfig(ModelConfig):
    """`task=generate`. Without `prompt` and `prompts` it is a chat."""

    reference: str | None = None
    prompt: Any = None
    prompts: str | None = None
    generate: Component = MISSING

    @property
    def accuracy(self) -> bool:
        """Whether anything is compared."""
        return self.reference is not None


@dataclass
class TransferConfig(ModelConfig):
    """`task=transfer`. `data.prompts`: what a transfer should leave as it is."""

    data: Component = MISSING
    transfer: Component = MISSING


@dataclass
class TestConfig(ModelConfig):
    """`task=test`. Without `ckpt` the tiers that need a checkpoint build one, with `experts` where it has experts."""

    __test__ = False  # for pytest: no class of tests

    ckpt: str | None = None  # type: ignore[assignment]  # only here a checkpoint may be left out
    data: Component = MISSING
    tier: Component = MISSING
    verdict: Component = MISSING
    experts: int = 2
    keep: bool = False
    strict: bool = False
    junit: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.experts, int) and self.experts < 1:
            raise ConfigError(f"experts={self.experts}: must be at least 1")


@dataclass
class ConvertConfig(CheckpointConfig):
    """`task=convert`."""

    convert: Component = MISSING


@dataclass
class MergeConfig(RunningConfig):
    """`task=merge`; all but `merge` is for `merge.verify=functional`, which runs the models."""

    merge: Component = MISSING
    data: Component = MISSING
    tier: Component = MISSING
    verdict: Component = MISSING


@dataclass
class VerifyConfig(CheckpointConfig):
    """`task=verify`."""

    strict: bool = False


@dataclass
class DiffConfig(CheckpointConfig):
    """`task=diff`."""

    base: str | None = None
    reference: str | None = None


@dataclass
class TrainConfig(RunningConfig):
    """`task=train`; `family` chooses what is trained, and so the keys of `train`."""

    family: Component = MISSING
    data: Component = MISSING
    train: Component = field(default_factory=dict)


@dataclass
class FinetuneConfig(ModelConfig):
    """`task=finetune`; `train` and `data` are the same for every family."""

    ckpt: str | None = None  # type: ignore[assignment]  # of train.resume_from: as that run says
    data: Component = MISSING
    train: Component = MISSING


@dataclass
class SweepConfig(CommonConfig):
    """`task=compare` and `task=panels`; `sweep`: a directory or a list of several."""

    sweep: Any = None

    def directories(self) -> list[Path]:
        """The sweeps that are named. Raises ConfigError where none is."""
        paths = [Path(str(path)).expanduser() for path in _as_list(self.sweep) if path]
        if not paths:
            raise ConfigError("sweep= is needed: the directory of a sweep, or a list of them: sweep=[A,B]")
        return paths


def _as_list(value: object) -> Sequence[object]:
    return value if isinstance(value, (list, tuple)) else [value]


TASKS: dict[str, type[CommonConfig]] = {
    "diagnose": DiagnoseConfig,
    "inspect": InspectConfig,
    "convert": ConvertConfig,
    "merge": MergeConfig,
    "verify": VerifyConfig,
    "diff": DiffConfig,
    "test": TestConfig,
    "train": TrainConfig,
    "finetune": FinetuneConfig,
    "generate": GenerateConfig,
    "transfer": TransferConfig,
    "compare": SweepConfig,
    "panels": SweepConfig,
}
PATH_KEYS = {
    "ckpt", "base", "reference", "tokenizer", "output", "cache", "data.path", "tracker.dir", "train.resume_from",
    "data.train", "data.validation", "data.test",
    "prompts", "transfer.script", "transfer.session", "transfer.experiment",
    "convert.output", "merge.output", "merge.sources", "merge.base", "merge.file", "junit", "sweep",
    "hydra.run.dir", "hydra.sweep.dir",
}  # fmt: skip
# Keys whose value is text as it was typed: `1234e5`, `1_000` and `a, b` are no numbers and no list.
TEXT_KEYS = {
    "train.curriculum", "data.prompts", "data.layer_prompt", "tracker.name", "tracker.project", "tracker.entity",
    "data.separator", "prompt", "generate.system", "generate.stop",
}  # fmt: skip
# Keys that a group's choice sets for all tasks alike and that nobody overrides.
FIXED_KEYS = ("verdict",)


@dataclass(frozen=True, kw_only=True)
class Format:
    """A checkpoint format; `auto` lets names and shapes decide. `module`: where a format of your own lies."""

    name: str
    module: str | None = None


@dataclass(frozen=True, kw_only=True)
class Tier:
    """How much is measured (`measures`, read by diagnose) and checked (`checks`, read by test).

    `sequence_length`: tokens of text and of the long sequence; `new_tokens`: of each continuation, which is greedy and
    sampled at `temperatures`. `max_size_mb`: what adapters, experts and their router may have together, in 10⁶ bytes.
    """

    name: str
    measures: tuple[str, ...] = ()
    checks: tuple[str, ...] = ()
    sequence_length: int = 512
    new_tokens: int = 32
    temperatures: tuple[float, ...] = (0.7,)
    max_size_mb: float = 500

    def __post_init__(self) -> None:
        if (
            isinstance(self.max_size_mb, bool)
            or not isinstance(self.max_size_mb, (int, float))
            or self.max_size_mb <= 0
        ):
            raise ConfigError(f"tier.max_size_mb={self.max_size_mb}: give a number of megabytes above 0")
        known = (
            "load", "finite", "control", "logits", "isolation", "progressive", "additivity", "generation", "text",
            "floor",
        )  # fmt: skip
        for field_name in ("checks", "measures"):
            if not isinstance(names := getattr(self, field_name), (list, tuple)):
                raise ConfigError(f"tier.{field_name}: {names!r} is no list of names; write [{names}]")
        for name in self.measures:
            if name not in known:
                raise ConfigError(f"tier.measures: {name!r} is unknown{did_you_mean(name, known)}")
        for field_name, least in (("sequence_length", 2), ("new_tokens", 1)):
            count = getattr(self, field_name)
            if isinstance(count, bool) or not isinstance(count, int) or count < least:
                raise ConfigError(f"tier.{field_name}={count}: give a whole number, at least {least}")
        if not isinstance(self.temperatures, (list, tuple)) or not all(
            isinstance(each, (int, float)) and not isinstance(each, bool) and 0 < each < math.inf
            for each in self.temperatures
        ):
            raise ConfigError(f"tier.temperatures={self.temperatures}: give a list of numbers above 0")


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What `task=convert` writes: `to` safetensors or pt (the same checkpoint), or hf (base and adapters apart)."""

    to: str
    output: str
    vocab_size: int | None = None
    force: bool = False

    def __post_init__(self) -> None:
        if not self.output:
            raise ConfigError("convert.output is needed: the directory to write")
        if self.to == "torch":  # as the original of task=finetune is called
            object.__setattr__(self, "to", "pt")
        if self.to not in ("safetensors", "pt", "hf"):
            raise ConfigError(f"convert.to={self.to}: choose safetensors, pt or hf")
        if self.vocab_size is not None and self.vocab_size < 1:
            raise ConfigError(f"convert.vocab_size={self.vocab_size}: give the number of tokens to keep")


def list_keys(component: Any) -> list[str]:
    """The fields of a component, a dataclass, whose value is a list or a tuple; [] for anything else."""
    if not is_dataclass(component):
        return []
    hints = get_type_hints(component)
    return [each.name for each in fields(component) if each.init and _is_list(hints[each.name])]


def _is_list(hint: Any) -> bool:
    origin = get_origin(hint) or hint
    return origin in (tuple, list, Sequence) or (origin in (Union, UnionType) and any(map(_is_list, get_args(hint))))


def one_as_list(node: "DictConfig", keys: Iterable[str]) -> None:
    """Make a single value that `node` gives one of `keys` a list of that one: a text is one prompt, not its letters."""
    from omegaconf import OmegaConf

    for key in keys:
        value = None if key not in node or OmegaConf.is_missing(node, key) else node[key]
        if value is not None and not OmegaConf.is_list(value):
            node[key] = [value]


def register() -> None:
    """Put each task's typed root into Hydra's ConfigStore, where conf/task/<task>.yaml names it."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    for name, node in TASKS.items():
        store.store(group="schema", name=name, node=node, package="_global_")


def unknown_key(key: str, task: str) -> ConfigError:
    """The error for a `key` that `task` does not have."""
    own = _keys_of(task)
    root = key.partition(".")[0]
    if key.startswith("hydra.launcher."):
        return ConfigError(f"unknown key {key!r} of the launcher that is chosen; conf/hydra/launcher/ lists each one's")
    owners = [name for name in TASKS if root in _keys_of(name)]
    if owners and task not in owners:
        return ConfigError(f"{key} belongs to task={' and task='.join(owners)}, not to task={task}")
    known = keys_below(root, task) if "." in key and root in own else [n for n in own if n not in FIXED_KEYS]
    if key in known:
        group = "family" if root == "train" else root
        return ConfigError(f"{key} belongs to another {group} than the one chosen; choose it with {group}=…")
    return ConfigError(f"unknown key {key!r}{did_you_mean(key, known)}")


def check_keys(keys: Iterable[str], task: str) -> None:
    """Raise ConfigError for the first of `keys` that no config file gives `task`; not for one that is added with +."""
    if task not in TASKS:
        return
    for key in keys:
        root, _, below = key.partition(".")
        if not (root.isidentifier() and root not in ("hydra", "experiment")):
            continue
        known = keys_below(root, task) if below and not below.startswith("_") else []
        if root not in _keys_of(task) or (known and f"{root}.{below.partition('.')[0]}" not in known):
            raise unknown_key(key, task)


def missing_key(key: str) -> ConfigError:
    """The error for a key without a value."""
    return ConfigError(f"{key} is needed; give it as {key}=…")


# What is to be given where a value of another type was.
_WANTED: dict[object, str] = {bool: "give true or false", int: "give a whole number", float: "give a number"}


def refused(error: Exception, task: str, given: Mapping[str, str | None], *, multirun: bool) -> ConfigError:
    """What Hydra refuses, in one line that says what to do; `given`: the overrides as they were typed.

    Which key is at fault is told by the attributes of the exceptions, else by the keys and values themselves.
    """
    from hydra.errors import MissingConfigException, OverrideParseException
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        if group == "train":
            others = [name for name in error.options or () if name != "finetune"]  # which is a task of its own
            return ConfigError(f"family={choice} cannot be trained; choose {' or '.join(others)}")
        return ConfigError(f"{group}={choice} is no {group}{did_you_mean(choice, error.options or ())}")
    if isinstance(error, OverrideParseException):
        return ConfigError(f"{error.override}: cannot be read: {error.message.splitlines()[0]}")
    cause = error.__cause__ or error
    if isinstance(cause, OmegaConfBaseException) and cause.full_key:
        node = str(cause.full_key)
        key = max(
            (key.lstrip("+") for key in given if f"{key.lstrip('+')}.".startswith(f"{node}.")), key=len, default=node
        )
        if isinstance(cause, MissingMandatoryValue):
            return missing_key(node)
        if isinstance(cause, (ConfigAttributeError, ConfigKeyError)):
            return unknown_key(key, task)
        wanted = _WANTED.get(get_type_hints(TASKS[task]).get(key)) if task in TASKS else None
        return ConfigError(f"{key}={given.get(key)}: {wanted or str(cause).splitlines()[0]}")
    text = " ".join(str(error).split())
    for key, value in given.items():
        if key.startswith("+") and not key.startswith("++") and key[1:].partition(".")[0] in _keys_of(task):
            return ConfigError(f"{key}={value}: {key[1:]} is there already; write it without the +: {key[1:]}={value}")
        root = key.lstrip("+~").partition("@")[0]
        if root.partition(".")[0] not in (*_keys_of(task), "hydra", "experiment") and not root.startswith("hydra/"):
            return unknown_key(root, task)
        if not multirun and value is not None and key not in PATH_KEYS | TEXT_KEYS and is_sweep(f"{key}={value}"):
            return ConfigError(f"{key}={value}: several values are a sweep: add -m")
    return ConfigError(text)


def is_sweep(override: str) -> bool:
    """Whether Hydra takes an override for several values."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create().parse_override(override).is_sweep_override()


def _keys_of(task: str) -> list[str]:
    return [f.name for f in fields(TASKS[task])] if task in TASKS else []
