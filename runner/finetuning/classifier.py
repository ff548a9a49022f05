"""A causal language model's last hidden state under a head that tells classes apart.

pooled = final hidden state, after the model's last norm, at the last real token           [B, d]
mlp:     logits = W2 drop(relu(W1 drop(pooled) + b1)) + b2,  W1 [d//2, d], W2 [C, d//2]
linear:  logits = W drop(pooled),  W [C, d]
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from runner.evaluation.forward import final_states

HEADS = ("mlp", "linear")
# The deviation of a linear head's first weights.
_DEVIATION = 0.02


@dataclass(frozen=True)
class ClassifierOutput:
    """`logits` [B, C] in float32."""

    logits: torch.Tensor


class Classifier(nn.Module):
    """`backbone` without its own head, and `classifier` (mlp) or `score` (linear) on its pooled state.

    Padding is on the right, where causal attention lets no real token see it: nothing is masked.
    """

    def __init__(self, backbone: nn.Module, classes: int, *, head: str, dropout: float = 0.0) -> None:
        super().__init__()
        self.backbone = backbone
        width = hidden_size(backbone)
        self.dropout = nn.Dropout(dropout)
        if head == "mlp":
            layers = [self.dropout, nn.Linear(width, width // 2), nn.ReLU(), nn.Dropout(dropout)]
            self.classifier = nn.Sequential(*layers, nn.Linear(width // 2, classes))
        else:
            self.score = nn.Linear(width, classes, bias=False)
            nn.init.normal_(self.score.weight, std=_DEVIATION)
        self.head_name = head

    @property
    def config(self) -> Any:
        """The backbone's config."""
        return self.backbone.config

    @property
    def head_modules(self) -> nn.Module:
        """The head."""
        return self.classifier if self.head_name == "mlp" else self.score

    def head_parameters(self) -> dict[str, nn.Parameter]:
        """The head's parameters under the names that checkpoints have."""
        prefix = "classifier" if self.head_name == "mlp" else "score"
        return {f"{prefix}.{name}": each for name, each in self.head_modules.named_parameters()}

    def pooled(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Ids and mask [B, T], 1 at real tokens and 0 to their right → [B, d]; position 0 of a row without tokens."""
        states = final_states(self.backbone, input_ids.masked_fill(attention_mask == 0, 0))
        last = (attention_mask.sum(1) - 1).clamp_min(0)
        return states[torch.arange(len(states), device=states.device), last]

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> ClassifierOutput:
        """Ids and mask [B, T] → logits [B, C]."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        pooled = self.pooled(input_ids, mask).to(next(self.head_modules.parameters()).dtype)
        if self.head_name == "linear":
            pooled = self.dropout(pooled)
        return ClassifierOutput(self.head_modules(pooled).float())


def hidden_size(backbone: nn.Module) -> int:
    """d of a model here."""
    config: Any = backbone.config
    return int(getattr(config, "model_dim", None) or config.hidden_size)
