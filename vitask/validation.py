"""Choosing on validation data: the one figure by which every method's checkpoint is chosen."""

from collections.abc import Callable

import numpy as np
from sklearn.metrics import f1_score

from vitask.data.spec import DatasetSpec
from vitask.prompts import Candidates

# Called after every epoch of a training with what is trained, the epoch from 1, and their number.
OnEpoch = Callable[[str, int, int], None]


def ignore(what: str, epoch: int, epochs: int) -> None:
    """An `OnEpoch` that does nothing."""


def decide(
    spec: DatasetSpec, log_probability: np.ndarray, candidates: Candidates | None = None
) -> np.ndarray:
    """Log-probabilities -> labels of the same form as the dataset's.

    With candidates: the arg max answer's labels. Without: the arg max class, or for multi-label
    every label whose own probability is above one half.
    """
    if candidates is not None:
        best = candidates.members[log_probability.argmax(-1)]
        return best.astype(np.int64) if spec.multi_label else best.argmax(-1)
    if spec.multi_label:
        return (log_probability > np.log(0.5)).astype(np.int64)
    return log_probability.argmax(-1)


def macro_f1(spec: DatasetSpec, labels: np.ndarray, predicted: np.ndarray) -> float:
    """Mean F1 over the fixed label set; a class without support and prediction counts as 0."""
    classes = list(range(len(spec.classes)))
    return float(f1_score(labels, predicted, labels=classes, average="macro", zero_division=0))
