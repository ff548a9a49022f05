"""What a family is given to train something, and what it leaves."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from runner.evaluation.base_models import Base
from runner.training.distributed import ALONE, World
from runner.training.loop import OnStep
from runner.training.settings import TrainingSettings
from runner.training.sources import TextStream

# What looks at the model after a step: its figures go into the log.
Look = Callable[[int, nn.Module], Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class TrainingInputs:
    """What a training over `base` starts from, and who hears of it.

    Checkpoints go to `directory`/checkpoint-<step> and name their base `base_name`: a hub name, or a path that holds
    from the checkpoint. `texts`: token ids of the documents in memory, by what they are about, where there is no
    `stream`; `seed` orders them. `resume_from`: the checkpoint to go on from; `given`: the settings that the command
    line says, the others are as that checkpoint has them (None: all are given). `on_step` is called with the figures of
    each step, `on_log` with those of each row of the log; `measure` at every evaluation, `sample` as often as the
    settings say.
    """

    directory: Path
    base: Base
    base_name: str
    texts: Mapping[str, Sequence[Sequence[int]]]
    settings: TrainingSettings
    seed: int
    resume_from: Path | None
    on_step: OnStep
    on_log: OnStep
    stream: TextStream | None = None
    given: frozenset[str] | None = None
    world: World = ALONE
    measure: Look | None = None
    sample: Look | None = None


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a training left: checkpoints of `format`, the figures of the last step, what the reader should know.

    `step`: the last one; `best`: the checkpoint with the best evaluation; `interrupted`: whether it was asked to stop.
    `decided`: what was decided where it goes on from a checkpoint. `plan`: of a dry run, and nothing else then.
    """

    format: str
    step: int
    checkpoints: list[Path]
    figures: dict[str, float]
    findings: list[str] = field(default_factory=list)
    best: Path | None = None
    interrupted: bool = False
    skipped: int = 0
    decided: dict[str, object] = field(default_factory=dict)
    plan: dict[str, object] = field(default_factory=dict)

    def details(self) -> dict[str, object]:
        """What belongs into the result beside these."""
        found = {
            "best": str(self.best) if self.best else None,
            "interrupted": self.interrupted or None,
            "skipped_steps": self.skipped or None,
            "resumed": self.decided or None,
            "plan": self.plan or None,
        }
        return {name: value for name, value in found.items() if value is not None}
