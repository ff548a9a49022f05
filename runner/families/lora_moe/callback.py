"""What a Trainer's callback adds to the training of experts: their checkpoints, and news of each step."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from runner.errors import ModelError
from runner.families.lora_moe.model import LoraMoeForCausalLM
from runner.families.lora_moe.skills import Library
from runner.families.lora_moe.trained import save_moe
from runner.files.tensors import is_finite

DIVERGED = "give a smaller train.learning_rate or train.gradient_clip_value"


class MoeCheckpoints(TrainerCallback):
    """Writes `directory`/checkpoint-<step> at each save: the layout of spec/formats.md §4 with the Trainer's state.

    The Trainer leaves its own files in its output directory, which must not be `directory`; they are moved into the
    checkpoint before that is published, so that it appears whole. `written`: the checkpoints so far.
    """

    def __init__(self, directory: Path, *, base_name: str, skills: Library, recipe: Mapping[str, Any]) -> None:
        self.directory, self.base_name, self.skills, self.recipe = directory, base_name, skills, recipe
        self.written: list[Path] = []

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: LoraMoeForCausalLM | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the checkpoint of the step that was just taken. Raises ModelError where a weight is not finite."""
        assert model is not None, "the Trainer gives its model"
        if not all(map(is_finite, (parameter for parameter in model.parameters() if parameter.requires_grad))):
            raise ModelError(f"NaN or Inf in the weights after step {state.global_step}, not saved: {DIVERGED}")
        own = Path(args.output_dir or "") / f"checkpoint-{state.global_step}"
        target = self.directory / own.name

        def add_files(partial: Path) -> None:
            for file in sorted(own.iterdir()):
                shutil.move(file, partial / file.name)

        save_moe(
            model,
            target,
            base_name=self.base_name,
            step=state.global_step,
            skills=self.skills,
            recipe=self.recipe,
            add_files=add_files,
        )
        own.rmdir()
        self.written.append(target)


class News(TrainerCallback):
    """Calls `on_step(step, {"loss", …})` after each step and `on_log(step, figures)` for each row of the log."""

    def __init__(
        self,
        figures: Callable[[], Mapping[str, float]],
        on_step: Callable[[int, Mapping[str, float]], None] | None,
        on_log: Callable[[int, Mapping[str, float]], None] | None,
    ) -> None:
        self._figures, self._tell_step, self._tell_log = figures, on_step, on_log
        self.last: dict[str, float] = {}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Tell of the step; the last one is always logged."""
        if self._tell_step is not None:
            self._tell_step(state.global_step, self._figures())
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Tell of a row about steps; the row about the whole training's speed is not one."""
        if logs is None or "loss" not in logs:
            return
        self.last = {name: float(value) for name, value in logs.items()}
        if self._tell_log is not None:
            self._tell_log(state.global_step, self.last)
