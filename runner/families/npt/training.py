"""Training of NPT layers toward equivalence with the frozen layers they stand in for. The losses: see losses.py."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from runner.errors import DivergedError, ModelError
from runner.families.npt.losses import Reference, kept_references, losses
from runner.families.npt.model import NptLlamaForCausalLM, RankKUpdate
from runner.families.npt.optimizer_state import flat_optimizer_state, stacked_optimizer_state
from runner.families.npt.settings import PROJECTIONS, EquivalenceSettings
from runner.training.batches import endless_order
from runner.training.optimization import DIVERGED, load_optimizer, load_schedule, optimizer_and_schedule, require_finite

OnStep = Callable[[int, Mapping[str, float]], None]
OnCheckpoint = Callable[[int, Mapping[str, Any]], None]


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
    Raises ModelError where the state does not fit the model, DivergedError where the loss is no longer finite, or for
    weights to be saved that are not, or that no longer give a finite loss.
    """
    updates = [update for layer in model.npt_layers.values() for update in layer.updates.values()]
    parameters = [parameter.requires_grad_(True) for update in updates for parameter in update.parameters()]
    optimizer, schedule = optimizer_and_schedule(parameters, settings, model.device)
    start = 0
    if resume is not None:
        load_optimizer(optimizer, stacked_optimizer_state(resume["optimizer_state_dict"], model))
        load_schedule(schedule, resume["scheduler_state_dict"])
        start = resume["global_step"]
    order = endless_order(len(batches), settings.seed, start)
    references = kept_references(model, batches)
    figures: dict[str, float] = {}
    for step in range(start + 1, settings.max_steps + 1):
        base = references(next(order))
        figures = _step(model, base, settings, optimizer, parameters, step)
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
            require_finite(parameters, step)
            with torch.no_grad():
                _require_finite_loss(_total(*losses(model, base), settings), step)
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
    step: int,
) -> dict[str, float]:
    direct, logits = losses(model, base)
    total = _total(direct, logits, settings)
    optimizer.zero_grad(set_to_none=True)
    total.backward()
    norm = torch.nn.utils.clip_grad_norm_(parameters, settings.gradient_clip_value)
    _require_finite_loss(norm, step)
    optimizer.step()
    return {
        "loss": total.item(),
        "logits": logits.item(),
        "gradient_norm": norm.item(),
        **{f"layer_{i}": loss.item() for i, loss in direct.items()},
    }


def _total(direct: Mapping[int, torch.Tensor], logits: torch.Tensor, settings: EquivalenceSettings) -> torch.Tensor:
    return settings.direct_weight * torch.stack(list(direct.values())).sum() + settings.logit_weight * logits


def _require_finite_loss(loss: torch.Tensor, step: int) -> None:
    """Raise DivergedError where the loss of `step`, or the norm of its gradient, is NaN or Inf."""
    if not bool(torch.isfinite(loss)):
        raise DivergedError(f"the training loss is no longer finite at step {step}: {DIVERGED}")
