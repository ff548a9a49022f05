"""Training of NPT layers toward equivalence with the frozen layers they stand in for. The losses: see losses.py."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import get_cosine_schedule_with_warmup

from runner.errors import ConfigError, ModelError
from runner.models.npt_llama import NptLlamaForCausalLM, RankKUpdate
from runner.training.batches import endless_order
from runner.training.losses import Reference, kept_references, losses
from runner.training.moments import flat_optimizer_state, stacked_optimizer_state

PROJECTIONS = {"single": ("gate",), "dual": ("gate", "up"), "triple": ("gate", "up", "down")}

OnStep = Callable[[int, Mapping[str, float]], None]
OnCheckpoint = Callable[[int, Mapping[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class EquivalenceSettings:
    """Which layers become NPT layers, and how they are trained.

    `batch_size` rows of `sequence_length` tokens are what a caller's batches are made of. `initial_scale`: the size
    of the random W_b_up relative to that of the other matrices; 0 starts from the unmodulated MLP.
    """

    layers: tuple[int, ...]
    modulation: str = "triple"
    np_rank: int = 16
    num_ranks: int = 4
    max_steps: int = 3000
    save_every: int = 500
    learning_rate: float = 3e-3
    warmup_steps: int = 500
    weight_decay: float = 0.0
    gradient_clip_value: float = 1.0
    batch_size: int = 4
    sequence_length: int = 256
    direct_weight: float = 1.0
    logit_weight: float = 1.0
    initial_scale: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        if not self.layers or any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in self.layers):
            raise ConfigError(f"train.layers={list(self.layers)}: give layer numbers from 0 on, at least one")
        if len(set(self.layers)) < len(self.layers):
            raise ConfigError(f"train.layers={list(self.layers)}: names a layer twice")
        if self.modulation not in PROJECTIONS:
            raise ConfigError(f"train.modulation={self.modulation!r} is unknown; choose {', '.join(PROJECTIONS)}")
        for name in ("np_rank", "num_ranks", "max_steps", "save_every", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name}={getattr(self, name)} must be at least 1")
        for name in ("learning_rate", "gradient_clip_value"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"train.{name}={getattr(self, name)} must be greater than 0")
        for name in ("warmup_steps", "weight_decay", "direct_weight", "logit_weight", "initial_scale"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"train.{name}={getattr(self, name)} must not be negative")
        if not self.direct_weight and not self.logit_weight:
            raise ConfigError("train.direct_weight and train.logit_weight are both 0: nothing would be trained")
        if self.sequence_length < 2:
            raise ConfigError(f"train.sequence_length={self.sequence_length} must be at least 2")
        if self.warmup_steps >= self.max_steps:
            raise ConfigError(f"train.warmup_steps={self.warmup_steps} must be below max_steps={self.max_steps}")


def initial_updates(config: Any, settings: EquivalenceSettings) -> dict[int, dict[str, RankKUpdate]]:
    """Random rank-k updates for a Llama of `config`, by layer and projection; `settings.seed` gives their values."""
    beyond = [i for i in settings.layers if i >= config.num_hidden_layers]
    if beyond:
        raise ModelError(f"train.layers: the base has the layers 0 to {config.num_hidden_layers - 1}, not {beyond[0]}")
    generator = torch.Generator().manual_seed(settings.seed)
    k, r, d = settings.num_ranks, settings.np_rank, config.hidden_size

    def update(d_in: int, d_out: int) -> RankKUpdate:
        # A small bottleneck: modulation grows from almost nothing, and ends closer than from large random values.
        w_down = torch.randn(k, d, r, generator=generator) * 0.3 * d**-0.5
        w_a_up = torch.randn(k, r, d_in, generator=generator) * (d_in * r) ** -0.5
        w_b_up = torch.randn(k, r, d_out, generator=generator) * (k * r) ** -0.5 * settings.initial_scale
        return RankKUpdate(w_down, w_a_up, w_b_up)

    return {
        layer: {
            projection: update(config.intermediate_size, d)
            if projection == "down"
            else update(d, config.intermediate_size)
            for projection in PROJECTIONS[settings.modulation]
        }
        for layer in sorted(settings.layers)
    }


def train_equivalence(
    model: NptLlamaForCausalLM,
    batches: Sequence[torch.Tensor],
    settings: EquivalenceSettings,
    *,
    on_step: OnStep | None = None,
    on_checkpoint: OnCheckpoint | None = None,
    resume: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Train the updates of `model` in place on `batches` of token ids [B, T] without padding; → the last losses.

    `on_step(step, losses)` is called after each step, `on_checkpoint(step, training_state)` every `save_every` steps
    and after the last; the state's optimizer moments are laid out like the keys of the saved weights. `resume`: such
    a state; `model` holds the weights saved with it. Training then goes on as if it had never stopped, bit for bit.
    Raises ModelError where the state does not fit the model, or where the loss is no longer finite.
    """
    updates = [update for layer in model.npt_layers.values() for update in layer.updates.values()]
    parameters = [parameter.requires_grad_(True) for update in updates for parameter in update.parameters()]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=settings.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=settings.weight_decay,
        fused=model.device.type in ("cpu", "cuda"),
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, settings.warmup_steps, settings.max_steps)
    start = 0
    if resume is not None:
        optimizer.load_state_dict(stacked_optimizer_state(resume["optimizer_state_dict"], model))
        schedule.load_state_dict(resume["scheduler_state_dict"])
        start = int(resume["global_step"])
    order = endless_order(len(batches), settings.seed, start)
    references = kept_references(model, batches)
    figures: dict[str, float] = {}
    for step in range(start + 1, settings.max_steps + 1):
        figures = _step(model, references(next(order)), settings, optimizer, parameters)
        schedule.step()
        if on_step is not None:
            on_step(step, figures)
        if on_checkpoint is not None and (step % settings.save_every == 0 or step == settings.max_steps):
            state = {
                "global_step": step,
                "batch_count": step,
                "optimizer_state_dict": flat_optimizer_state(optimizer.state_dict(), model),
                "scheduler_state_dict": schedule.state_dict(),
                "scaler_state_dict": None,
            }
            on_checkpoint(step, state)
    for parameter in parameters:
        parameter.requires_grad_(False)
    return figures


def _step(
    model: NptLlamaForCausalLM,
    base: Reference,
    settings: EquivalenceSettings,
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[torch.Tensor],
) -> dict[str, float]:
    direct, logits = losses(model, base)
    total = settings.direct_weight * torch.stack(list(direct.values())).sum() + settings.logit_weight * logits
    optimizer.zero_grad(set_to_none=True)
    total.backward()
    norm = torch.nn.utils.clip_grad_norm_(parameters, settings.gradient_clip_value)
    if not bool(torch.isfinite(norm)):
        raise ModelError("the training loss is no longer finite; lower train.learning_rate")
    optimizer.step()
    return {
        "loss": total.item(),
        "logits": logits.item(),
        "gradient_norm": norm.item(),
        **{f"layer_{i}": loss.item() for i, loss in direct.items()},
    }
