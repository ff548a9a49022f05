"""LoRA experts and a router as training starts with them, or goes on from."""

import math
from typing import Any

import torch
from transformers import TrainerState

from runner.checkpoints.checkpoint import Checkpoint
from runner.errors import CheckpointError, ConfigError, ModelError
from runner.evaluation.base_models import Base
from runner.families.lora_moe import checkpoint as lora_moe
from runner.families.lora_moe.checkpoint import MoeDetails
from runner.families.lora_moe.model import Adapter, LoraMoeForCausalLM, build_moe
from runner.families.lora_moe.settings import MoeSettings
from runner.families.lora_moe.state import TRAINER_STATE

OPTIMIZER, SCHEDULER = "optimizer.pt", "scheduler.pt"
# The router starts with hardly a preference: by how much, in units of its logits.
ROUTER_SCALE = 0.02


def new_moe(base: Base, settings: MoeSettings, *, top_k: int | None = None) -> LoraMoeForCausalLM:
    """Experts that change nothing yet (B is zero, A as PEFT draws it) and a router; `settings.seed` gives the values.

    `settings.experts` must be a number. Raises ModelError where the base has no such modules, ConfigError for a top_k
    that the experts do not allow.
    """
    assert isinstance(settings.experts, int), "whoever knows the skills has counted them"
    model = base.model
    generator = torch.Generator().manual_seed(settings.seed)
    place: dict[str, Any] = {"device": model.device, "dtype": model.dtype}
    modules = _target_modules(base, settings)

    def adapter() -> Adapter:
        factors = {}
        for name, (inputs, outputs) in modules.items():
            bound = inputs**-0.5  # kaiming_uniform_(a=√5)
            a = (torch.rand(settings.lora_r, inputs, generator=generator) * 2 - 1) * bound
            b = torch.zeros(outputs, settings.lora_r)
            factors[name] = a.to(**place), b.to(**place), settings.lora_alpha / settings.lora_r
        return factors

    hidden = model.config.hidden_size
    weight = torch.randn(settings.experts, hidden, generator=generator) * ROUTER_SCALE / math.sqrt(hidden)
    router = weight.to(**place), torch.zeros(settings.experts, **place)
    adapters = [adapter() for _ in range(settings.experts)]
    return LoraMoeForCausalLM(
        model,
        adapters,
        router,
        top_k=lora_moe.TOP_K if top_k is None else top_k,
        temperature=settings.temperature,
        dropout=settings.lora_dropout,
    )


def reopened_moe(
    checkpoint: Checkpoint, base: Base, settings: MoeSettings, *, top_k: int | None = None
) -> LoraMoeForCausalLM:
    """A checkpoint's model, to go on training with `settings`, whose `experts` must be a number.

    Raises CheckpointError where it has no state to go on from, ConfigError where its experts are not those of
    `settings` or nothing is left to train, and what `build_moe` raises.
    """
    assert isinstance(settings.experts, int), "whoever knows the skills has counted them"
    details: MoeDetails = checkpoint.details
    path = checkpoint.path
    missing = [name for name in (TRAINER_STATE, OPTIMIZER, SCHEDULER) if not (path / name).is_file()]
    if missing or checkpoint.step is None:
        raise CheckpointError(
            f"{path}: has no {' and no '.join(missing) or 'step'} to go on from; start a new training instead"
        )
    try:
        TrainerState.load_from_json(str(path / TRAINER_STATE))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path / TRAINER_STATE}: is no state of the Trainer: {error}") from error
    if checkpoint.step >= settings.max_steps:
        raise ConfigError(
            f"train.resume_from={path}: is at step {checkpoint.step} already; give a larger train.max_steps"
        )
    own = [expert.adapter.settings for expert in details.experts]
    asked: dict[str, tuple[list[Any], Any]] = {
        "experts": ([len(own)], settings.experts),
        "lora_r": ([each.r for each in own], settings.lora_r),
        "lora_alpha": ([each.alpha for each in own], settings.lora_alpha),
        "target_modules": ([each.targets for each in own], tuple(sorted(settings.target_modules))),
    }
    if differing := [name for name, (held, wanted) in asked.items() if set(held) != {wanted}]:
        shown = " and ".join(
            f"{name}={_spelled(asked[name][0])}, not {_spelled([asked[name][1]])}" for name in differing
        )
        raise ConfigError(f"train.resume_from={path}: it has {shown}; they must be the same")
    options: dict[str, Any] = {"temperature": settings.temperature, "dropout": settings.lora_dropout}
    return build_moe(checkpoint, base, **(options if top_k is None else {**options, "top_k": top_k}))


def _spelled(values: list[Any]) -> str:
    """Each value once, as on the command line."""
    each = (
        f"[{','.join(v)}]" if isinstance(v, tuple) else f"{v:g}" if isinstance(v, float) else f"{v}" for v in values
    )
    return " and ".join(dict.fromkeys(each))


def _target_modules(base: Base, settings: MoeSettings) -> dict[str, tuple[int, int]]:
    """The linear modules that `settings` name, with inputs and outputs."""
    from runner.families.lora.model import linear_shapes

    linears = {name: shape for name, shape in linear_shapes(base.model).items() if not name.endswith("lm_head")}
    ends = {name.rpartition(".")[2] for name in linears}
    if unknown := sorted(set(settings.target_modules) - ends):
        raise ModelError(
            f"train.target_modules: {base.path} has no linear module {', '.join(unknown)}; it has "
            f"{', '.join(sorted(ends)) or 'none'}"
        )
    return {name: shape for name, shape in linears.items() if name.rpartition(".")[2] in settings.target_modules}
