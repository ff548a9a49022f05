"""Low-rank updates (LoRA): y = W x + alpha/rank · B A x, with A [rank, in] Kaiming and B [out, rank] zero."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from runner.errors import ConfigError, did_you_mean
from runner.training.settings import check_number, check_whole

# Of models whose matrices are modules: what PEFT takes in a Llama.
_USUAL = ("q_proj", "v_proj")


@dataclass(frozen=True, kw_only=True)
class LowRankSettings:
    """`targets`: last parts of names of matrices; None: those that the family says. `dropout` of x in B A x."""

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.0
    targets: tuple[str, ...] | None = field(default=None)

    def __post_init__(self) -> None:
        check_whole("lora.rank", self.rank, 1)
        check_number("lora.alpha", self.alpha, zero_allowed=False)
        check_number("lora.dropout", self.dropout, zero_allowed=True)
        if self.dropout >= 1:
            raise ConfigError(f"train.lora.dropout={self.dropout}: must be below 1")
        if self.targets is not None:
            names = list(self.targets) if isinstance(self.targets, (list, tuple)) else [self.targets]
            if not names or not all(isinstance(name, str) for name in names):
                raise ConfigError(f"train.lora.targets={self.targets}: give a list of names of matrices")
            object.__setattr__(self, "targets", tuple(names))

    @property
    def scale(self) -> float:
        """alpha/rank."""
        return self.alpha / self.rank

    def factors(self, inputs: int, outputs: int, like: torch.Tensor) -> tuple[nn.Parameter, nn.Parameter]:
        """A [rank, in] as torch draws a linear layer's weights, and B [out, rank], which is zero; in float32."""
        a = torch.empty(self.rank, inputs, device=like.device)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        return nn.Parameter(a), nn.Parameter(torch.zeros(outputs, self.rank, device=like.device))


def add_to_linears(model: nn.Module, settings: LowRankSettings) -> list[str]:
    """Add an update to each linear module that `settings` name; → the names of the new parameters of `model`.

    They are those of PEFT: <module>.lora_A.weight and <module>.lora_B.weight. Raises ConfigError.
    """
    linears = {name: each for name, each in model.named_modules() if isinstance(each, nn.Linear)}
    linears = {name: each for name, each in linears.items() if _end(name) != "lm_head"}
    ends = sorted({_end(name) for name in linears})
    wanted = settings.targets or [name for name in _USUAL if name in ends] or ends
    return add_to_named(linears, wanted, ends, settings)


def _end(name: str) -> str:
    return name.removesuffix(".base_layer").rpartition(".")[2]


def add_to_named(
    linears: dict[str, nn.Linear], wanted: Sequence[str], ends: Sequence[str], settings: LowRankSettings
) -> list[str]:
    """Add an update to those of `linears` whose names end as `wanted` says."""
    if unknown := sorted(set(wanted) - set(ends)):
        raise ConfigError(f"train.lora.targets: there is no matrix {unknown[0]}{did_you_mean(unknown[0], ends)}")
    names = []
    for name, linear in linears.items():
        if _end(name) in wanted:
            a, b = settings.factors(linear.in_features, linear.out_features, linear.weight)
            linear.lora_A, linear.lora_B = nn.Module(), nn.Module()
            linear.lora_A.weight, linear.lora_B.weight = a, b
            linear.register_forward_hook(_update(a, b, settings))
            names += [f"{name}.lora_A.weight", f"{name}.lora_B.weight"]
    return names


def _update(a: nn.Parameter, b: nn.Parameter, settings: LowRankSettings) -> Any:
    drop = nn.functional.dropout

    def add(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        x = inputs[0]
        if settings.dropout and torch.is_grad_enabled() and a.requires_grad:
            x = drop(x, settings.dropout)
        return output + (x @ a.T.to(x.dtype) @ b.T.to(x.dtype)) * settings.scale

    return add
