"""The vocabularies of several models as one: which row of whose embedding belongs to which token of the output.

The rules are mergekit's. Tokens are read from tokenizer.json; the output's is the base's, to which tokens are added.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from runner.errors import CheckpointError
from runner.files.strict_json import read_object

TOKENIZER = "tokenizer.json"
_LIMIT = 256 << 20


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """One model's: `content` of tokenizer.json, and token → id of those ids that its embedding has."""

    content: Mapping[str, Any]
    ids: Mapping[str, int]
    added: tuple[Mapping[str, Any], ...]


def read_vocabulary(directory: Path, size: int) -> Vocabulary:
    """The vocabulary beside a model whose embedding has `size` rows. Raises CheckpointError."""
    path = directory / TOKENIZER
    if not path.is_file():
        raise CheckpointError(f"{directory}: has no {TOKENIZER}, by which its tokens could be told from others'")
    content = read_object(path, "tokenizer", _LIMIT)
    model = content.get("model")
    listed = model.get("vocab") if isinstance(model, Mapping) else None
    pairs: list[tuple[Any, Any]]
    if isinstance(listed, list):  # Unigram: pairs of token and score, in the order of the ids
        pairs = [(each[0] if isinstance(each, list) and each else None, number) for number, each in enumerate(listed)]
    else:
        pairs = list(listed.items()) if isinstance(listed, Mapping) else [(None, 0)]
    added = content.get("added_tokens") or []
    sound = isinstance(added, list) and all(isinstance(each, Mapping) for each in added)
    pairs += [(each.get("content"), each.get("id")) for each in added] if sound else [(None, 0)]
    if not all(isinstance(token, str) and type(number) is int and number >= 0 for token, number in pairs):
        raise CheckpointError(f"{path}: its vocabulary is no list of tokens with ids")
    ids = {token: number for token, number in pairs if number < size}
    return Vocabulary(content=content, ids=ids, added=tuple(each for each in added if each["id"] < size))


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """The output's tokens by the models'. `rows[i]` [V]: the row of model i's embedding for each token, -1 where it
    has none. `base`: its number among the models; None where no model is the base."""

    tokenizer: bytes
    size: int
    padded: int
    rows: tuple[NDArray[np.int64], ...]
    base: int | None

    @cached_property
    def present(self) -> NDArray[np.int64]:
        """How many models have each token."""
        return np.sum([rows >= 0 for rows in self.rows], axis=0)

    def aligned(self, embeddings: Sequence[torch.Tensor], number: int) -> torch.Tensor:
        """Model `number`'s embedding [padded, …] in the output's order.

        A token that it lacks has the base's row, where the base has none the mean of the models that do; rows beyond
        the tokens are the mean of all tokens'.
        """
        own = self.rows[number]
        found = torch.zeros((self.padded, *embeddings[0].shape[1:]), dtype=embeddings[number].dtype)
        found[: self.size][torch.from_numpy(own >= 0)] = embeddings[number][torch.from_numpy(own[own >= 0])]
        lacking = np.nonzero((own < 0) & (self.present > 0))[0]
        if self.base is not None:
            theirs = self.rows[self.base][lacking]
            has = theirs >= 0
            found[torch.from_numpy(lacking[has])] = embeddings[self.base][torch.from_numpy(theirs[has])].to(found.dtype)
            lacking = lacking[~has]
        if len(lacking):
            total = torch.zeros((len(lacking), *found.shape[1:]), dtype=torch.float64)
            for rows, embedding in zip(self.rows, embeddings, strict=True):
                theirs = rows[lacking]
                has = theirs >= 0
                total[torch.from_numpy(has)] += embedding[torch.from_numpy(theirs[has])].double()
            counts = torch.from_numpy(self.present[lacking]).reshape(-1, *[1] * (found.dim() - 1))
            found[torch.from_numpy(lacking)] = (total / counts).to(found.dtype)
        if self.padded > self.size:
            found[self.size :] = found[: self.size].double().mean(dim=0).to(found.dtype)
        return found


def align(
    vocabularies: Sequence[Vocabulary], how: str | int, base: int | None, multiple: int | None = None
) -> Alignment:
    """The output's vocabulary: `base` or that of a model by its number, or the union, the base's tokens first."""
    leading = vocabularies[how if isinstance(how, int) else base or 0]
    content: dict[str, Any] = dict(leading.content)
    ids = dict(leading.ids)
    if how == "union":
        content["added_tokens"] = list(leading.added)
        ordered = [leading, *(each for each in vocabularies if each is not leading)]
        special = {each["content"] for one in ordered for each in one.added}
        plain = dict.fromkeys(token for one in ordered for token in one.ids if token not in special)
        entries: list[dict[str, Any]] = [{"content": token, **_ADDED} for token in plain]
        entries += [dict(each) for one in ordered for each in one.added]
        for entry in entries:
            if entry["content"] not in ids:
                entry["id"] = ids[entry["content"]] = max(ids.values(), default=-1) + 1
                content["added_tokens"].append(entry)
    size = max(ids.values(), default=-1) + 1
    rows = []
    for one in vocabularies:
        own = np.full(size, -1, dtype=np.int64)
        for token, number in ids.items():
            own[number] = one.ids.get(token, -1)
        rows.append(own)
    padded = size if multiple is None else -(-size // multiple) * multiple
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    return Alignment(
        tokenizer=text.encode(errors="surrogatepass"), size=size, padded=padded, rows=tuple(rows), base=base
    )


# As transformers adds a token that is only a text.
_ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
