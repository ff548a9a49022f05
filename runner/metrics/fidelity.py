"""How close a subject's logits are to a reference's, on the same tokens (formulas: README.md).

Logits come in chunks of positions, so that no caller has to hold two full [T, V] tensors. Per-entry differences are
taken in float32, sums and probabilities in float64: the KL of two close distributions is a small difference of
large numbers.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch

QUANTILES = {"p999": 0.999, "p99": 0.99, "p95": 0.95, "p90": 0.9, "p50": 0.5}


@dataclass(frozen=True, kw_only=True)
class LogitComparison:
    """Subject against reference on one sequence of T tokens over a vocabulary of V.

    `squared_difference`, `reference_square`, `subject_square` and `product` are sums over all T·V entries;
    `kl`, `kl_reverse` (nats), `top1` and `top5` are one value a position [T]; `next_*` one value for each position
    whose next token is known. `finite` is False where any logit is NaN or Inf: then no figure is defined.
    """

    tokens: int
    entries: int
    finite: bool
    squared_difference: float
    reference_square: float
    subject_square: float
    product: float
    kl: torch.Tensor
    kl_reverse: torch.Tensor
    top1: torch.Tensor
    top5: torch.Tensor
    next_logprob: torch.Tensor
    next_logprob_reference: torch.Tensor

    @property
    def mse(self) -> float:
        """Mean over positions and vocabulary entries of (subject - reference)²."""
        return self.squared_difference / self.entries

    @property
    def cosine(self) -> float | None:
        """Cosine of the two flattened [T·V] tensors; None where one of them is zero."""
        norms = math.sqrt(self.reference_square * self.subject_square)
        return self.product / norms if norms > 0 else None

    def figures(self) -> dict[str, float | None]:
        """The figures of this one sequence, by the names of the result contract; {} where a logit is not finite."""
        if not self.finite:
            return {"mse": None, "cosine": None, "kl": None}
        differences = self._next_difference()
        return {
            "mse": self.mse,
            "cosine": self.cosine,
            "kl": float(self.kl.mean()),
            "kl_reverse": float(self.kl_reverse.mean()),
            "top1": float(self.top1.mean()),
            "top5": float(self.top5.mean()),
            "dp_rms": math.sqrt(float(differences.square().mean())) if len(differences) else None,
            **_scale(self.product, self.subject_square, self.squared_difference, self.reference_square),
        }

    def _next_difference(self) -> torch.Tensor:
        return self.next_logprob.exp() - self.next_logprob_reference.exp()


def compare(chunks: Iterable[tuple[torch.Tensor, torch.Tensor]], token_ids: torch.Tensor) -> LogitComparison:
    """Compare logits given as (reference, subject) chunks [t, V] that together cover the positions of `token_ids` [T].

    Position p predicts token p + 1; the last position has no known next token. Raises ValueError where shapes differ.
    """
    sums = [0.0] * 4
    parts: dict[str, list[torch.Tensor]] = {}
    position, entries = 0, 0
    for reference, subject in chunks:
        if reference.shape != subject.shape:
            raise ValueError(f"reference logits {list(reference.shape)}, subject logits {list(subject.shape)}")
        reference, subject = reference.float(), subject.float()
        entries += reference.numel()
        squares = [each.square().sum(dtype=torch.float64) for each in (subject - reference, reference, subject)]
        found = [float(value) for value in (*squares, (subject * reference).sum(dtype=torch.float64))]
        sums = [total + value for total, value in zip(sums, found, strict=True)]
        best, other = (each.topk(min(5, each.shape[-1]), dim=-1).indices for each in (reference, subject))
        log_p, log_q = reference.double().log_softmax(-1), subject.double().log_softmax(-1)
        known = token_ids[position + 1 : position + 1 + len(reference)].to(log_p.device)
        rows = torch.arange(len(known), device=log_p.device)
        values = {
            "top1": (best[:, 0] == other[:, 0]).double(),
            "top5": (best.unsqueeze(-1) == other.unsqueeze(-2)).any(-1).double().mean(-1),
            "next_logprob": log_q[rows, known],
            "next_logprob_reference": log_p[rows, known],
        }
        # In place from here: fresh memory of this size costs more than the arithmetic. Rounding can leave -1e-17.
        difference = log_p - log_q
        values["kl"] = log_p.exp_().mul_(difference).sum(-1).clamp_min(0)
        values["kl_reverse"] = log_q.exp_().mul_(difference).sum(-1).neg().clamp_min(0)
        for name, value in values.items():
            parts.setdefault(name, []).append(value.cpu())
        position += len(reference)
    if position != len(token_ids):
        raise ValueError(f"logits of {position} positions for {len(token_ids)} tokens")
    return LogitComparison(
        tokens=position,
        entries=entries,
        finite=all(map(math.isfinite, sums[:3])),
        squared_difference=sums[0],
        reference_square=sums[1],
        subject_square=sums[2],
        product=sums[3],
        **{name: torch.cat(values) for name, values in parts.items()},
    )


def summarise(comparisons: Sequence[LogitComparison]) -> dict[str, float | None]:
    """The report's figures over several sequences, each of them one independent unit.

    A mean is the mean over sequences of the sequence's own mean; `_se` is its standard error over sequences
    (None for a single one); quantiles and maxima pool all positions. `scale` minimises the reported mse.
    All figures are None where any logit is not finite: a mean over the rest would hide it.
    """
    if not all(comparison.finite for comparison in comparisons):
        return {"mse": None, "cosine": None, "kl": None}
    figures: dict[str, float | None] = {"mse": fmean([c.mse for c in comparisons])}
    cosines = [c.cosine for c in comparisons if c.cosine is not None]
    figures["cosine"] = fmean(cosines) if len(cosines) == len(comparisons) else None
    for name in ("kl", "kl_reverse"):
        per_token = [getattr(c, name) for c in comparisons]
        means = [float(values.mean()) for values in per_token]
        pooled = torch.cat(per_token)
        figures |= {name: fmean(means), f"{name}_se": standard_error(means), f"{name}_max": float(pooled.max())}
        figures |= {f"{name}_{label}": float(pooled.quantile(q)) for label, q in QUANTILES.items()}
    figures["top1"] = fmean([float(c.top1.mean()) for c in comparisons])
    figures["top5"] = fmean([float(c.top5.mean()) for c in comparisons])
    differences = [c._next_difference() for c in comparisons if len(c.next_logprob)]
    squares = [float(d.square().mean()) for d in differences]
    figures["dp_rms"] = math.sqrt(fmean(squares)) if squares else None
    totals = [
        sum(getattr(c, name) / c.entries for c in comparisons)
        for name in ("product", "subject_square", "squared_difference", "reference_square")
    ]
    return figures | _scale(*totals)


def perplexities(comparisons: Sequence[LogitComparison]) -> dict[str, float | None]:
    """`loss` (nats a token) and `ppl` of subject and reference over all known next tokens. None where undefined."""
    if not all(c.finite for c in comparisons) or not any(len(c.next_logprob) for c in comparisons):
        return dict.fromkeys(("loss", "loss_reference", "ppl", "ppl_reference", "ppl_ratio"))
    subject = -float(torch.cat([c.next_logprob for c in comparisons]).mean())
    reference = -float(torch.cat([c.next_logprob_reference for c in comparisons]).mean())
    losses = {"loss": subject, "loss_reference": reference}
    return {**losses, "ppl": _exp(subject), "ppl_reference": _exp(reference), "ppl_ratio": _exp(subject - reference)}


def perplexity(logprobs: Sequence[torch.Tensor]) -> dict[str, float | None]:
    """`loss` (nats a token) and `ppl` of one model, from the log-probabilities of the true next tokens."""
    known = torch.cat(list(logprobs))
    if not len(known) or not bool(torch.isfinite(known).all()):
        return {"loss": None, "ppl": None}
    loss = -float(known.mean())
    return {"loss": loss, "ppl": _exp(loss)}


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean of independent `values`: s / √n with n - 1 degrees; None under two values."""
    if len(values) < 2:
        return None
    mean = fmean(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def _scale(
    product: float, subject_square: float, squared_difference: float, reference_square: float
) -> dict[str, float | None]:
    """The scalar s that minimises ‖s·subject - reference‖², and the share of the squared difference it removes."""
    if subject_square == 0:
        return {"scale": None, "magnitude_share": None}
    scale = product / subject_square
    left = reference_square - product * scale
    share = None if squared_difference == 0 else min(1.0, max(0.0, 1 - left / squared_difference))
    return {"scale": scale, "magnitude_share": share}


def _exp(value: float) -> float | None:
    return math.exp(value) if value < 700 else None
