"""Token ids that the checks run a model on."""

import torch

from runner.checks.context import Bench
from runner.evaluation.forward import limits
from runner.evaluation.tokenizers import encode, seeded_ids

# Tokens that stand for a prompt where there is no tokenizer.
SEEDED_LENGTH = 64
# Of padded batches: the longest sequence, and the positions after it.
LONGEST = 32
PADDING = 3


def prompt_ids(bench: Bench, text: str) -> torch.Tensor:
    """Token ids [T] of `text`, or what stands for it where there is no tokenizer."""
    vocab_size, longest = limits(bench.model)
    if bench.tokenizer is None:
        return seeded_ids(text, vocab_size, min(SEEDED_LENGTH, longest or SEEDED_LENGTH), bench.config.seed)
    return encode(bench.tokenizer, text, vocab_size)


def prompts(bench: Bench) -> list[torch.Tensor]:
    """The token ids [T] of each of `data.prompts`."""
    return [prompt_ids(bench, text) for text in bench.config.data.prompts]


def long_ids(bench: Bench) -> torch.Tensor:
    """One sequence [T] of the tier's length or the model's maximum: short prompts hide broken rotary embeddings."""
    vocab_size, longest = limits(bench.model)
    length: int = bench.config.tier.sequence_length
    return seeded_ids("a long sequence", vocab_size, min(length, longest or length), bench.config.seed)


def ragged(bench: Bench, count: int) -> list[torch.Tensor]:
    """`count` sequences [T], the longest first, each with room for padding within the model's maximum."""
    vocab_size, longest = limits(bench.model)
    longest = LONGEST if longest is None else max(1, min(LONGEST, longest - PADDING))
    lengths = [max(1, longest - i * longest // count) for i in range(count)]
    return [seeded_ids(f"sequence {i}", vocab_size, n, bench.config.seed) for i, n in enumerate(lengths)]


def right_padded(sequences: list[torch.Tensor], filler: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask [B, T] of sequences [t], with positions of the token `filler` after each, the longest too."""
    width = max(map(len, sequences)) + PADDING
    ids = torch.full((len(sequences), width), filler)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = sequence
        mask[row, : len(sequence)] = 1
    return ids, mask
