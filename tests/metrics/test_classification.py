"""Figures of a confusion matrix against published runs, against scikit-learn, and against what they mean."""

import json
import random

import pytest

from runner.metrics.classification import (
    confusion,
    difference,
    figures,
    in_words,
    per_class,
    wilson,
)
from tests.conftest import golden_file


def published():
    path = golden_file("finetune/metrics.json")
    return json.loads(path.read_text()) if path else []


@pytest.mark.parametrize("case", published(), ids=lambda case: case["name"])
def test_published_matrices(case):
    found = figures(case["confusion_rows_true_columns_predicted"])
    for name in ("accuracy", "macro_f1", "macro_f2", "macro_recall"):
        assert found[name] == pytest.approx(case[name], abs=1e-12), name
    assert found["rows"] == case["examples"]


def test_a_class_that_is_missing_counts_only_where_it_occurs():
    never_true = [[3, 1, 1], [0, 4, 1], [0, 0, 0]]
    assert figures(never_true)["macro_recall"] == pytest.approx((0.6 + 0.8 + 0) / 3)
    assert figures(never_true)["balanced_accuracy"] == pytest.approx(0.7)
    nowhere = [[4, 1, 0], [1, 4, 0], [0, 0, 0]]
    assert figures(nowhere)["macro_f1"] == pytest.approx(0.8)
    assert per_class(nowhere)[2] == {
        "precision": 0, "recall": 0, "f1": 0, "f2": 0, "support": 0, "predicted": 0,
    }  # fmt: skip


@pytest.mark.slow
def test_scikit_learn_says_the_same():
    oracle = pytest.importorskip("sklearn.metrics")
    chooser = random.Random(0)
    for _ in range(40):
        classes = chooser.randint(2, 5)
        rows = chooser.randint(1, 60)
        labels, predictions = ([chooser.randrange(classes) for _ in range(rows)] for _ in "ab")
        matrix = confusion(labels, predictions, classes)
        assert matrix == oracle.confusion_matrix(labels, predictions, labels=range(classes)).tolist()
        found = figures(matrix)
        for beta, name in ((1, "macro_f1"), (2, "macro_f2")):
            wanted = oracle.fbeta_score(labels, predictions, beta=beta, average="macro", zero_division=0)
            assert found[name] == pytest.approx(wanted)
        recall = oracle.recall_score(labels, predictions, average="macro", zero_division=0)
        assert found["macro_recall"] == pytest.approx(recall)
        assert found["accuracy"] == pytest.approx(oracle.accuracy_score(labels, predictions))


def test_intervals():
    """Wilson's of 15/20 and Newcombe's of 56/70 against 48/80, as their papers print them."""
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert difference(56, 70, 48, 80) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)
    assert wilson(0, 10)[0] == 0
    assert wilson(10, 10)[1] == 1
    assert wilson(0, 0) == (0, 1)


def test_in_words():
    assert "no better than guessing" in in_words(figures([[5, 5], [5, 5]]))
    assert "worse than guessing" in in_words(figures([[10, 90], [90, 10]]))
    assert "better than the 0.500" in in_words(figures([[90, 10], [10, 90]]))
