"""The one loop that every training runs: steps, rows of the log, evaluations, checkpoints, and an end in good order.

A family brings its loss, its batches, what measures the model and what writes a checkpoint.
"""

import math
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Generic, Protocol, TypedDict, TypeVar

import torch
from torch.optim.lr_scheduler import LambdaLR

from runner.errors import CheckpointError, DivergedError, RunnerError
from runner.results import versions
from runner.training.distributed import ALONE, LostProcess, World
from runner.training.optimization import require_finite_loss
from runner.training.precision import Precision
from runner.training.settings import TrainingSettings

B = TypeVar("B")
Given = TypeVar("Given", covariant=True)
OnStep = Callable[[int, Mapping[str, float]], None]
Optimizers = Sequence[tuple[torch.optim.Optimizer, LambdaLR]]
# The link to the checkpoint with the best evaluation.
BEST = "best"
# So many steps in a row whose gradients overflow float16 are a training that diverged: the scale is below 1e-4 by then.
_MOST_SKIPPED = 30
_EXACT = Precision("float32", torch.device("cpu"))


class Source(Protocol[Given]):
    """Batches without end; where it stands can be saved, and taken up again by another process."""

    def next(self) -> Given:
        """The next micro-batch of this process."""

    def state(self) -> dict[str, object]:
        """Where it stands, as values that a checkpoint can hold."""

    def restore(self, state: Mapping[str, object]) -> None:
        """Stand where `state` says. Raises ValueError, KeyError or TypeError where it does not fit."""


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a training stands: optimizer steps, micro-batches of this process and tokens of all that were done, steps
    that float16 made it skip, and the best score of its evaluations."""

    step: int = 0
    batches: int = 0
    tokens: int = 0
    skipped: int = 0
    best: float | None = None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What an evaluation found; a lower `score` is better. `stop`: whether the training ends here."""

    figures: Mapping[str, float]
    score: float
    stop: bool = False


class LoopState(TypedDict):
    """What a training goes on from beside the weights. The names are those of training_state.pt."""

    global_step: int
    batch_count: int
    tokens: int
    skipped_steps: int
    best_val_loss: float | None
    optimizer_state_dict: dict[str, object]
    scheduler_state_dict: dict[str, object]
    scaler_state_dict: dict[str, object] | None
    rng_state: dict[str, object]
    data_state: dict[str, object]
    versions: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a training ended: its last step's figures, the checkpoints that it left, and whether it was asked to stop."""

    step: int
    figures: dict[str, float]
    checkpoints: list[Path] = field(default_factory=list)
    best: Path | None = None
    skipped: int = 0
    interrupted: bool = False


@dataclass(frozen=True, kw_only=True)
class Loop(Generic[B]):
    """All that a training is made of.

    `losses(batch, step)`: scalars by name; "loss" is minimised. `save(step, state)` writes a checkpoint and returns its
    path. `evaluate(step)` and `sample(step)` are called as often as the settings say, with the random state untouched.
    `on_step` hears the figures of each step, `on_log` those of each row. `tokens(batch)`: how many there are.
    `resume_from`: the checkpoint that is named where none is written yet.
    """

    settings: TrainingSettings
    parameters: Sequence[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    schedule: LambdaLR
    source: Source[B]
    losses: Callable[[B, int], Mapping[str, torch.Tensor]]
    save: Callable[[int, LoopState], Path] | None = None
    evaluate: Callable[[int], Evaluation] | None = None
    sample: Callable[[int], None] | None = None
    on_step: OnStep | None = None
    on_log: OnStep | None = None
    tokens: Callable[[B], int] | None = None
    precision: Precision = _EXACT
    world: World = ALONE
    resume_from: Path | None = None

    def restore(self, state: Mapping[str, object]) -> Position:
        """Take up random state, scaler and counts where `state`, out of a checkpoint, says. Raises CheckpointError."""
        try:
            if isinstance(rng := state.get("rng_state"), Mapping):
                torch.set_rng_state(rng["torch"].clone())
                if self.device.type == "cuda":
                    torch.cuda.set_rng_state_all([each.clone() for each in rng["cuda"]])
            if self.precision.scaler is not None and (scale := state.get("scaler_state_dict")) is not None:
                self.precision.scaler.load_state_dict(scale)  # type: ignore[arg-type]
            counts = {
                name: int(state.get(key) or 0)  # type: ignore[call-overload]
                for name, key in (("step", "global_step"), ("batches", "batch_count"), ("tokens", "tokens"),
                                  ("skipped", "skipped_steps"))
            }  # fmt: skip
            best = state.get("best_val_loss")
            return Position(**counts, best=None if best is None else float(best))  # type: ignore[arg-type]
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
            raise CheckpointError(f"{self.resume_from}: its state is none of this training: {error}") from error

    @property
    def device(self) -> torch.device:
        """Where the trained parameters lie."""
        return self.parameters[0].device

    def run(self, at: Position | None = None) -> Ended:
        """Take the steps that are left after `at`.

        SIGINT and SIGTERM end it after the step that is under way, with a checkpoint. Raises DivergedError where loss
        or weights are not finite, LostProcess where another process ended, RunnerError where the disk fails: each
        names the last good checkpoint.
        """
        return _Running(self, at or Position()).run()


def take_steps(
    steps: Iterable[int],
    parameters: Sequence[torch.nn.Parameter],
    optimizers: Optimizers,
    batches: Callable[[], B],
    losses: Callable[[B, int], Mapping[str, torch.Tensor]],
    *,
    clip: float,
    accumulation: int = 1,
    factor: float = 1.0,
    precision: Precision = _EXACT,
    world: World = ALONE,
) -> Iterator[tuple[int, dict[str, float]]]:
    """Take `steps` one after the other, each over `accumulation` micro-batches; → each with its figures.

    These are the means of `losses(batch, step)` over the step's micro-batches in all processes, `gradient_norm`, which
    is that before `factor` and clipping, and, where float16 overflowed before, the number of steps `skipped`.
    Minimised is "loss". Gradients are multiplied by `factor`, then clipped to the norm `clip` over all `parameters`.
    Raises DivergedError where the norm, and so the loss, is NaN or Inf.
    """
    averaged = world.averaged(parameters, losses)
    scaler = precision.scaler
    for step in steps:
        taken: list[B] = []
        for skipped in range(_MOST_SKIPPED + 1):
            for parameter in parameters:
                parameter.grad = None
            sums: dict[str, torch.Tensor] = {}
            for number in range(accumulation):
                if number == len(taken):
                    taken.append(batches())  # a step that is skipped is taken again with the same ones
                with averaged.synchronised(last=number == accumulation - 1):
                    with precision.passes():
                        found = averaged(taken[number], step)
                    loss = found["loss"] if accumulation == 1 else found["loss"] / accumulation
                    (loss if scaler is None else scaler.scale(loss)).backward()
                for name, value in found.items():
                    value = value.detach()
                    sums[name] = sums[name] + value if name in sums else value
            if scaler is not None:
                for optimizer, _ in optimizers:
                    scaler.unscale_(optimizer)
            if factor != 1:
                torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], factor)
            norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
            values = torch.stack([value.float() for value in sums.values()])
            *means, total = torch.cat([world.mean(values), norm.float()[None]]).tolist()
            figures = {name: mean / accumulation for name, mean in zip(sums, means, strict=True)}
            overflowed = scaler is not None and not math.isfinite(total)
            if not overflowed or not math.isfinite(figures["loss"]) or skipped == _MOST_SKIPPED:
                break
            for optimizer, _ in optimizers:
                scaler.step(optimizer)  # type: ignore[union-attr]  # which leaves the weights as they are
            scaler.update()  # type: ignore[union-attr]
        require_finite_loss(total, step)
        for optimizer, schedule in optimizers:
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
            schedule.step()
        if scaler is not None:
            scaler.update()
        figures["gradient_norm"] = total / factor
        yield step, figures | ({"skipped": skipped} if skipped else {})


class _Running(Generic[B]):
    """A loop under way: where it stands, and what it has written."""

    def __init__(self, loop: Loop[B], at: Position) -> None:
        self.loop, self.at = loop, at
        self.written: list[Path] = []
        self.best: Path | None = None
        self.only_best: Path | None = None  # written for that alone
        self.saved_at = at.step
        # What a step that another process did not live to see has begun to read is read again.
        self.data_before: dict[str, object] | None = None

    def run(self) -> Ended:
        loop, settings = self.loop, self.loop.settings
        figures: dict[str, float] = {}
        steps = take_steps(
            range(self.at.step + 1, settings.max_steps + 1), loop.parameters, [(loop.optimizer, loop.schedule)],
            self._next, loop.losses, clip=settings.gradient_clip_value, factor=settings.gradient_scale_factor,
            accumulation=settings.gradient_accumulation_steps, precision=loop.precision, world=loop.world,
        )  # fmt: skip
        stopped = False
        with naming_the_last(self.written, loop.resume_from), asked_to_stop() as asked:
            while not stopped:
                if loop.world.size > 1:
                    self.data_before = loop.source.state()
                taken = self._step(steps)
                if taken is None:
                    break
                step, figures = taken
                skipped = int(figures.pop("skipped", 0))
                self.at = replace(self.at, step=step, skipped=self.at.skipped + skipped)
                stopped = self._after(step, figures, asked)
        interrupted = bool(asked)
        return Ended(
            step=self.at.step, figures=figures, checkpoints=self.written, best=self.best, skipped=self.at.skipped,
            interrupted=interrupted,
        )  # fmt: skip

    def _next(self) -> B:
        """The next micro-batch, counted."""
        loop = self.loop
        batch = loop.source.next()
        tokens = loop.tokens(batch) * loop.world.size if loop.tokens is not None else 0
        self.at = replace(self.at, batches=self.at.batches + 1, tokens=self.at.tokens + tokens)
        return batch

    def _step(self, steps: Iterator[tuple[int, dict[str, float]]]) -> tuple[int, dict[str, float]] | None:
        """One step; where another process is gone, what was done before it is saved first."""
        before = self.at
        try:
            return next(steps, None)
        except LostProcess:
            self.at = before
            if self.loop.world.writes and self.at.step > self.saved_at:
                self._save(self.data_before)
            raise

    def _after(self, step: int, figures: dict[str, float], asked: Sequence[int]) -> bool:
        """All that happens after a step; → whether the training ends here."""
        loop, settings = self.loop, self.loop.settings
        if loop.on_step is not None:
            loop.on_step(step, figures)
        stop = loop.world.any(bool(asked)) if loop.world.size > 1 else bool(asked)
        if loop.on_log is not None and settings.is_logged(step):
            rate = warmed(loop.schedule, step)
            loop.on_log(step, {**figures, "learning_rate": rate, "tokens": self.at.tokens})
        improved = False
        if loop.evaluate is not None and settings.is_evaluated(step):
            with _untouched(loop.device):
                found = loop.evaluate(step)
            stop = stop or found.stop
            improved = math.isfinite(found.score) and (self.at.best is None or found.score < self.at.best)
            if improved:
                self.at = replace(self.at, best=found.score)
        if loop.sample is not None and settings.is_sampled(step):
            with _untouched(loop.device):
                loop.sample(step)
        if loop.save is not None and (settings.is_saved(step) or stop or improved):
            if loop.world.writes:
                self._save(None, best=improved, only_best=improved and not (settings.is_saved(step) or stop))
            loop.world.wait()
        return stop

    def _save(self, data: dict[str, object] | None, *, best: bool = False, only_best: bool = False) -> None:
        """Write a checkpoint of what was done so far; `best`: the link goes to it. One that was written only to be the
        best is removed when a better one is."""
        loop, at = self.loop, self.at
        assert loop.save is not None
        state: LoopState = {
            "global_step": at.step,
            "batch_count": at.batches,
            "tokens": at.tokens,
            "skipped_steps": at.skipped,
            "best_val_loss": at.best,
            "optimizer_state_dict": loop.optimizer.state_dict(),
            "scheduler_state_dict": loop.schedule.state_dict(),
            "scaler_state_dict": None if loop.precision.scaler is None else loop.precision.scaler.state_dict(),
            "rng_state": _random_state(loop.device),
            "data_state": loop.source.state() if data is None else data,
            "versions": versions(),
        }
        path = loop.save(at.step, state)
        self.saved_at = at.step
        self.written.append(path)
        if best:
            self.best = path
            _link(path.parent / BEST, path.name)
            if self.only_best is not None:
                shutil.rmtree(self.only_best)
                self.written.remove(self.only_best)
            self.only_best = path if only_best else None


def warmed(schedule: LambdaLR, step: int) -> float:
    """The rate of the first group that `step` was taken with."""
    return float(schedule.base_lrs[0]) * schedule.lr_lambdas[0](step - 1)


@contextmanager
def asked_to_stop() -> Iterator[list[int]]:
    """A list that gets the number of a SIGINT or SIGTERM within the block; a second one does what it always does."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        signal.signal(number, before[signal.Signals(number)])

    # What is ignored stays ignored: a shell's background job does not hear the terminal's Ctrl-C.
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, note)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Within the block torch draws from `seed`; afterwards as if nothing had been drawn."""
    with _untouched(device):
        torch.manual_seed(seed % 2**63)
        yield


def _untouched(device: torch.device) -> AbstractContextManager[None]:
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def _random_state(device: torch.device) -> dict[str, object]:
    """torch's generators: all that a training draws from, but for the order of its data, which is in their state."""
    state: dict[str, object] = {"torch": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state_all()} if device.type == "cuda" else {})


def _link(link: Path, target: str) -> None:
    """Let `link` lead to its neighbour `target`, at every moment to the old or the new one."""
    partial = link.with_name(f".{link.name}-{os.getpid()}")
    try:
        partial.unlink(missing_ok=True)
        partial.symlink_to(target)
        partial.replace(link)
    except OSError as error:
        raise RunnerError(f"{link}: not written: {error}") from error


@contextmanager
def naming_the_last(written: Sequence[Path], resume_from: Path | None) -> Iterator[None]:
    """Within the block an error that ends a training also says which checkpoint is left to go on from."""
    try:
        yield
    except RunnerError as error:
        if type(error) not in (DivergedError, LostProcess, RunnerError):  # what is wrong with the input stays as it is
            raise
        last = written[-1] if written else resume_from
        left = "no checkpoint was written" if last is None else f"the last good checkpoint is {last}"
        raise type(error)(f"{error}; {left}") from error
