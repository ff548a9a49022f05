"""From a LoraMoe model in memory to a checkpoint directory of spec/formats.md §4, absent or complete."""

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from runner.families.lora.adapter import adapter_config, key
from runner.families.lora_moe import save as lora_moe_save
from runner.families.lora_moe.checkpoint import TEMPERATURE
from runner.families.lora_moe.model import Adapter, LoraMoeForCausalLM
from runner.files.staging import staged


def save_moe(
    model: LoraMoeForCausalLM,
    directory: Path,
    *,
    base_name: str,
    step: int | None = None,
    skills: Mapping[int | str, torch.Tensor] | None = None,
    recipe: Mapping[str, Any] | None = None,
    add_files: Callable[[Path], None] | None = None,
) -> None:
    """Write `directory`: config, an adapter an expert, router and skills; never the base's weights.

    `base_name`: a hub name, or a path that holds from the checkpoint. `skills`: embeddings [d] by id. `recipe`: how
    the model was made, for the manifest. `add_files` writes more (a trainer's state) before it is published. Raises
    CheckpointError where `directory` exists, RunnerError where the disk fails.
    """
    names = _linears(model.lm)
    config = lora_moe_save.config(base_name=base_name, num_experts=len(model.names), step=step, top_k=model.top_k)
    if model.temperature != TEMPERATURE:
        config["temperature"] = model.temperature
    dropouts = _dropouts(model)
    experts = [
        (
            _adapter_config(adapter, names, base_name, dropouts.get(expert, 0.0)),
            _tensors(adapter),
        )
        for expert, adapter in zip(model.names, model.adapters(), strict=True)
    ]
    size = sum(tensor.nbytes for _, tensors in experts for tensor in tensors.values())
    manifest = None if recipe is None else {"recipe": dict(recipe)}
    with staged(directory, expected_bytes=size, manifest=manifest) as partial:
        lora_moe_save.save(
            partial, config=config, experts=experts, router=(model.router.weight, model.router.bias), skills=skills
        )
        if add_files is not None:
            add_files(partial)


def _dropouts(model: LoraMoeForCausalLM) -> dict[str, float]:
    """The dropout of each expert's adapter in training; an expert without one is left out.

    One walk over the model: a walk for each expert goes through the modules of all of them.
    """
    from runner.families.lora.model import RoutedLinear

    found: dict[str, float] = {}
    for layer in model.lm.modules():
        if isinstance(layer, RoutedLinear):
            for expert, each in layer.lora_dropout.items():
                if isinstance(each, nn.Dropout):
                    found[expert] = max(found.get(expert, 0.0), each.p)
    return found


def _adapter_config(adapter: Adapter, linears: list[str], base_name: str, dropout: float) -> dict[str, Any]:
    """adapter_config.json of one expert: the commonest rank and alpha for all modules, patterns for the others."""
    ranks = {module: a.shape[0] for module, (a, _, _) in adapter.items()}
    alphas = {module: _rounded(scaling * ranks[module]) for module, (_, _, scaling) in adapter.items()}
    r, alpha = _commonest(ranks), _commonest(alphas)
    config = adapter_config(
        base_name=base_name, r=r, alpha=alpha, target_modules=_targets(adapter, linears), dropout=dropout
    )
    patterns = {
        "rank_pattern": {module: rank for module, rank in ranks.items() if rank != r},
        "alpha_pattern": {module: value for module, value in alphas.items() if value != alpha},
    }
    return {**config, **{name: pattern for name, pattern in patterns.items() if pattern}}


def _tensors(adapter: Adapter) -> dict[str, torch.Tensor]:
    """A and B of every module under PEFT's names."""
    tensors = {}
    for module, (a, b, _) in adapter.items():
        tensors[key(module, "A")], tensors[key(module, "B")] = a, b
    return tensors


def _targets(adapter: Adapter, linears: list[str]) -> set[str]:
    """What to call the adapted modules: by the ends of their names where these name no other module, else in full."""
    ends = {module.rpartition(".")[2] for module in adapter}
    named = {module for module in linears if module.rpartition(".")[2] in ends}
    return ends if named == set(adapter) else set(adapter)


def _linears(model: nn.Module) -> list[str]:
    """The linear modules under the names that they have in the base without adapters."""
    from runner.families.lora.model import RoutedLinear

    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, RoutedLinear)) and ".lora_" not in name and not name.endswith(".base_layer")
    ]


def _commonest(values: Mapping[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]


def _rounded(alpha: float) -> float:
    """An alpha as a whole number where it is one but for the rounding of alpha / r · r."""
    return round(alpha) if abs(alpha - round(alpha)) < 1e-9 else alpha
