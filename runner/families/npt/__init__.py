"""NPT: a Llama whose attention modulates the weights of its MLPs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from runner.families.family import Family

if TYPE_CHECKING:
    from torch import nn

    from runner.checkpoints.checkpoint import Checkpoint, Writer
    from runner.checks.check import Check
    from runner.checks.context import Bench
    from runner.checks.headers import Header
    from runner.config import Conversion
    from runner.evaluation.base_models import Base
    from runner.evaluation.placement import Placement
    from runner.merge.plan import MergeOutput
    from runner.merge.spec import MergeSpec


@dataclass(frozen=True, kw_only=True)
class Npt(Family):
    """NPT layers over a frozen Llama (npt_delta), or a complete model with them (npt_full)."""

    name: str = "npt"

    format_modules: ClassVar[tuple[str, ...]] = ("runner.families.npt.checkpoint", "runner.families.npt.full")
    base_type: ClassVar[str | None] = "llama"

    def needs_base(self, checkpoint: "Checkpoint") -> bool:
        """All but npt_full: a format of a user's own gives layers too."""
        return not self.is_made_from_base(checkpoint)

    def is_made_from_base(self, checkpoint: "Checkpoint") -> bool:
        """Whether it is an npt_full."""
        from runner.families.npt import full

        return checkpoint.format == full.NAME

    def can_be_spread(self, checkpoint: "Checkpoint") -> bool:
        """Always: it is a Llama."""
        return True

    def build(self, checkpoint: "Checkpoint", base: "Base | None", placement: "Placement") -> "nn.Module":
        """As `Family.build`: an `NptLlamaForCausalLM`."""
        from runner.evaluation.build import build

        return build(checkpoint, base, **vars(placement))

    def can_save(self, checkpoint: "Checkpoint") -> bool:
        """Both of its formats; those of a user's own are read only."""
        return checkpoint.format in {each.name for each in self.formats()}

    def save(self, checkpoint: "Checkpoint", model: "nn.Module", base: Path | None, target: Path) -> None:
        """As `Family.save`."""
        from runner.checks.saving import save_model

        save_model(checkpoint, model, base, target)

    def convert(self, checkpoint: "Checkpoint", wanted: "Conversion", target: Path) -> "Writer":
        """npt_delta to the other container; npt_full to a base and adapters apart."""
        return super().convert(checkpoint, wanted, target)

    def plan_merge(
        self, spec: "MergeSpec", paths: Sequence[Path], opened: "Sequence[Checkpoint]", base: str | None, output: Path
    ) -> "MergeOutput":
        """As `Family.plan_merge`: layers of several npt_delta checkpoints."""
        from runner.families.npt.merge import plan_merge

        return plan_merge(spec, paths, opened, base, output)

    def canonical_names(self, checkpoint: "Checkpoint") -> dict[str, str]:
        """As `Family.canonical_names`: npt_delta has two spellings."""
        from runner.families.npt.checkpoint import NAME, key

        names = super().canonical_names(checkpoint)
        if checkpoint.format != NAME:
            return names
        for layer in checkpoint.layers:
            for projection, matrices in layer.keys.items():
                for matrix, spelled in matrices.items():
                    for rank, name in enumerate(spelled):
                        del names[name]
                        names[key(layer.layer, layer.modulation, projection, matrix, rank, layer.num_ranks)] = name
        return names

    def checks(self) -> "Mapping[str, Check]":
        """As `Family.checks`."""
        from runner.checks.catalogue import OF_FAMILY

        return OF_FAMILY["npt"]

    def detect(self, path: Path, read_header: "Callable[[Path], Header]") -> str | None:
        """As `Family.detect`."""
        from runner.checks.detected import look

        found = look(path, read_header)
        return found.format if found.family == self.name else None

    def check_buildable(self, base: str | None) -> None:
        """Over any Llama."""

    def build_small(self, bench: "Bench") -> Path:
        """As `Family.build_small`."""
        from runner.checks.building import build

        return build(bench)
