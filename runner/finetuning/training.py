"""Fine-tuning under the loop of every training: steps, evaluations of the whole validation set, best and last kept."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR

from runner.errors import CheckpointError, ConfigError, ModelError
from runner.files.tensors import load_pickle
from runner.finetuning.classifier import Classifier
from runner.finetuning.rows import EpochBatches, LabelledBatch, TokenRows, by_length, padded, steps_in_epoch
from runner.finetuning.scope import Scope, groups
from runner.finetuning.settings import FinetuneSettings, steps
from runner.metrics.classification import SMALLER_IS_BETTER, confusion, figures
from runner.training.loop import Evaluation, Loop, LoopState, OnStep, Position, seeded
from runner.training.precision import Precision
from runner.training.resume import load_optimizer, load_schedule

BEST, LAST = "checkpoint-best", "checkpoint-last"
STATE_FILE = "training.pt"
# Writes a checkpoint: its path, the figures at that step, and what a training goes on from where it may.
Save = Callable[[Path, int, Mapping[str, float], "SavedState | None"], None]
SavedState = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A set of rows under a model: `logits` [N, C] in the rows' order, and what follows from them."""

    logits: torch.Tensor
    matrix: list[list[int]]
    figures: dict[str, float]

    @property
    def predictions(self) -> list[int]:
        """The class of each row."""
        return self.logits.argmax(1).tolist()

    @property
    def right(self) -> int:
        """How many rows are right."""
        return sum(row[i] for i, row in enumerate(self.matrix))


@torch.inference_mode()
def score(
    model: Classifier, rows: TokenRows, classes: int, batch_size: int, precision: Precision | None = None
) -> Scored:
    """Measure a set as a whole; the model is in evaluation mode meanwhile. The loss is the mean, unweighted."""
    was_training = [(module, module.training) for module in model.modules()]
    parts: dict[int, torch.Tensor] = {}
    model.eval()
    device = next(model.parameters()).device
    for numbers in by_length(rows, batch_size):
        ids, mask = (each.to(device) for each in padded([rows.ids[number] for number in numbers]))
        if precision is None:
            logits = model(ids, mask).logits
        else:
            with precision.passes():
                logits = model(ids, mask).logits
        parts |= dict(zip(numbers, logits.float().cpu(), strict=True))
    for module, training in was_training:
        module.training = training
    logits = torch.stack([parts[i] for i in range(len(rows.ids))])
    matrix = confusion(rows.labels, logits.argmax(1).tolist(), classes)
    loss = functional.cross_entropy(logits.double(), torch.tensor(rows.labels)).item()
    return Scored(logits=logits, matrix=matrix, figures={"loss": loss, **figures(matrix)})


@dataclass(frozen=True, kw_only=True)
class Finetuned:
    """How a fine-tuning ended: the evaluations in order, the best of them, and why it stopped."""

    step: int
    history: list[dict[str, float]]
    best: Mapping[str, float]
    reason: str
    interrupted: bool
    groups: list[dict[str, float | int | str]] = field(default_factory=list)


def class_weights(labels: Sequence[int], names: Sequence[str]) -> list[float]:
    """N / (C · n_c) of each class. Raises ConfigError for a class that no row has."""
    counts = [labels.count(i) for i in range(len(names))]
    if 0 in counts:
        raise ConfigError(
            f"train.class_weights=balanced: no training row is of the class {names[counts.index(0)]}, whose "
            "weight would not be finite"
        )
    return [len(labels) / (len(names) * count) for count in counts]


@dataclass(frozen=True, kw_only=True)
class FinetuneRun:
    """All that a fine-tuning is made of. `save` writes a checkpoint; `resume_from`: the one to go on from."""

    model: Classifier
    scope: Scope
    train: TokenRows
    validation: TokenRows
    labels: Sequence[str]
    settings: FinetuneSettings
    directory: Path
    save: Save
    on_step: OnStep | None = None
    on_log: OnStep | None = None
    resume_from: Path | None = None

    def run(self) -> Finetuned:
        """Take the steps. Raises DivergedError for a loss that is not finite, CheckpointError or ConfigError."""
        settings, model = self.settings, self.model
        device = next(model.parameters()).device
        per_epoch = steps_in_epoch(len(self.train.ids), settings.batch_size, settings.accumulation)
        counted = steps(settings, per_epoch)
        parts = groups(
            model, list(self.scope.trained.values()), rate=settings.learning_rate,
            backbone_scale=settings.backbone_scale, decay=settings.weight_decay,
        )  # fmt: skip
        optimizer = torch.optim.AdamW(
            parts, betas=settings.betas, eps=settings.epsilon, fused=device.type in ("cpu", "cuda")
        )
        schedule = LambdaLR(optimizer, settings.shares(settings.epochs * per_epoch))
        weights = class_weights(list(self.train.labels), self.labels) if settings.class_weights == "balanced" else None
        source = EpochBatches(
            self.train,
            size=settings.batch_size,
            accumulation=settings.accumulation,
            seed=settings.seed,
            weights=weights,
        )
        weight = None if weights is None else torch.tensor(weights, device=device)
        precision = Precision({"float32": "float32", "bfloat16": "bf16"}[settings.precision], device)
        history: list[dict[str, float]] = []
        improved: list[int] = []

        def losses(batch: LabelledBatch, step: int) -> dict[str, torch.Tensor]:
            logits = model(batch.ids.to(device), batch.mask.to(device)).logits
            loss = functional.cross_entropy(
                logits, batch.labels.to(device), weight, reduction="sum", label_smoothing=settings.label_smoothing
            )
            return {"loss": loss * batch.share}

        def evaluate(step: int) -> Evaluation:
            found = {"step": step, "epoch": step / per_epoch, **self.scored(precision).figures}
            before = best_of(history, settings.figure)
            history.append(found)
            if best_of(history, settings.figure) is not before:
                improved.append(step)
            if self.on_log is not None:
                self.on_log(step, {**{f"val/{name}": found[name] for name in _LOGGED}, "epoch": found["epoch"]})
            smaller = settings.figure in SMALLER_IS_BETTER
            value = found[settings.figure]
            return Evaluation(figures=found, score=value if smaller else -value, stop=self.patience_over(history))

        def save(step: int, state: LoopState) -> Path:
            kept = {**state, "history": history}
            current = history[-1] if history and history[-1]["step"] == step else {}
            if improved and improved[-1] == step:
                self.save(self.directory / BEST, step, current, None)
            self.save(self.directory / LAST, step, current, kept)
            return self.directory / LAST

        def on_log(step: int, row: Mapping[str, float]) -> None:
            if self.on_log is not None:
                share = schedule.lr_lambdas[0](step - 1)
                rates = {
                    f"lr/{group['name']}": float(rate * share)
                    for group, rate in zip(parts, schedule.base_lrs, strict=True)
                }
                own = {"train/loss": row["loss"], "train/grad_norm": row["gradient_norm"]}
                self.on_log(step, {**own, **rates, "epoch": step / per_epoch})

        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        loop = Loop(
            settings=counted, parameters=parameters, optimizer=optimizer, schedule=schedule, source=source,
            losses=losses, save=save, evaluate=evaluate, on_step=self.on_step, on_log=on_log, precision=precision,
            resume_from=self.resume_from,
        )  # fmt: skip
        with seeded(settings.seed, device):
            at = self._restored(loop, history) if self.resume_from is not None else Position()
            train_mode(model, settings)
            ended = loop.run(at)
        model.eval()
        best = best_of(history, settings.figure)
        if best is None:
            raise ModelError(f"no evaluation gave a finite {settings.metric}")
        return Finetuned(
            step=ended.step, history=history, best=best, interrupted=ended.interrupted,
            reason=self._reason(ended.step, ended.interrupted, counted.max_steps, per_epoch, history),
            groups=list(map(_described, parts)),
        )  # fmt: skip

    def scored(self, precision: Precision | None = None) -> Scored:
        """The validation rows as a whole."""
        return score(self.model, self.validation, len(self.labels), self.settings.eval_batch_size, precision)

    def patience_over(self, history: Sequence[Mapping[str, float]]) -> bool:
        """Whether as many evaluations in a row as `patience` says brought no improvement; ties bring none."""
        best = best_of(history, self.settings.figure)
        if self.settings.patience is None or best is None:
            return False
        return len(history) - 1 - next(i for i, row in enumerate(history) if row is best) >= self.settings.patience

    def _reason(self, step: int, interrupted: bool, last: int, per_epoch: int, history: Sequence[Any]) -> str:
        if interrupted:
            return f"interrupted after step {step}; train.resume_from={self.directory / LAST} goes on"
        if step < last:
            return f"no better {self.settings.metric} in {self.settings.patience} evaluations (train.patience)"
        if step < self.settings.epochs * per_epoch:
            return f"train.max_steps={self.settings.max_steps} reached"
        return f"all {self.settings.epochs} epochs done" if history else "nothing to do"

    def _restored(self, loop: Loop[LabelledBatch], history: list[dict[str, float]]) -> Position:
        """Optimizer, schedule, source, history and random state as the checkpoint says. Raises CheckpointError."""
        assert self.resume_from is not None
        state = read_state(self.resume_from)
        try:
            load_optimizer(loop.optimizer, state.get("optimizer_state_dict"))
            load_schedule(loop.schedule, state.get("scheduler_state_dict"))
            loop.source.restore(state["data_state"])
            history += [{str(name): float(value) for name, value in row.items()} for row in state["history"]]
        except (ModelError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{self.resume_from}: its state is none of this training: {error}") from error
        at = loop.restore(state)
        if at.step >= loop.settings.max_steps:
            raise ConfigError(
                f"train.resume_from={self.resume_from}: is at step {at.step} already; give more train.epochs"
            )
        return at


_LOGGED = ("loss", "accuracy", "balanced_accuracy", "macro_f1", "macro_f2")


def _described(group: Mapping[str, Any]) -> dict[str, float | int | str]:
    own = {"name": group["name"], "tensors": len(group["params"])}
    return {**own, "learning_rate": group["initial_lr"], "weight_decay": group["weight_decay"]}


def train_mode(model: Classifier, settings: FinetuneSettings) -> None:
    """Dropout in the head; the backbone runs as in evaluation, but for a router that is to train as in training."""
    model.train()
    model.backbone.train(settings.routing == "train")


def best_of(history: Sequence[Mapping[str, float]], figure: str) -> Mapping[str, float] | None:
    """The first evaluation with the best figure; None where none is finite."""
    sign = 1 if figure in SMALLER_IS_BETTER else -1
    finite = [row for row in history if math.isfinite(row[figure])]
    return min(finite, key=lambda row: sign * row[figure]) if finite else None


def read_state(checkpoint: Path) -> Mapping[str, Any]:
    """What a training goes on from. Raises CheckpointError where the checkpoint has none."""
    path = checkpoint / STATE_FILE
    if not path.is_file():
        raise CheckpointError(f"{checkpoint}: has no {STATE_FILE} to go on from: {LAST} of a run has")
    state = load_pickle(path, tensors="mmap")
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path}: holds no state of a training")
    return state
