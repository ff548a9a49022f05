"""What a Trainer's callback adds to the training of experts: their checkpoints, and news of each step."""

import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from runner.errors import DivergedError
from runner.families.lora_moe.model import LoraMoeForCausalLM
from runner.families.lora_moe.save import save_moe
from runner.families.lora_moe.skills import Library
from runner.training.optimization import DIVERGED, require_finite

# How much worse than the base alone, in nats a token, experts may be on the text that they are trained on.
WORSE = 1.0


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
        train_dataloader: Iterable[Mapping[str, torch.Tensor]] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the checkpoint of the step that was just taken. Raises DivergedError for what is not worth keeping."""
        assert model is not None, "the Trainer gives its model"
        assert train_dataloader is not None, "and what it trains on"
        require_finite((parameter for parameter in model.parameters() if parameter.requires_grad), state.global_step)
        require_learning(model, next(iter(train_dataloader))["input_ids"].to(model.device), state.global_step)
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


@torch.no_grad()
def require_learning(model: LoraMoeForCausalLM, ids: torch.Tensor, step: int) -> None:
    """Raise DivergedError where on `ids` [B, T] the logits are not finite or all equal, or much worse than the base's.

    The model is run as whoever opens the checkpoint runs it, in evaluation mode, and is left in its own mode.
    """
    before = model.training
    model.eval()
    try:
        logits = model(ids).logits.float()
        own = _cross_entropy(logits, ids)
        with model.experts(False):
            base = _cross_entropy(model(ids).logits.float(), ids)
    finally:
        model.train(before)
    if not math.isfinite(own):
        raise DivergedError(f"the logits are not finite after step {step}, not saved: {DIVERGED}")
    if bool(logits.amax() == logits.amin()):
        raise DivergedError(f"all logits are equal after step {step}, not saved: {DIVERGED}")
    if own > base + WORSE:
        raise DivergedError(
            f"the training diverged: after step {step} the cross-entropy is {own:.2f} nats a token, without the "
            f"experts {base:.2f}; not saved: {DIVERGED}"
        )


def _cross_entropy(logits: torch.Tensor, ids: torch.Tensor) -> float:
    """Of the next token, in nats, from logits [B, T, V]."""
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()


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
