"""NPT layers by themselves and together (formulas: README.md).

`run(active)` gives the logits [T, V] with exactly the NPT layers in `active` modulating and all others standard.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from runner.metrics.fidelity import compare

Run = Callable[[frozenset[int]], torch.Tensor]


def figures(reference: torch.Tensor, subject: torch.Tensor, token_ids: torch.Tensor) -> dict[str, float | None]:
    """mse and cosine over all positions of [T, V] logits, and KL(reference ‖ subject) in nats at the last position."""
    comparison = compare([(reference, subject)], token_ids)
    if not comparison.finite:
        return {"mse": None, "cosine": None, "kl": None}
    return {"mse": comparison.mse, "cosine": comparison.cosine, "kl": float(comparison.kl[-1])}


def isolation(
    run: Run, reference: torch.Tensor, token_ids: torch.Tensor, layers: Sequence[int]
) -> list[dict[str, Any]]:
    """Each layer alone in NPT mode: [{layer, mse, cosine, kl}]."""
    return [{"layer": i, **figures(reference, run(frozenset([i])), token_ids)} for i in layers]


def progressive(
    run: Run, reference: torch.Tensor, token_ids: torch.Tensor, layers: Sequence[int]
) -> list[dict[str, Any]]:
    """The lowest 1, 2, … n layers in NPT mode: [{count, layers, mse, cosine, kl}]."""
    return [
        {"count": n, "layers": list(layers[:n]), **figures(reference, run(frozenset(layers[:n])), token_ids)}
        for n in range(1, len(layers) + 1)
    ]


def trend(mses: Sequence[float | None]) -> str | None:
    """Whether adding layers lowers the mse ("improving") or raises it ("degrading"); None under two known values."""
    known = [mse for mse in mses if mse is not None]
    if len(known) < 2 or len(known) < len(mses):
        return None
    return "improving" if known[-1] < known[0] else "degrading"


def additivity(isolated: Sequence[float | None], together: float | None) -> float | None:
    """Sum of the isolated KLs over the KL of all layers together: 1 where the layers' errors do not interact."""
    known = [kl for kl in isolated if kl is not None]
    if not together or len(known) < len(isolated):
        return None
    return sum(known) / together
