"""What a check is, what it asks of the family that it tests, and what the checks of one run share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from runner.checkpoints.checkpoint import Checkpoint, CheckpointFormat, Listing
from runner.checkpoints.detect import families, finished, open_checkpoint, recognise
from runner.checkpoints.model_directory import MERGED_MODEL, has_tokenizer, open_model_weights, read_config
from runner.checkpoints.reading import Reading, read
from runner.config import AUTO, TestConfig
from runner.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from runner.evaluation.base_models import Base
    from runner.evaluation.placement import DeviceMap, Placement
    from runner.evaluation.tokenizers import TextTokenizer

Item = TypeVar("Item")
PASS, WARNING, FAIL, SKIPPED = "pass", "warning", "fail", "skipped"
STATUSES = (PASS, WARNING, FAIL, SKIPPED)
# The check that builds a checkpoint where none was named; a tier without it needs one.
BUILT = "built"
# The family that is built where none is named, and that of what is too damaged to show it.
DEFAULT_FAMILY, UNKNOWN = "npt", "unknown"
# The model, and what may hold the mapped file that it lies in.
MODEL = ("model", "checkpoint", "reading", "recognised")
# Of padded batches: the longest sequence, and the positions after it.
LONGEST = 32
PADDING = 3


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a check found, in one line of `details`.

    `score`: 0 to 1, of quality checks only. `data`: figures for machines (kept in `result.json`).
    """

    status: str
    details: str
    score: float | None = None
    recommendation: str | None = None
    data: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.status in STATUSES, self.status
        assert self.score is None or 0 <= self.score <= 1, self.score


@dataclass(frozen=True, kw_only=True)
class Check:
    """One check: `run` gives its outcome, or raises RunnerError, which is a failure with that message.

    `title` says in a few words what it looks at. `needs`: names of checks without whose success it means nothing; where
    one of them failed or was skipped it is skipped, so that a fault shows once. Those left out of the tier are no
    obstacle. `unless_failed`: the same, but such a check may have found nothing to look at. `unless_explained`: skipped
    where any check before it failed, which then says the same more clearly.
    """

    name: str
    title: str
    run: Callable[[CheckContext], Outcome]
    integrity: bool = True
    needs: tuple[str, ...] = ()
    unless_failed: tuple[str, ...] = ()
    unless_explained: bool = False


class Shows(Protocol):
    """What checks use of a task's context: the run's own directory, and items one by one under a progress bar."""

    @property
    def directory(self) -> Path: ...
    def track(self, items: Iterable[Item], what: str, total: int | None = None) -> Iterator[Item]: ...


# Writes a tiny checkpoint into a directory that it makes; the name of a file that it cannot do without.
Example = Callable[[Path], str]


class CheckedFamily(Protocol):
    """What the checks use of a family, which a task hands them; runner/families/family.py says what each does."""

    @property
    def name(self) -> str: ...
    @property
    def device_map(self) -> DeviceMap | None: ...
    def checks(self) -> Mapping[str, Check]: ...
    def examples(self) -> Mapping[str, Example]: ...
    def needs_base(self, checkpoint: Checkpoint) -> bool: ...
    def base_misfits(self, checkpoint: Checkpoint, config: Mapping[str, Any]) -> list[str]: ...
    def load_base(self, checkpoint: Checkpoint, base: str | Path | None, placement: Placement) -> Base | None: ...
    def build(self, checkpoint: Checkpoint, base: Base | None, placement: Placement) -> nn.Module: ...
    def can_save(self, checkpoint: Checkpoint) -> bool: ...
    def save(self, checkpoint: Checkpoint, model: nn.Module, base: Path | None, target: Path) -> Path: ...
    def check_buildable(self, base: str | None) -> None: ...
    def build_small(self, context: CheckContext) -> Path: ...
    def traits(self, checkpoint: Checkpoint) -> Traits: ...


class Traits:
    """What sets a family's models apart in the checks of every model; here that of a plain model, all of it trained."""

    # The bounds of its logits, where it caps them.
    logit_bounds: tuple[float, float] | None = None

    def is_trained(self, name: str) -> bool:
        """Whether training changes the parameter `name`."""
        return True

    def may_be_zero(self, name: str, trained: Mapping[str, nn.Parameter]) -> bool:
        """Whether a gradient of `name` that is all zero follows from other factors of a product that are zero."""
        return any(not bool(parameter.any()) for parameter in trained.values())

    def comparable(self, model: nn.Module, alone: Any, together: Any, row: int, length: int) -> int:
        """How many tokens of a sequence, `row` of a batch, must have the same logits `together` as `alone`."""
        return length

    def loss(self, output: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """What training minimises, of a batch [B, T]: the mean cross-entropy of the next token, and a router's balance
        loss."""
        from torch.nn.functional import cross_entropy

        targets = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
        loss = cross_entropy(output.logits[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=-100)
        balance = getattr(output, "balance_loss", None)
        return loss if balance is None else loss + balance


# Its members import torch when they are used: the quick tier has no use for it.
@dataclass(kw_only=True)
class CheckContext:
    """`path`: the checkpoint that was named, or None; `scratch`: an empty directory for what the checks write.

    The models stay in memory until `free` is called, or the run ends.
    """

    config: TestConfig
    shows: Shows
    path: Path | None
    scratch: Path

    @cached_property
    def families(self) -> Mapping[str, CheckedFamily]:
        """Every family, by name."""
        known: Mapping[str, Any] = families()
        return known

    @property
    def has_checkpoint(self) -> bool:
        """Whether a checkpoint is tested, and not the machine alone."""
        return self.path is not None or BUILT in self.config.tier.checks

    @cached_property
    def family(self) -> CheckedFamily | None:
        """The family that is tested, told without torch where that can be; None without a checkpoint or for an unknown.

        Raises CheckpointError where nothing at `path` could be a checkpoint, ConfigError where it is of another family
        than was asked for.
        """
        wanted = None if self.config.family.name == AUTO else self.config.family.name
        if self.path is None:
            return self._family(wanted or DEFAULT_FAMILY) if self.has_checkpoint else None
        found = self.format.family if self.format is not None else None
        if wanted is not None and found not in (wanted, None):
            raise ConfigError(f"family={wanted}, but {self.path} is of the family {found}")
        name = found or wanted
        return None if name is None else self._family(name)

    def _family(self, name: str) -> CheckedFamily:
        family: CheckedFamily = self.config.family.named(name)
        return family

    @property
    def family_name(self) -> str | None:
        """The name of the family for a result; None where no checkpoint is tested."""
        if not self.has_checkpoint:
            return None
        return UNKNOWN if self.family is None else self.family.name

    @property
    def own_family(self) -> CheckedFamily:
        """The family of a checkpoint that was recognised."""
        assert self.family is not None, "only a checkpoint that opens has a model"
        return self.family

    @property
    def subject(self) -> Path:
        """The checkpoint that is tested: the one that was named, else `built`."""
        return self.built if self.path is None else self.path

    @cached_property
    def recognised(self) -> tuple[Listing, CheckpointFormat | None]:
        """What `subject` is, and the format that it shows itself to be, however damaged. Raises CheckpointError."""
        return recognise(self.subject, self.config.format.name, self.config.format.module, self.config.family)

    @property
    def format(self) -> CheckpointFormat | None:
        """The format that the checkpoint shows itself to be."""
        return self.recognised[1]

    @cached_property
    def reading(self) -> Reading:
        """What the format's reader finds, part by part."""
        return read(*self.recognised)

    @property
    def directory(self) -> Path:
        """Where the checkpoint's files lie."""
        path = self.reading.path
        return path if path.is_dir() else path.parent

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """`subject`, from headers. Raises CheckpointError where it cannot be opened."""
        if self.format is None:
            return open_checkpoint(self.subject)
        return finished(self.reading.open())

    @cached_property
    def built(self) -> Path:
        """A small checkpoint of the family that was asked for, saved by the code that training uses."""
        return self.own_family.build_small(self)

    @cached_property
    def saved(self) -> Path:
        """Where the checkpoint lies, loaded and saved again below `scratch`. Raises what the saver raises."""
        base = self.own.path if self.own else None
        return self.own_family.save(self.checkpoint, self.model, base, self.scratch / "saved")

    @cached_property
    def placement(self) -> Placement:
        """Where and in what precision models are built."""
        from runner.evaluation.placement import Placement

        spread = self.config.family.device_map
        return Placement(device=self.config.device, dtype=self.config.dtype, device_map=spread)

    @cached_property
    def own(self) -> Base | None:
        """The base that the checkpoint's format needs to run; None for one that is complete by itself."""
        return self.own_family.load_base(self.checkpoint, self.config.base, self.placement)

    def base_path(self) -> Path:
        """The directory of the base that `base=` or the checkpoint names. Raises CheckpointError where it is not here.

        Only headers are read.
        """
        checkpoint = self.reading.checkpoint
        if self.config.base is not None:
            path = Path(self.config.base).expanduser()
        elif checkpoint is None or not checkpoint.base_name:
            raise CheckpointError("it names no base model; give it as base=")
        else:
            path = checkpoint.local_base() or Path(checkpoint.base_name)
        if not (path / "config.json").is_file():
            raise CheckpointError(f"its base model {path} does not lie here; give it as base=")
        return path

    @cached_property
    def model(self) -> nn.Module:
        """The checkpoint's model in evaluation mode."""
        return self.own_family.build(self.checkpoint, self.own, self.placement)

    @cached_property
    def reloaded(self) -> nn.Module:
        """A fresh model built from `saved`: it shares nothing with `model`, whose base a saver may have changed."""
        checkpoint = open_checkpoint(self.saved, self.checkpoint.format, self.config.format.module)
        base = None if self.own is None else fresh(self.own, self.placement)
        return self.own_family.build(checkpoint, base, self.placement)

    @cached_property
    def tokenizer(self) -> TextTokenizer | None:
        """The tokenizer of the checkpoint, its base, or `tokenizer=`; None where there is none."""
        from runner.evaluation.tokenizers import load_tokenizer

        directories = [self.checkpoint.directory, *([self.own.path] if self.own else [])]
        if self.config.tokenizer is None and not any(map(has_tokenizer, directories)):
            return None
        return load_tokenizer(self.config.tokenizer, directories)

    # Token ids that the model is run on.

    def prompt_ids(self, text: str) -> torch.Tensor:
        """Token ids [T] of `text`, or what stands for it where there is no tokenizer."""
        from runner.evaluation.evaluator import Evaluator

        return Evaluator(model=self.model, tokenizer=self.tokenizer, seed=self.config.seed).encode(text)

    def prompts(self) -> list[torch.Tensor]:
        """The token ids [T] of each of `data.prompts`."""
        return [self.prompt_ids(text) for text in self.config.data.prompts]

    def long_ids(self) -> torch.Tensor:
        """One sequence [T] of the tier's length or the model's maximum: short prompts hide broken rotary embeddings."""
        return self._seeded("a long sequence", self.config.tier.sequence_length)

    def ragged(self, count: int) -> list[torch.Tensor]:
        """`count` sequences [T], the longest first, each with room for padding within the model's maximum."""
        from runner.evaluation.forward import limits

        longest = limits(self.model)[1]
        longest = LONGEST if longest is None else max(1, min(LONGEST, longest - PADDING))
        lengths = [max(1, longest - i * longest // count) for i in range(count)]
        return [self._seeded(f"sequence {i}", length) for i, length in enumerate(lengths)]

    def _seeded(self, text: str, length: int) -> torch.Tensor:
        """Token ids [T] that stand for `text`: `length`, or as many as the model takes."""
        from runner.evaluation.forward import limits
        from runner.evaluation.tokenizers import seeded_ids

        vocab_size, longest = limits(self.model)
        return seeded_ids(text, vocab_size, min(length, longest or length), self.config.seed)

    def free_all(self) -> None:
        """Forget every model."""
        self.free("reloaded", "own", *MODEL)

    def free(self, *names: str) -> None:
        """Forget what was made under these names; it is made again if it is asked for."""
        for name in names:
            self.__dict__.pop(name, None)


def fresh(base: Base, placement: Placement) -> Base:
    """The same base, read from its files once more."""
    from runner.evaluation.base_models import build_plain

    weights = open_model_weights(base.path)
    model = build_plain(read_config(base.path), weights, weights.infos, placement)
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


def check_buildable(context: CheckContext) -> None:
    """Raise ConfigError, or CheckpointError for a base that is not there, where `built` cannot be what is asked for."""
    base = context.config.base
    context.own_family.check_buildable(base)
    if base is not None:
        from runner.evaluation.base_models import find_base

        find_base(None, base)
