"""Novelty of a skill, by hand."""

import math

import pytest
import torch

from runner.families.lora_moe.skills import is_novel, similarity

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


def test_novelty():
    assert is_novel(DIAGONAL, {})
    assert is_novel(DIAGONAL, {0: X})  # 0.707 < 0.75
    assert not is_novel(DIAGONAL, {0: X}, threshold=0.7)
    assert not is_novel(DIAGONAL, {0: X, 1: -X, 2: DIAGONAL})
    assert is_novel(DIAGONAL, {0: X, 1: -X, 2: DIAGONAL}, reduction="median")


def test_the_threshold_itself_is_not_novel():
    assert not is_novel(torch.tensor([3.0, 4.0]), {0: X}, threshold=0.6)


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
