"""The contract: what tasks and engines ask a kind of model for.

One class a family, named by conf/family/<name>.yaml; `Auto` takes that of the checkpoint. The methods import what they
need when they are called, so a family costs nothing until it is used. What a family lacks raises ConfigError.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from runner.config import AUTO, implied_family
from runner.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from runner.checkpoints.checkpoint import Checkpoint, CheckpointFormat, Listing, Writer
    from runner.checks.context import Check, CheckContext, Example, Traits
    from runner.config import Conversion
    from runner.data.text import Data
    from runner.evaluation.base_models import Base
    from runner.evaluation.placement import Placement
    from runner.finetuning.low_rank import LowRankSettings
    from runner.merge.plan import MergeOutput
    from runner.merge.spec import MergeSpec
    from runner.training.inputs import Trained, TrainingInputs
    from runner.training.settings import TrainingSettings


@dataclass(frozen=True, kw_only=True)
class Family:
    """A kind of model. Its fields are the keys `family.…` of the command line.

    `device_map`: auto, or module → device, for a model (or the base it stands on) larger than one device.
    """

    name: str
    device_map: str | Mapping[str, int | str] | None = None

    # The modules that hold its formats, each as FORMATS.
    format_modules: ClassVar[tuple[str, ...]] = ()
    # Whether its text is measured with a tokenizer only; else seeded token ids stand for a text where there is none.
    needs_tokenizer: ClassVar[bool] = True
    # Whether `convert.vocab_size` means anything.
    can_cut_vocabulary: ClassVar[bool] = False
    # Whether its base must be a Llama.
    llama_base: ClassVar[bool] = False
    # Whether it is trained on text that need not fit into memory; else on documents that do.
    trains_on_streams: ClassVar[bool] = False

    # Whether its models give logits of tokens; a classifier does not.
    continues_text: ClassVar[bool] = True
    # The head of a fine-tuning that names none.
    classifier_head: ClassVar[str] = "linear"

    def of(self, checkpoint: "Checkpoint") -> "Family":
        """The family that works on `checkpoint`. Raises ConfigError where the checkpoint is of another one."""
        if checkpoint.family != self.name:
            raise ConfigError(
                f"family={self.name}, but {checkpoint.path} is of the family {checkpoint.family} "
                f"(format {checkpoint.format}: {checkpoint.evidence})"
            )
        return self

    def on(self, data: "Data | None") -> "Family":
        """The family with what the kind of data decides (None: there are none), where the user did not."""
        return self

    def of_reference(self, checkpoint: "Checkpoint") -> "Family":
        """The family that works on `checkpoint`, with which one of this family is compared. Raises ConfigError."""
        return Auto(device_map=self.device_map).of(checkpoint)

    def named(self, name: str) -> "Family":
        """The family `name`, with the settings here; any but `Auto` is the only one that it knows."""
        assert name == self.name, f"family={self.name} is not {name}"
        return self

    def formats(self) -> "tuple[CheckpointFormat, ...]":
        """The formats that its checkpoints have. Raises ConfigError for a module without FORMATS."""
        from runner.checkpoints.detect import formats_of

        return tuple(each for module in self.format_modules for each in formats_of(module))

    def may_hold(self, listing: "Listing", module: str) -> bool:
        """Whether a format of `module` could match: where names say no, it is not imported to look closer."""
        return True

    def likely_formats(self, listing: "Listing") -> "tuple[CheckpointFormat, ...]":
        """Those of `formats` that could match what lies there."""
        likely = {module for module in self.format_modules if self.may_hold(listing, module)}
        if likely == set(self.format_modules):
            return self.formats()
        from runner.checkpoints.detect import formats_of

        return tuple(each for module in self.format_modules if module in likely for each in formats_of(module))

    # Models.

    def needs_base(self, checkpoint: "Checkpoint") -> bool:
        """Whether the checkpoint holds only what is added to a base model."""
        return False

    def is_made_from_base(self, checkpoint: "Checkpoint") -> bool:
        """Whether a checkpoint that is complete by itself is compared with the base that it was made from."""
        return False

    def is_base(self, checkpoint: "Checkpoint") -> bool:
        """Whether the checkpoint is a base model itself: a plain one in a Hugging Face directory."""
        return False

    def can_be_spread(self, checkpoint: "Checkpoint") -> bool:
        """Whether its model can lie on several devices."""
        return False

    def load_base(self, checkpoint: "Checkpoint", base: str | Path | None, placement: "Placement") -> "Base | None":
        """The base model that the checkpoint needs to run, from `base` or as it names it; None where it needs none.

        Raises CheckpointError or ModelError, and ConfigError for a device_map that the family cannot follow.
        """
        from runner.evaluation import base_models

        if placement.device_map is not None and not self.can_be_spread(checkpoint):
            raise ConfigError(
                f"family.device_map: a checkpoint of the format {checkpoint.format} runs on one device; give device="
            )
        if not self.needs_base(checkpoint):
            return None
        return base_models.load_base(checkpoint, base, placement, llama=self.llama_base)

    def build(self, checkpoint: "Checkpoint", base: "Base | None", placement: "Placement") -> "nn.Module":
        """The checkpoint's model in evaluation mode; where it stands on `base` it shares the base's weights.

        `model(input_ids, attention_mask=None).logits` is [B, T, V]. Raises ModelError where the two do not fit,
        CheckpointError for missing or unknown keys and for NaN or Inf, which would make figures meaningless.
        """
        raise ConfigError(f"{checkpoint.path}: a checkpoint of the format {checkpoint.format} has no model here")

    def can_save(self, checkpoint: "Checkpoint") -> bool:
        """Whether a checkpoint of this format is written here, and not only read."""
        return False

    def save(self, checkpoint: "Checkpoint", model: "nn.Module", base: Path | None, target: Path) -> Path:
        """Write `model`, which was built from `checkpoint` on the base at `base`, into the new directory `target`.

        Returns the path of the checkpoint: `target`, or a directory in it.
        Raises CheckpointError where `target` cannot be written, RunnerError where the disk fails.
        """
        raise ConfigError(f"{checkpoint.format} checkpoints are read, never written")

    # Tasks.

    def convert(self, checkpoint: "Checkpoint", wanted: "Conversion", target: Path) -> "Writer":
        """What writes the checkpoint in the layout `wanted.to`. Raises ConfigError where there is none."""
        if wanted.to == "hf":
            raise ConfigError(f"convert.to=hf takes an npt_full apart; {checkpoint.path} is {checkpoint.format}")
        raise ConfigError(f"{checkpoint.path}: a {checkpoint.format} cannot be converted to {wanted.to}")

    def plan_merge(
        self, spec: "MergeSpec", paths: Sequence[Path], opened: "Sequence[Checkpoint]", base: str | None, output: Path
    ) -> "MergeOutput":
        """All that a merge of the checkpoints `opened`, found at `paths`, will write; no tensor is read.

        Raises CheckpointError or ConfigError where the merge is not possible.
        """
        raise ConfigError(f"{paths[0]}: checkpoints of the format {opened[0].format} cannot be merged")

    def canonical_names(self, checkpoint: "Checkpoint") -> dict[str, str]:
        """The one spelling of each tensor's name by which checkpoints are compared → its name in the file."""
        return {name: name for name in checkpoint.weights.infos}

    def check_training(self, settings: "TrainingSettings") -> None:
        """Raise ConfigError where the family's own keys and these `settings` contradict each other."""

    def training_texts(self, documents: Sequence[str], name: str | None) -> dict[str, list[str]]:
        """The documents of the file `name`, or, without one, of the built-in world, by what they are about."""
        return {name or "world": list(documents)}

    def train(self, inputs: "TrainingInputs") -> "Trained":
        """Train, leaving `checkpoint-<step>` directories. Raises CheckpointError, ConfigError or ModelError;
        DivergedError names the last good checkpoint."""
        raise ConfigError(f"family={self.name} cannot be trained")

    def add_low_rank(self, model: "nn.Module", settings: "LowRankSettings") -> list[str]:
        """Add low-rank updates to matrices of `model`; → the names of its new parameters. Raises ConfigError."""
        from runner.finetuning.low_rank import add_to_linears

        return add_to_linears(model, settings)

    # The checks of `task=test`.

    def checks(self) -> "Mapping[str, Check]":
        """The checks that only its checkpoints have, by name, a needed one before its users."""
        return {}

    def examples(self) -> "Mapping[str, Example]":
        """What writes a tiny checkpoint of each of its formats without torch, and names a file that it needs."""
        return {}

    def base_misfits(self, checkpoint: "Checkpoint", config: Mapping[str, Any]) -> list[str]:
        """In what the base with this config.json is another than the one that `checkpoint` was made for."""
        return []

    def traits(self, checkpoint: "Checkpoint") -> "Traits":
        """What sets its models apart in the checks of every model."""
        from runner.checks.context import Traits

        return Traits()

    def check_buildable(self, base: str | None) -> None:
        """Raise ConfigError where `build_small` cannot build over `base`."""
        raise ConfigError(f"family={self.name}: no small checkpoint is built of it; give ckpt=")

    def build_small(self, context: "CheckContext") -> Path:
        """A small checkpoint with random weights below the scratch directory, saved by the code of training."""
        raise ConfigError(f"family={self.name}: no small checkpoint is built of it; give ckpt=")


@dataclass(frozen=True, kw_only=True)
class Auto(Family):
    """The family of whatever checkpoint is opened; its settings are those that all families have."""

    name: str = AUTO

    def of(self, checkpoint: "Checkpoint") -> Family:
        """The family that the checkpoint's format belongs to, with the settings here."""
        try:
            return self.named(checkpoint.family)
        except ConfigError as error:
            raise ConfigError(f"{checkpoint.path} (format {checkpoint.format}): {error}") from error

    def named(self, name: str) -> Family:
        """The family `name`, with the settings here. Raises ConfigError where there is none."""
        from runner.checkpoints.detect import families

        known = families()
        if name not in known:
            raise ConfigError(f"no conf/family/*.yaml names the family {name}; there are {', '.join(known)}")
        family = known[name]
        assert isinstance(family, Family), f"conf/family/{name}.yaml: its _target_ is no Family"
        return family if self.device_map is None else replace(family, device_map=self.device_map)


def configured(options: Mapping[str, object]) -> Family:
    """The family that has the keys `family.…` of `options`, with them; `Auto` without any. Raises ConfigError."""
    if not options:
        return Auto()
    name = implied_family(options)
    if name is None or any(not key.startswith("family.") for key in options):
        raise ConfigError(f"{', '.join(options)}: no family has these keys; conf/family/ lists each one's")
    own: dict[str, Any] = {key.partition(".")[2]: value for key, value in options.items()}
    return replace(Auto().named(name), **own)
