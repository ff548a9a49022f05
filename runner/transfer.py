"""Knowledge transfer from Python: take a modulation from one text, use it in another, or write it in for good.

    model = runner.load("merged_11_13")
    m = runner.transfer.extract(model, "The capital of France is Paris", position="mean")
    found = runner.transfer.inject(model, "The capital of Germany is", m)     # found.logits, found.baseline, found.kl
    with runner.transfer.permanent(model, m, strength=0.3) as edit: edit.save("edited")

`model`: an NPT model as `runner.load` gives it. A text is a str, or a list of token ids. Nothing of a call survives it.
Arithmetic: runner/families/npt/README.md.
"""

from collections.abc import Collection, Sequence
from pathlib import Path

from torch import nn

from runner.checkpoints.model_directory import has_tokenizer
from runner.errors import ConfigError
from runner.evaluation.tokenizers import TextTokenizer, load_tokenizer
from runner.families.npt import transfer, transfer_injection
from runner.families.npt.model import NptLlamaForCausalLM
from runner.families.npt.modulation import Modulation, load
from runner.families.npt.transfer import Position, combine, npt_model
from runner.families.npt.transfer_injection import How, Injection
from runner.families.npt.transfer_permanent import Permanent

__all__ = ["Injection", "Modulation", "combine", "extract", "inject", "load", "permanent"]

Text = str | Sequence[int]


def extract(
    model: nn.Module,
    text_or_ids: Text,
    position: Position = -1,
    layers: Collection[int] | None = None,
    special_tokens: bool = False,
    tokenizer: TextTokenizer | str | Path | None = None,
) -> Modulation:
    """The modulation that a text produces: `m[layer][projection]` is (v_a [k, d_in], v_b [k, d_out]).

    `position`: one (negative: from the end), a slice for several, or "mean" over all. `layers`: those that are active,
    by default all that are on. Raises ConfigError, ModelError, and RunnerError where it is not finite.
    """
    model = npt_model(model)
    ids, text = _ids(model, text_or_ids, special_tokens, tokenizer)
    return transfer.extract(model, ids, position, layers, text=text, special_tokens=special_tokens)


def inject(
    model: nn.Module,
    text_or_ids: Text,
    m: Modulation,
    mode: str = "replace",
    alpha: float | None = None,
    strength: float = 1.0,
    space: str = "weights",
    position: int = -1,
    layers: Collection[int] | None = None,
    special_tokens: bool = False,
    tokenizer: TextTokenizer | str | Path | None = None,
) -> Injection:
    """The next token's logits [V] with `m` at `position` of a text, and without it; their KL in nats; `top(n)`.

    `mode`: replace, blend (by `alpha`) or add (by `strength`); `space`: weights (ΔW) or vectors (v_a and v_b).
    """
    model, how = npt_model(model), How(mode=mode, alpha=alpha, strength=strength, space=space)
    ids, _ = _ids(model, text_or_ids, special_tokens, tokenizer)
    return transfer_injection.inject(model, ids, m, how, position, layers)


def permanent(
    model: nn.Module, m: Modulation, layers: Collection[int] | None = None, strength: float | None = None
) -> Permanent:
    """Within its `with` block `m` stands in the MLPs of `layers` (None: all of its): W += strength · ΔW.

    `strength` None: 0.3, of a complete NPT model 0.1. `.report`: a row a matrix; `.save(path, form)` writes what
    `runner.load` opens (form delta or hf); `.reset(layers)` and leaving the block give the first weights back.
    """
    return Permanent(npt_model(model), m, layers, strength)


def _ids(
    model: NptLlamaForCausalLM, text: Text, special_tokens: bool, tokenizer: TextTokenizer | str | Path | None
) -> tuple[list[int], str | None]:
    if not isinstance(text, str):
        return list(text), None
    if not isinstance(tokenizer, TextTokenizer):
        tokenizer = tokenizer_of(model, tokenizer)
    if not text:
        raise ConfigError("an empty text has no tokens")
    return tokenizer.encode(text, special=special_tokens), text


def tokenizer_of(model: NptLlamaForCausalLM, option: str | Path | None = None) -> TextTokenizer:
    """The tokenizer of the checkpoint that `model` was loaded from, else its base's."""
    origin = model.origin
    places = [origin.checkpoint if origin.checkpoint.is_dir() else origin.checkpoint.parent] if origin else []
    places += (
        [place for place in (origin.edited, origin.base) if place is not None and place.is_dir()] if origin else []
    )
    if option is None and not any(map(has_tokenizer, places)):
        raise ConfigError("the model's tokenizer is not known: give tokenizer=, or token ids in place of a text")
    return load_tokenizer(None if option is None else str(option), places)
