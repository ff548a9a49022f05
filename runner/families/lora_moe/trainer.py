"""transformers' Trainer for LoRA experts and their router: their loss, their batches, and never a merged model."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import PrinterCallback, Trainer, TrainingArguments

from runner.errors import CheckpointError, ConfigError, DivergedError, ModelError
from runner.families.lora_moe.data import EqualLengthBatches, Row, RowLoader
from runner.families.lora_moe.initial import OPTIMIZER, SCHEDULER
from runner.families.lora_moe.model import LoraMoeForCausalLM
from runner.families.lora_moe.settings import MoeSettings
from runner.files.tensors import load_pickle
from runner.training.optimization import DIVERGED, load_optimizer, load_schedule, optimizer_and_schedule

# The trainer's own log has a row every so many steps, and one for the last.
LOG_EVERY = 10


class MoeTrainer(Trainer):
    """A Trainer that saves its own state only: what it trains, a callback saves (moe_callback.py)."""

    def __init__(
        self,
        model: LoraMoeForCausalLM,
        rows: Sequence[Row],
        settings: MoeSettings,
        scratch: Path,
    ) -> None:
        self.rows, self.settings = rows, settings
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
        """Cross-entropy of the next token in nats, and the balance loss as the settings weigh it.

        Raises DivergedError where it is not finite.
        """
        # Dropout must not depend on what was drawn before: a resumed training draws the same.
        torch.manual_seed((self.settings.seed * 1_000_003 + self.state.global_step) % 2**63)
        ids = inputs["input_ids"]
        output = model(ids)
        language = functional.cross_entropy(output.logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        loss = language + self.settings.balance_weight * output.balance_loss
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
            OPTIMIZER: (load_optimizer, self.optimizer),
            SCHEDULER: (load_schedule, self.lr_scheduler),
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


def _arguments(model: LoraMoeForCausalLM, settings: MoeSettings, scratch: Path) -> TrainingArguments:
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
