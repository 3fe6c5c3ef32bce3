"""Validation: the one metric that chooses the checkpoint of every method."""

from collections.abc import Callable

import numpy as np
from sklearn.metrics import f1_score

from vitask.data.spec import DatasetSpec
from vitask.prompts import Candidates

# Called after every epoch with the name of the training, the epoch from 1, and the epochs in all.
OnEpoch = Callable[[str, int, int], None]


def ignore(what: str, epoch: int, epochs: int) -> None:
    """An `OnEpoch` that does nothing."""


def decide(
    spec: DatasetSpec, log_probability: np.ndarray, candidates: Candidates | None = None
) -> np.ndarray:
    """Log-probabilities -> labels in the dataset's form, int64 (n,) or (n, classes).

    With candidates, (n, candidates): the labels of the best one. Without, (n, classes): the best
    class, or for multi-label every label with a probability above 1/2.
    """
    if candidates is not None:
        best = candidates.members[log_probability.argmax(-1)]
        return best.astype(np.int64) if spec.multi_label else best.argmax(-1)
    if spec.multi_label:
        return (log_probability > np.log(0.5)).astype(np.int64)
    return log_probability.argmax(-1)


def macro_f1(spec: DatasetSpec, labels: np.ndarray, predicted: np.ndarray) -> float:
    """Mean F1 over all classes of the dataset; 0 for a class without support and predictions."""
    classes = list(range(len(spec.classes)))
    return float(f1_score(labels, predicted, labels=classes, average="macro", zero_division=0))
