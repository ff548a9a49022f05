"""Whether a skill is new to a library of skills: the cosine of its embedding to theirs (spec/formats.md §4)."""

from collections.abc import Mapping

import torch
from torch.nn.functional import cosine_similarity

THRESHOLD = 0.75
REDUCTIONS = ("max", "median")


def similarity(
    embedding: torch.Tensor, library: Mapping[int | str, torch.Tensor], reduction: str = "max"
) -> float | None:
    """The max or median cosine of `embedding` [d] to those of `library` [d]; None for an empty library.

    The median of an even number is the mean of the middle two. Raises ValueError for another size, for a zero
    embedding and for NaN or Inf, which have no direction.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction} is unknown; choose {' or '.join(REDUCTIONS)}")
    if not library:
        return None
    for name, vector in {"the embedding": embedding, **library}.items():
        if vector.shape != embedding.shape or vector.ndim != 1:
            raise ValueError(f"{name} has shape {list(vector.shape)}, the embedding {list(embedding.shape)}")
        if not torch.isfinite(vector).all() or not vector.any():
            raise ValueError(f"{name} is zero or not finite, and has no direction")
    known = torch.stack([vector.double() for vector in library.values()])
    cosines = cosine_similarity(embedding.double()[None], known, dim=-1, eps=0.0)
    return float(cosines.max() if reduction == "max" else cosines.quantile(0.5))


def is_novel(
    embedding: torch.Tensor,
    library: Mapping[int | str, torch.Tensor],
    *,
    threshold: float = THRESHOLD,
    reduction: str = "max",
) -> bool:
    """Whether the similarity to the library is below `threshold`; everything is new to an empty one."""
    found = similarity(embedding, library, reduction)
    return found is None or found < threshold
