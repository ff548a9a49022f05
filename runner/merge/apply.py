"""A recipe's method with its numbers for one tensor: what makes it of the models' tensors, once they are read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from runner.errors import ConfigError
from runner.merge import methods
from runner.merge.combination import Computed
from runner.merge.recipe import Part, Recipe, Slice

# Of the models' tensors, in the order of the parts, and the base's, where the method takes one.
Make: TypeAlias = Callable[[Sequence[torch.Tensor], torch.Tensor | None], Computed]


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One tensor of the output: its slice, where in the slice's layers it lies (0 to 1), and its name in each part."""

    name: str
    slice: Slice
    t: float
    names: tuple[str, ...]


def maker(recipe: Recipe, planned: Planned, parts: Sequence[Part], seed: int) -> "Make | float":
    """What makes the tensor of those of the parts and the base's; of passthrough the factor. Raises ConfigError."""

    def whole(name: str) -> Any:
        return recipe.value(name, planned.name, planned.t, planned.slice)

    def each(name: str) -> list[Any]:
        return [
            recipe.value(name, own, planned.t, planned.slice, part)
            for part, own in ((part, planned.names[planned.slice.parts.index(part)]) for part in parts)
        ]

    name = recipe.method
    if name == "passthrough":
        return float(each("scale")[0])
    if name == "slerp":
        t, swap = whole("t"), recipe.base is not None and parts[0].source != recipe.base
        return lambda tensors, base: methods.slerp(*(tensors[::-1] if swap else tensors), t=t)
    if name == "karcher":
        options = {"max_iter": whole("max_iter"), "tol": whole("tol")}
        return lambda tensors, base: methods.karcher([*tensors, *([base] if base is not None else [])], **options)
    if name == "model_stock":
        filter_wise = whole("filter_wise")
        return lambda tensors, base: methods.model_stock(_needed(base), tensors, filter_wise=filter_wise)
    weights = each("weight")
    normalize = name == "nuslerp" or whole("normalize")
    if normalize and name not in ("ties", "dare_ties", "della") and abs(sum(weights)) < 1e-8:
        raise ConfigError(
            f"merge={name}: the weights of {planned.name} sum to 0, and normalize divides by their sum; "
            "give other weights, or normalize: false"
        )
    if name == "linear":
        return lambda tensors, base: methods.linear(tensors, weights=weights, normalize=normalize)
    if name == "nuslerp":
        row_wise, flatten = whole("nuslerp_row_wise"), whole("nuslerp_flatten")
        return lambda tensors, base: methods.nuslerp(
            *tensors, weights=weights, base=base, row_wise=row_wise, flatten=flatten
        )
    options = {"weights": weights, "normalize": normalize, "factor": whole("lambda")}
    if name == "task_arithmetic":
        return lambda tensors, base: methods.task_arithmetic(_needed(base), tensors, **options)
    options |= {"densities": each("density"), "rescale": whole("rescale")}
    if name == "ties":
        return lambda tensors, base: methods.ties(_needed(base), tensors, **options)
    options |= {
        "seeds": [f"{seed}|{number}|{planned.name}".encode() for number in range(len(parts))],
        "elect": not name.endswith("_linear"),
    }
    if name.startswith("dare"):
        return lambda tensors, base: methods.dare(_needed(base), tensors, **options)
    options["epsilons"] = each("epsilon")
    for density, epsilon in zip(options["densities"], options["epsilons"], strict=True):
        if density < 1 and not 0 < density - epsilon <= density + epsilon < 1:
            raise ConfigError(f"merge={name}: density {density} ± epsilon {epsilon} must lie between 0 and 1")
    return lambda tensors, base: methods.della(_needed(base), tensors, **options)


def _needed(base: torch.Tensor | None) -> torch.Tensor:
    assert base is not None
    return base
