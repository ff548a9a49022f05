"""Novelty of a skill, by hand."""

import math

import pytest
import torch

from runner.families.lora_moe.skills import similarity

X, Y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
DIAGONAL = torch.tensor([3.0, 3.0])


@pytest.mark.parametrize(
    ("library", "highest", "median"),
    [
        ({0: X}, 1 / math.sqrt(2), 1 / math.sqrt(2)),
        ({0: X, 1: DIAGONAL}, 1.0, (1 + 1 / math.sqrt(2)) / 2),
        ({0: X, "a": -DIAGONAL, 2: Y}, 1 / math.sqrt(2), 1 / math.sqrt(2)),
        ({0: -X}, -1 / math.sqrt(2), -1 / math.sqrt(2)),
    ],
)
def test_similarity(library, highest, median):
    assert similarity(DIAGONAL, library) == pytest.approx(highest)
    assert similarity(DIAGONAL, library, "median") == pytest.approx(median)


def test_nothing_is_like_an_empty_library():
    assert similarity(DIAGONAL, {}) is None


def test_a_cosine_that_can_be_written_is_exact():
    """A skill whose similarity is the threshold is not below it."""
    assert similarity(torch.tensor([3.0, 4.0]), {0: X}) == 0.6


@pytest.mark.parametrize(
    ("library", "message"),
    [
        ({0: torch.ones(3)}, "0 has shape"),
        ({1: torch.zeros(2)}, "1 is zero"),
        ({1: torch.tensor([1, math.nan])}, "1 is zero"),
    ],
)
def test_what_has_no_cosine(library, message):
    with pytest.raises(ValueError, match=message):
        similarity(X, library)


def test_unknown_reduction():
    with pytest.raises(ValueError, match="max or median"):
        similarity(X, {}, "mean")
