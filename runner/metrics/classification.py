"""How well classes are told apart: every figure follows from one confusion matrix of a whole set.

scikit-learn is the tests' oracle only: these are thirty lines of arithmetic, and it would bring a large package along.
"""

import math
from collections.abc import Mapping, Sequence

Matrix = Sequence[Sequence[int]]
# Figures of which a smaller one is better.
SMALLER_IS_BETTER = ("loss",)
# Half the width of a 95 % interval in standard deviations.
_Z = 1.959963984540054


def confusion(labels: Sequence[int], predictions: Sequence[int], classes: int) -> list[list[int]]:
    """How often each true class (rows) was predicted as each class (columns): [C][C]."""
    found = [[0] * classes for _ in range(classes)]
    for label, prediction in zip(labels, predictions, strict=True):
        found[label][prediction] += 1
    return found


def per_class(matrix: Matrix) -> list[dict[str, float]]:
    """Precision, recall, F1, F2 and support (rows) of each class; 0/0 is 0."""
    rows = []
    for i, row in enumerate(matrix):
        right, true, predicted = row[i], sum(row), sum(each[i] for each in matrix)
        rows.append({
            "precision": _ratio(right, predicted),
            "recall": _ratio(right, true),
            "f1": _ratio(2 * right, true + predicted),
            "f2": _ratio(5 * right, 4 * true + predicted),
            "support": true,
            "predicted": predicted,
        })  # fmt: skip
    return rows


def figures(matrix: Matrix) -> dict[str, float]:
    """Accuracy with its interval, and means over classes.

    Macro figures are over the classes that occur in truth or prediction (scikit-learn's `macro`), `balanced_accuracy`
    is the mean recall of those in truth. `majority`: the accuracy of always giving the commonest class.
    """
    rows = per_class(matrix)
    total, right = sum(map(sum, matrix)), sum(row[i] for i, row in enumerate(matrix))
    seen = [row for row in rows if row["support"] or row["predicted"]]
    true = [row["recall"] for row in rows if row["support"]]
    low, high = wilson(right, total)
    return {
        "accuracy": _ratio(right, total),
        "accuracy_low": low,
        "accuracy_high": high,
        "balanced_accuracy": _ratio(sum(true), len(true)),
        **{f"macro_{name}": _ratio(sum(row[name] for row in seen), len(seen))
           for name in ("f1", "f2", "recall", "precision")},
        "majority": _ratio(max((sum(row) for row in matrix), default=0), total),
        "rows": total,
    }  # fmt: skip


def wilson(right: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a share of `right` in `total` (Wilson 1927); 0 to 1 without rows."""
    if not total:
        return 0.0, 1.0
    share, z2 = right / total, _Z**2
    middle = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = _Z * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2)) / (1 + z2 / total)
    return (middle - half if right else 0.0), (middle + half if right < total else 1.0)


def difference(right: int, total: int, other_right: int, other_total: int) -> tuple[float, float, float]:
    """The first share minus the other one, with its 95 % interval, of independent rows (Newcombe 1998, method 10)."""
    share, other = _ratio(right, total), _ratio(other_right, other_total)
    (low, high), (other_low, other_high) = wilson(right, total), wilson(other_right, other_total)
    found = share - other
    below = math.sqrt((share - low) ** 2 + (other_high - other) ** 2)
    above = math.sqrt((high - share) ** 2 + (other - other_low) ** 2)
    return found, max(-1.0, found - below), min(1.0, found + above)


def in_words(found: Mapping[str, float]) -> str:
    """What figures of `figures` say beside always giving the commonest class."""
    accuracy, majority = found["accuracy"], found["majority"]
    interval = f"accuracy {accuracy:.3f} ({found['accuracy_low']:.3f} to {found['accuracy_high']:.3f})"
    if found["accuracy_low"] > majority:
        return f"{interval}, better than the {majority:.3f} of always giving the commonest class"
    if found["accuracy_high"] < majority:
        return f"{interval}, worse than guessing: always giving the commonest class has {majority:.3f}"
    return f"{interval}, no better than guessing: always giving the commonest class has {majority:.3f}"


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
