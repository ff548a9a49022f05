"""From an opened lora_moe checkpoint to tensors: whether it fits a base model, its experts and its router."""

from collections.abc import Mapping

import torch

from runner.checkpoints.adapter_tensors import Factors, check_fit, read_factors, read_finite
from runner.checkpoints.checkpoint import Checkpoint
from runner.checkpoints.lora_moe_experts import weight_name
from runner.errors import ModelError
from runner.families.lora_moe.checkpoint import MoeDetails


def check_base(checkpoint: Checkpoint, linears: Mapping[str, tuple[int, int]], hidden_size: int, base: object) -> None:
    """Check the checkpoint against a base: its linear modules by name with (inputs, outputs), and its hidden size.

    Raises ModelError where the two do not fit, CheckpointError for missing or unknown keys.
    """
    checkpoint.require_complete()
    details: MoeDetails = checkpoint.details
    if details.hidden_size != hidden_size:
        raise ModelError(
            f"{details.router.file}: the router reads a hidden size of {details.hidden_size}, but the base {base} has "
            f"{hidden_size}; give its own base as base="
        )
    for expert in details.experts:
        check_fit(expert.adapter, linears, base)


def read_experts(checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device) -> tuple[Factors, ...]:
    """Each expert's matrices by module. Raises CheckpointError for NaN or Inf."""
    return tuple(
        read_factors(checkpoint.weights, expert.adapter, prefix=weight_name(expert, ""), dtype=dtype, device=device)
        for expert in checkpoint.details.experts
    )


def read_router(
    checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The router's weight [experts, hidden size] and bias [experts]. Raises CheckpointError for NaN or Inf."""
    router = checkpoint.details.router

    def read(name: str, own: str) -> torch.Tensor:
        return read_finite(checkpoint.weights, name, f"{router.file}: {own}", dtype, device)

    return read("router.gate.weight", router.weight), read("router.gate.bias", router.bias)
