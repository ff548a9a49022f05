"""PEFT's LoRA layer with a forward pass of our own, in which every token has its own mixture of adapters.

Importing this module imports peft, which takes seconds: import it where a model is built.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.lora import LoraConfig
from peft.tuners.lora.layer import Linear
from torch import nn

# A module's adapter: A [r, in], B [out, r], and the scaling of B A x.
Factors = tuple[torch.Tensor, torch.Tensor, float]


@dataclass
class Routing:
    """What all LoRA layers of one model apply in a pass: names of adapters with the weight of each token.

    A weight is [..., T, 1], or None for 1. An adapter that is not listed does nothing.
    """

    active: tuple[tuple[str, torch.Tensor | None], ...] = field(default=())


class RoutedLinear(Linear):
    """y = W x + Σ w · scaling · B A x over the adapters that `routing` lists and that this layer has."""

    def __init__(self, base: nn.Linear, adapters: Mapping[str, Factors], dropout: float, routing: Routing) -> None:
        names = iter(adapters)
        first = next(names)
        # The adapters' matrices follow below: made on meta, they cost no memory and draw no random numbers.
        with torch.device("meta"):
            config = _config(adapters[first], dropout)
            super().__init__(base, first, config=config, r=config.r, lora_alpha=config.lora_alpha)
            for name in names:
                config = _config(adapters[name], dropout)
                self.update_layer(name, config.r, config.lora_alpha, config)
        for name, (a, b, scaling) in adapters.items():
            self._matrix(self.lora_A, name).weight = nn.Parameter(a, requires_grad=False)
            self._matrix(self.lora_B, name).weight = nn.Parameter(b, requires_grad=False)
            self.scaling[name] = scaling
        self.routing = routing

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """[..., T, in] → [..., T, out]."""
        result = self.base_layer(x, *args, **kwargs)
        for name, weight in self.routing.active:
            if name in self.lora_A:
                update = self.lora_B[name](self.lora_A[name](self.lora_dropout[name](x))) * self.scaling[name]
                result = result + (update if weight is None else weight * update)
        return result

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Note the names, no more: PEFT goes through all adapters each time that one is added.

        `routing` says which of them are on, and whoever trains says what has a gradient.
        """
        self._active_adapter = [adapter_names] if isinstance(adapter_names, str) else adapter_names

    def factors(self, name: str) -> Factors:
        """The adapter `name`, as it is now."""
        a, b = self._matrix(self.lora_A, name), self._matrix(self.lora_B, name)
        return a.weight, b.weight, self.scaling[name]

    @staticmethod
    def _matrix(matrices: nn.ModuleDict, name: str) -> nn.Linear:
        matrix = matrices[name]
        assert isinstance(matrix, nn.Linear)
        return matrix


def _config(factors: Factors, dropout: float) -> LoraConfig:
    rank, scaling = factors[0].shape[0], factors[2]
    alpha: Any = scaling * rank  # PEFT says int and divides it
    return LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, init_lora_weights=False)


def add_adapters(model: nn.Module, adapters: Mapping[str, Mapping[str, Factors]], dropout: float) -> Routing:
    """Put the LoRA layers of all `adapters` (name → module → factors) into `model`; what steers them."""
    routing = Routing()
    by_module: dict[str, dict[str, Factors]] = {}
    for name, modules in adapters.items():
        for module, factors in modules.items():
            by_module.setdefault(module, {})[name] = factors
    for module, own in by_module.items():
        parent, _, leaf = module.rpartition(".")
        base = model.get_submodule(module)
        assert isinstance(base, nn.Linear), f"{module} is a {type(base).__name__}"
        layer = RoutedLinear(base, own, dropout, routing)
        setattr(model.get_submodule(parent), leaf, layer.train(model.training))
    return routing


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """The linear modules of a model by name, with their number of inputs and outputs."""
    modules = model.named_modules()
    return {name: (each.in_features, each.out_features) for name, each in modules if isinstance(each, nn.Linear)}
