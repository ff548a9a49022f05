"""What of a classifier is trained: all, the head alone, the top blocks, what stands on a base, or low-rank updates."""

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from runner.errors import ConfigError
from runner.finetuning.classifier import Classifier

# The number of a block in a parameter's name.
_BLOCK = re.compile(r"(?:^|\.)(?:layers|blocks|h)\.(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class Scope:
    """Parameters of the backbone that train, by name; `unreached` would, but no gradient reaches them."""

    trained: dict[str, nn.Parameter]
    unreached: tuple[str, ...] = ()


def choose(model: Classifier, scope: str, added: Collection[str], low_rank: Collection[str]) -> dict[str, nn.Parameter]:
    """The parameters of the backbone that `scope` names, whether a gradient reaches them or not.

    `added`: names of what stands on a base; `low_rank`: those of low-rank updates. Raises ConfigError.
    """
    named = dict(model.backbone.named_parameters())
    if scope == "head":
        return {}
    if scope == "lora":
        return {name: named[name] for name in low_rank}
    if scope == "added":
        return {name: named[name] for name in named if name in set(added)}
    if scope == "all":
        return {name: parameter for name, parameter in named.items() if parameter.is_floating_point()}
    blocks = {int(match[1]) for name in named if (match := _BLOCK.search(name))}
    count = int(scope.removeprefix("last:"))
    if not blocks:
        raise ConfigError(f"train.scope={scope}: the blocks of this model lie together in banks; give all, or head")
    if count > len(blocks):
        raise ConfigError(f"train.scope={scope}: the model has {len(blocks)} blocks")
    top = set(sorted(blocks)[-count:])
    return {name: each for name, each in named.items() if (match := _BLOCK.search(name)) and int(match[1]) in top}


def reached(
    model: Classifier, wanted: dict[str, nn.Parameter], batch: Callable[[], tuple[torch.Tensor, torch.Tensor]]
) -> Scope:
    """`wanted` without what no gradient reaches, tried with one `batch` of ids and mask [B, T].

    Afterwards exactly what trains, the head included, requires gradients.
    """
    model.requires_grad_(False)
    for parameter in (*wanted.values(), *model.head_parameters().values()):
        parameter.requires_grad_(True)
    names, parameters = list(wanted), list(wanted.values())
    if not parameters:
        return Scope(trained={})
    with torch.enable_grad():
        found = torch.autograd.grad(model(*batch()).logits.sum(), parameters, allow_unused=True)
    lost = tuple(name for name, gradient in zip(names, found, strict=True) if gradient is None)
    for name in lost:
        wanted[name].requires_grad_(False)
    return Scope(trained={name: each for name, each in wanted.items() if name not in lost}, unreached=lost)


def groups(
    model: Classifier, trained: Sequence[nn.Parameter], *, rate: float, backbone_scale: float, decay: float
) -> list[dict[str, object]]:
    """Groups of an optimizer: head and backbone, each with `decay` on what has two dimensions or more, 0 on the rest.

    A group's own peak is `rate` for the head and `rate * backbone_scale` for the backbone. Empty groups are left out.
    """
    head = list(model.head_parameters().values())
    found = []
    for name, parameters, peak in (("head", head, rate), ("backbone", list(trained), rate * backbone_scale)):
        for wide in (True, False):
            own = [each for each in parameters if (each.dim() >= 2) is wide]
            if own:
                found.append({"params": own, "lr": peak, "weight_decay": decay if wide else 0.0, "name": name})
    return found
