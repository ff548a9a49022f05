"""What the checks of one run share, each made when a check first asks for it."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from runner.checks.detected import MERGED_MODEL, Look, look, weight_files
from runner.checks.headers import Header, read_header
from runner.config import TestConfig
from runner.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from torch import nn

    from runner.checkpoints.checkpoint import Checkpoint
    from runner.evaluation.base_models import Base
    from runner.evaluation.placement import Placement

Item = TypeVar("Item")
# The check that builds a checkpoint where none was named; a tier without it needs one.
BUILT = "built"
# The family of what is too damaged to show it.
UNKNOWN = "unknown"


class Shows(Protocol):
    """What checks use of a task's context."""

    @property
    def directory(self) -> Path:
        """The run's own directory."""

    def track(self, items: Iterable[Item], what: str, total: int | None = None) -> Iterator[Item]:
        """The items one by one, under a progress bar."""


# Its members import torch when they are used: the quick tier has no use for it.
@dataclass(kw_only=True)
class Bench:
    """`path`: the checkpoint that was named, or None; `scratch`: an empty directory for what the checks write.

    The models stay in memory until `free` is called, or the run ends.
    """

    config: TestConfig
    context: Shows
    path: Path | None
    scratch: Path
    _headers: dict[tuple[Path, str], Header] = field(default_factory=dict, repr=False)

    @cached_property
    def family(self) -> str | None:
        """The family that is tested, told without torch where that can be; None where no checkpoint is.

        Raises CheckpointError where nothing at `path` could be a checkpoint, ConfigError where it is of another family
        than was asked for.
        """
        wanted = None if self.config.family.name == "auto" else self.config.family.name
        if self.path is None:
            return (wanted or "npt") if BUILT in self.config.tier.checks else None
        found = self.checkpoint.family if self.config.format.module else self.look.family
        if wanted is not None and found not in (wanted, None):
            raise ConfigError(f"family={wanted}, but {self.path} is of the family {found}")
        return found or wanted or UNKNOWN

    @property
    def subject(self) -> Path:
        """The checkpoint that is tested: the one that was named, else `built`."""
        return self.built if self.path is None else self.path

    @cached_property
    def look(self) -> Look:
        """What `subject` shows itself to be, however damaged. Raises CheckpointError."""
        if self.config.format.module:  # a format that only its own module knows
            return Look(path=self.subject, format=self.config.format.name)
        found = look(self.subject, self.header)
        return found if self.config.format.name == "auto" else replace(found, format=self.config.format.name)

    @cached_property
    def weights(self) -> Header:
        """The one weights file of a format that has one. Raises CheckpointError for none or several."""
        if len(self.files) != 1:
            held = ", ".join(file.name for file in self.files) or "none"
            raise CheckpointError(f"one weights file is needed, there is {held}")
        return self.header(self.files[0])

    @property
    def files(self) -> list[Path]:
        """The files that hold the weights."""
        return list(self.checkpoint.weights.files) if self.config.format.module else weight_files(self.look)

    def header(self, path: Path, state_dict_key: str = "model") -> Header:
        """The header of one weights file, read once; a training script's .pt has its tensors under "model".

        Raises as `read_header`.
        """
        key = (path, state_dict_key)
        if key not in self._headers:
            self._headers[key] = read_header(path, state_dict_key)
        return self._headers[key]

    def extras(self, path: Path, state_dict_key: str) -> dict[str, Any]:
        """What a .pt holds beside the tensors under `state_dict_key`."""
        from runner.files.tensors import open_weights

        return dict(open_weights(path, state_dict_key=state_dict_key).extras)

    @cached_property
    def built(self) -> Path:
        """A small checkpoint of the family that was asked for, saved by the code that training uses."""
        from runner.checks.building import build

        return build(self)

    @cached_property
    def saved(self) -> Path:
        """The checkpoint, loaded and saved again to `scratch`. Raises what the saver raises."""
        from runner.checks.roundtrip import save_copy

        return save_copy(self)

    @cached_property
    def checkpoint(self) -> "Checkpoint":
        """`subject`, from headers. Raises CheckpointError."""
        from runner.checkpoints.detect import open_checkpoint

        checkpoint = open_checkpoint(self.subject, self.config.format.name, self.config.format.module)
        wanted = self.config.family.name
        if wanted not in ("auto", checkpoint.family):
            raise ConfigError(f"family={wanted}, but {checkpoint.path} is of the family {checkpoint.family}")
        return checkpoint

    @property
    def placement(self) -> "Placement":
        """Where and in what precision models are built."""
        from runner.evaluation.placement import Placement

        spread = self.config.family.device_map
        return Placement(device=self.config.device, dtype=self.config.dtype, device_map=spread)

    @cached_property
    def own_family(self) -> Any:
        """The Family of the checkpoint, with the settings that were asked for."""
        return self.config.family.of(self.checkpoint)

    @cached_property
    def own(self) -> "Base | None":
        """The base that the checkpoint's format needs to run; None for one that is complete by itself."""
        base: Base | None = self.own_family.load_base(self.checkpoint, self.config.base, self.placement)
        return base

    @cached_property
    def model(self) -> "nn.Module":
        """The checkpoint's model in evaluation mode."""
        model: nn.Module = self.own_family.build(self.checkpoint, self.own, self.placement)
        return model

    @cached_property
    def reloaded(self) -> "nn.Module":
        """A fresh model built from `saved`: it shares nothing with `model`, whose base a saver may have changed."""
        from runner.checkpoints.detect import open_checkpoint

        checkpoint = open_checkpoint(self.saved, self.checkpoint.format, self.config.format.module)
        base = None if self.own is None else fresh(self.own, self.placement)
        model: nn.Module = self.own_family.build(checkpoint, base, self.placement)
        return model

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the checkpoint, its base, or `tokenizer=`; None where there is none."""
        from runner.checkpoints import model_directory as hf
        from runner.evaluation.tokenizers import load_tokenizer

        directories = [self.checkpoint.directory, *([self.own.path] if self.own else [])]
        if self.config.tokenizer is None and not any(map(hf.has_tokenizer, directories)):
            return None
        return load_tokenizer(self.config.tokenizer, directories)

    def free_all(self) -> None:
        """Forget every model."""
        self.free("model", "reloaded", "own", "checkpoint")

    def free(self, *names: str) -> None:
        """Forget what was made under these names; it is made again if it is asked for."""
        for name in names:
            self.__dict__.pop(name, None)


def fresh(base: "Base", placement: "Placement") -> "Base":
    """The same base, read from its files once more."""
    from runner.checkpoints import model_directory as hf
    from runner.evaluation.base_models import build_plain

    weights = hf.open_model_weights(base.path)
    model = build_plain(hf.read_config(base.path), weights, weights.infos, placement)
    return replace(base, model=model, key=(*base.key, "fresh"))


def check_base(given: str) -> None:
    """Raise ConfigError where the directory that base= names is none of a model; a hub name is for whoever loads it."""
    path = Path(given).expanduser()
    if not path.is_dir():
        from runner.evaluation.base_models import is_hub_name

        if path.exists() or not is_hub_name(given):
            raise ConfigError(f"base={given}: no such directory; a base model is a directory with config.json in it")
        return
    names = {entry.name for entry in path.iterdir()}
    if "config.json" not in names or not any(map(MERGED_MODEL.fullmatch, names)):
        raise ConfigError(f"base={given}: is no model: it needs config.json and weights (model.safetensors, …)")


def check_buildable(bench: Bench) -> None:
    """Raise ConfigError, or CheckpointError for a base that is not there, where `built` cannot be what is asked for."""
    family, base = bench.family, bench.config.base
    if family == "hf":
        raise ConfigError("family=hf: nothing is added to a plain model; give ckpt=, or family=npt, gpt or lora_moe")
    if family == "gpt" and base is not None:
        raise ConfigError("base= belongs to families that stand on a base; a gpt is complete by itself")
    if base is not None:
        from runner.evaluation.base_models import find_base

        find_base(None, base)
