"""Jobs one after the other in this process, as Hydra's basic launcher runs them, but for what they share.

Jobs that differ in nothing but checkpoint and step are composed once: each of the others gets its own two values.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus, configure_log
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from runner.overrides import unquoted
from runner.sweeps.plan import PlannedJob

# Keys that take any value: they cannot make a job that does not compose.
PLAIN = ("ckpt", "step")
Kind = tuple[str, ...]
_DUMPER: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


def kind_of(words: Sequence[str]) -> Kind:
    """What jobs that are composed once have in common, from the overrides of one."""
    return tuple(word for word in words if not _is_plain(word))


def _is_plain(word: str) -> bool:
    return word.partition("=")[0] in PLAIN


def composed_kinds(config: DictConfig, loader: ConfigLoader, jobs: Sequence[PlannedJob]) -> dict[Kind, DictConfig]:
    """The config of one job of each kind, without Hydra's own part. Raises what Hydra raises for one that is none."""
    kinds: dict[Kind, DictConfig] = {}
    for job in jobs:
        if (kind := kind_of(job.overrides)) not in kinds:
            kinds[kind] = loader.load_sweep_config(config, list(job.overrides))
            with read_write(kinds[kind]), open_dict(kinds[kind]):
                del kinds[kind]["hydra"]
    return kinds


def can_run(config: DictConfig) -> bool:
    """Whether the jobs ask Hydra for nothing that is not done here."""
    hydra = config.hydra
    asked = (hydra.callbacks, hydra.job.env_set, hydra.job.env_copy, hydra.job.chdir)
    return not any(asked) and hydra.output_subdir == ".hydra"


class Here(Launcher):
    """`config` is the sweep's, with Hydra's part; `kinds`: what its jobs are composed from."""

    def __init__(self, config: DictConfig, task_function: TaskFunction, kinds: Mapping[Kind, DictConfig]) -> None:
        self.config, self.task_function, self.kinds = config, task_function, kinds

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Nothing: it is made with all it needs."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs, each in the directory that its last override names."""
        own = copy.deepcopy(self.config)
        before = HydraConfig.instance().cfg
        returned = []
        try:
            for number, (*words, subdirectory) in enumerate(job_overrides, initial_job_idx):
                cfg = copy.deepcopy(self.kinds[kind_of(words)])
                for override in OverridesParser.create().parse_overrides(list(filter(_is_plain, words))):
                    OmegaConf.update(cfg, override.key_or_group, override.value())
                directory = Path(str(own.hydra.sweep.dir)) / unquoted(subdirectory.partition("=")[2])
                with read_write(own.hydra), open_dict(own.hydra):
                    own.hydra.job.id = own.hydra.job.num = number
                    own.hydra.sweep.subdir = directory.name
                    own.hydra.runtime.output_dir = str(directory.absolute())
                    own.hydra.overrides.task = words
                HydraConfig.instance().set_config(own)
                _write(directory / ".hydra", cfg, words)
                configure_log(own.hydra.job_logging, own.hydra.verbose)
                returned.append(_returned(self.task_function, cfg))
                configure_log(own.hydra.hydra_logging, own.hydra.verbose)
        finally:
            HydraConfig.instance().cfg = before
        return returned


def _returned(task: TaskFunction, cfg: DictConfig) -> JobReturn:
    try:
        return JobReturn(status=JobStatus.COMPLETED, _return_value=task(cfg))
    except Exception as error:
        return JobReturn(status=JobStatus.FAILED, _return_value=error)


def _write(directory: Path, cfg: DictConfig, words: list[str]) -> None:
    """The job's config as Hydra leaves it; Hydra's own stands once, in the sweep's multirun.yaml."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in (("config", OmegaConf.to_container(cfg)), ("overrides", words)):
        text = yaml.dump(content, Dumper=_DUMPER, sort_keys=False, allow_unicode=True)
        (directory / f"{name}.yaml").write_text(text, encoding="utf-8")
