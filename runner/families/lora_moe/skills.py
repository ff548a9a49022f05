"""The skills of training data, and the library of them: an embedding for each skill that experts were trained on.

Whether a skill is new to a library is decided by the cosine of its embedding to theirs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cosine_similarity

from runner.data.world import tables
from runner.errors import ModelError
from runner.families.lora_moe import REDUCTIONS


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


Library = Mapping[int | str, torch.Tensor]
# Texts of a skill that its embedding is made of: more of them change it little.
TEXTS = 64
# Sentences of the built-in world about one subject that make one document.
SENTENCES = 8


@dataclass(frozen=True, kw_only=True)
class Skill:
    """A skill of the training data: its cosine to the library before it (None: empty), and whether it is new."""

    name: str
    similarity: float | None
    is_new: bool


def world_skills(sentences: Sequence[str]) -> dict[str, list[str]]:
    """The built-in world's `sentences` by what they are about: the names of its tables of facts, and the rest."""
    subjects = {text: name for name, table in tables().items() for wordings in table.facts() for text in wordings}
    skills: dict[str, list[str]] = {}
    for sentence in sentences:
        skills.setdefault(subjects.get(sentence, "numbers and dates"), []).append(sentence)
    return dict(sorted(skills.items()))


def documents_by_skill(documents: Sequence[str], name: str | None) -> dict[str, list[str]]:
    """The texts of each skill: all of the file `name`, or, without one, each subject of the built-in world."""
    if name is not None:
        return {name: list(documents)}
    return {
        subject: [" ".join(sentences[i : i + SENTENCES]) for i in range(0, len(sentences), SENTENCES)]
        for subject, sentences in world_skills(documents).items()
    }


@torch.no_grad()
def embedding(base: nn.Module, texts: Sequence[Sequence[int]]) -> torch.Tensor:
    """A skill's embedding [d]: the mean of the base's last hidden states (after the final norm) over all tokens of its
    texts, token ids each, in float32."""
    device = next(base.parameters()).device
    total, count = torch.zeros(0), 0
    for text in texts[:TEXTS]:
        ids = torch.tensor([list(text)], device=device)
        states = base.base_model(ids, use_cache=False).last_hidden_state[0]  # type: ignore[operator]
        summed = states.float().sum(0).cpu()
        total, count = (summed if not count else total + summed), count + len(text)
    return total / count


def add_skills(
    base: nn.Module,
    texts: Mapping[str, Sequence[Sequence[int]]],
    library: Library,
    *,
    threshold: float,
    reduction: str,
) -> tuple[dict[int | str, torch.Tensor], list[Skill]]:
    """The library with the new ones of the skills that `texts` (token ids by skill) show, and what was found of each.

    One after the other: what is like an earlier skill gets no entry of its own. Raises ModelError for a library of
    other embeddings.
    """
    grown = dict(library)
    found = []
    for name, own in texts.items():
        vector = embedding(base, own)
        try:
            cosine = similarity(vector, grown, reduction)
        except ValueError as error:
            raise ModelError(f"the skill library does not fit: {error}") from error
        is_new = name not in grown and (cosine is None or cosine < threshold)
        if is_new:
            grown[name] = vector
        found.append(Skill(name=name, similarity=cosine, is_new=is_new))
    return grown, found
