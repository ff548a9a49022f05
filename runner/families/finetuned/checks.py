"""The checks of fine-tuned classifiers: what of a language model's has another meaning for one logit row a text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from runner.checkpoints.checkpoint import Checkpoint
from runner.checks.check import by_name, check, failed, passed
from runner.checks.context import CheckContext, Outcome, Traits

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import nn

# How much logits may differ between a row alone and in a padded batch.
TOLERANCE = 1e-5
BATCH_SIZES = (1, 4, 16)
CHECKS = by_name(
    check("forward", "finite logits, one row a text", "families.finetuned.checks.forward", "model"),
    check("batch", "a row's logits do not depend on padding or others", "families.finetuned.checks.batch", "forward"),
)


class FinetunedTraits(Traits):
    """What was trained, as the checkpoint says; all of it for the script's .pt."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._head = ("classifier.", "score.")
        self._is_original = checkpoint.details.is_original
        self._trained = {f"backbone.{name}" for name in checkpoint.details.description.get("trained", ())}

    def is_trained(self, name: str) -> bool:
        """As `Traits.is_trained`."""
        if self._is_original:
            return "lm_head" not in name
        return name.startswith(self._head) or name in self._trained

    def may_be_zero(self, name: str, trained: Mapping[str, nn.Parameter]) -> bool:
        """As `Traits.may_be_zero`."""
        # One expert a token has the weight 1, whatever the router says.
        return "router." in name or super().may_be_zero(name, trained)

    def loss(self, output: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The cross-entropy of made-up classes."""
        import torch
        from torch.nn.functional import cross_entropy

        classes = torch.arange(len(ids), device=ids.device) % output.logits.shape[-1]
        return cross_entropy(output.logits, classes)


def forward(context: CheckContext) -> Outcome:
    """Logits of the prompts and of a long sequence: [1, C] each, finite."""
    import torch

    classes = len(context.checkpoint.details.labels)
    sequences = [*context.prompts(), context.long_ids()]
    for ids in sequences:
        found = _logits(context.model, ids[None])
        if tuple(found.shape) != (1, classes):
            return failed(f"logits are {list(found.shape)} for one text and {classes} classes")
        if not torch.isfinite(found).all():
            return failed(f"logits of {len(ids)} tokens are not finite", "Look at the weights.")
    return passed(
        f"{len(sequences)} texts of up to {max(map(len, sequences))} tokens: finite logits of {classes} classes"
    )


def batch(context: CheckContext) -> Outcome:
    """Padded batches of 1, 4 and 16 give each text the logits that it has alone, whatever stands in the padding."""
    from runner.checks.behaviour import right_padded
    from runner.evaluation.forward import limits

    sequences = context.ragged(max(BATCH_SIZES))
    alone = [_logits(context.model, ids[None])[0] for ids in sequences]
    worst = 0.0
    for size in BATCH_SIZES:
        chosen = list(range(0, len(sequences), len(sequences) // size))
        for filler in (0, limits(context.model)[0] - 1):
            together = _logits(context.model, *right_padded([sequences[i] for i in chosen], filler))
            scale = together.abs().max().clamp_min(1.0)
            differences = [
                ((found - alone[i]).abs().max() / scale).item() for found, i in zip(together, chosen, strict=True)
            ]
            worst = max(worst, *differences)
            if not worst <= TOLERANCE:
                return failed(
                    f"in a padded batch of {size} a text has other logits than alone: by {worst:.3g}",
                    "Look at where the last token is taken from.",
                )
    return passed(f"sizes {', '.join(map(str, BATCH_SIZES))}: largest difference {worst:.2g}", max_difference=worst)


def _logits(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    import torch

    from runner.evaluation.forward import device_of

    where = device_of(model)
    with torch.inference_mode():
        found: torch.Tensor = model(ids.to(where), attention_mask=None if mask is None else mask.to(where)).logits
    return found
