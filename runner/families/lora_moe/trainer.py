"""transformers' Trainer for LoRA experts and their router: their loss, their batches, their checkpoints.

It never writes a merged model: what it trains, `CheckpointWriter` saves.
"""

import math
import random
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from torch.utils.data import DataLoader, Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from runner.errors import CheckpointError, ConfigError, DivergedError, ModelError
from runner.families.lora_moe.model import LoraMoeForCausalLM
from runner.families.lora_moe.save import save_moe
from runner.families.lora_moe.skills import Library
from runner.files.tensors import load_pickle
from runner.training.batches import rows_by_length
from runner.training.loop import LOG_EVERY, OnStep
from runner.training.optimization import DIVERGED, TrainingSettings, optimizer_and_schedule, require_finite
from runner.training.resume import load_optimizer, load_schedule

Row = Sequence[int]
# How much worse than the base alone, in nats a token, experts may be on the text that they are trained on.
WORSE = 1.0


class EqualLengthBatches(Sampler[list[int]]):
    """The numbers of the rows of each batch: all rows once an epoch, about `batch_size` of one length together."""

    def __init__(self, rows: Sequence[Row], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = [len(row) for row in rows], batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Make the next iteration that of `epoch`."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._batches())

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches())

    def _batches(self) -> list[list[int]]:
        return rows_by_length(self.lengths, self.batch_size, random.Random(f"{self.seed}/{self.epoch}"))


class RowLoader(DataLoader[Row]):
    """Batches {"input_ids": [B, T]} of `rows`. The Trainer says which epoch begins."""

    def __init__(self, rows: Sequence[Row], batches: EqualLengthBatches) -> None:
        super().__init__(rows, batch_sampler=batches, collate_fn=stack)  # type: ignore[arg-type]  # a list will do
        self.batches = batches

    def set_epoch(self, epoch: int) -> None:
        """Make the next iteration that of `epoch`."""
        self.batches.set_epoch(epoch)


def stack(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """Rows of one length as a batch {"input_ids": [B, T]}."""
    return {"input_ids": torch.tensor([list(row) for row in rows])}


class MoeTrainer(Trainer):
    """A Trainer that saves its own state only: what it trains, a callback saves (`CheckpointWriter`)."""

    def __init__(
        self,
        model: LoraMoeForCausalLM,
        rows: Sequence[Row],
        settings: TrainingSettings,
        scratch: Path,
        *,
        balance_weight: float,
    ) -> None:
        self.rows, self.settings, self.balance_weight = rows, settings, balance_weight
        self.figures: dict[str, float] = {}
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer, schedule = optimizer_and_schedule(parameters, settings, model.device)
        super().__init__(
            model=model,
            args=_arguments(model, settings, scratch),
            optimizers=(optimizer, schedule),
        )
        self.remove_callback(PrinterCallback)

    def get_train_dataloader(self) -> RowLoader:
        """Batches of one length, whose order depends on the seed and the epoch only."""
        return RowLoader(self.rows, EqualLengthBatches(self.rows, self.settings.batch_size, self.settings.seed))

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Cross-entropy of the next token in nats, and the balance loss times its weight.

        Raises DivergedError where it is not finite.
        """
        # Dropout must not depend on what was drawn before: a resumed training draws the same.
        torch.manual_seed((self.settings.seed * 1_000_003 + self.state.global_step) % 2**63)
        ids = inputs["input_ids"]
        output = model(ids)
        language = functional.cross_entropy(output.logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        loss = language + self.balance_weight * output.balance_loss
        use = output.expert_weights.detach().flatten(0, -2).mean(0).tolist()
        self.figures = {
            "loss": loss.item(),
            "cross_entropy": language.item(),
            "balance": output.balance_loss.item(),
            **{f"use_expert_{i}": share for i, share in enumerate(use)},
        }
        if not math.isfinite(self.figures["loss"]):
            raise DivergedError(f"the loss is no longer finite at step {self.state.global_step + 1}: {DIVERGED}")
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The figures of this step; the Trainer's mean loss since its last row would depend on where it resumed."""
        super().log({**logs, **self.figures} if "loss" in logs else logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Nothing but the directory: the Trainer would write the base with all experts into it, gigabytes."""
        Path(output_dir or self.args.output_dir or ".").mkdir(parents=True, exist_ok=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing: the model came from the checkpoint already, every key accounted for."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As the Trainer does, but read as every other file from outside is."""
        if checkpoint is None:
            return
        targets: dict[str, tuple[Callable[[Any, Any], None], Any]] = {
            OPTIMIZER_NAME: (load_optimizer, self.optimizer),
            SCHEDULER_NAME: (load_schedule, self.lr_scheduler),
        }
        for name, (load, target) in targets.items():
            path = Path(checkpoint) / name
            state = load_pickle(path, tensors="mmap")
            try:
                load(target, state)
            except ModelError as error:
                raise CheckpointError(f"{path}: is no state of this training: {error}") from error

    def _save_rng_state(self, output_dir: str) -> None:
        """Nothing: every step seeds itself."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing: every step seeds itself."""


def _arguments(model: LoraMoeForCausalLM, settings: TrainingSettings, scratch: Path) -> TrainingArguments:
    device = model.device
    if device.index:
        raise ConfigError(
            f"device={device}: experts are trained on the first device; set CUDA_VISIBLE_DEVICES={device.index} and "
            "give device=cuda"
        )
    arguments = TrainingArguments(
        output_dir=str(scratch),
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        max_grad_norm=settings.gradient_clip_value,
        logging_steps=LOG_EVERY,
        logging_nan_inf_filter=False,
        log_level="error",
        save_strategy="steps",
        save_steps=settings.save_every,
        report_to="none",
        disable_tqdm=True,
        use_cpu=device.type == "cpu",
        use_cache=bool(getattr(model.config, "use_cache", False)),
        seed=settings.seed % 2**32,  # numpy takes no more
        remove_unused_columns=False,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # several would split each batch
    return arguments


class CheckpointWriter(TrainerCallback):
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


class StepReports(TrainerCallback):
    """Calls `on_step(step, {"loss", …})` after each step and `on_log(step, figures)` for each row of the log."""

    def __init__(
        self,
        trainer: MoeTrainer,
        on_step: OnStep | None,
        on_log: OnStep | None,
    ) -> None:
        self._trainer, self._on_step, self._on_log = trainer, on_step, on_log
        self.last: dict[str, float] = {}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Tell of the step; the last one is always logged."""
        if self._on_step is not None:
            self._on_step(state.global_step, self._trainer.figures)
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
        if self._on_log is not None:
            self._on_log(state.global_step, self.last)
