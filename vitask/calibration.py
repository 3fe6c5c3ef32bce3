"""Temperature scaling, thresholds and abstention, all fitted on the val split."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vitask.data.spec import Dataset
from vitask.errors import InputError
from vitask.prompts import Candidates

if TYPE_CHECKING:
    from vitask.score import Prediction

LOG_TEMPERATURES = (-3.0, 3.0)
COVERAGES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)  # shares of the val split that are answered


@dataclass(frozen=True)
class Calibration:
    """What the val split says of a model's probabilities.

    temperature: the log-probabilities are divided by it
    threshold:   for two classes, the probability of the second one (at temperature 1) from which it
                 is the answer; None for more classes, or if the val split has one class only
    """

    temperature: float
    threshold: float | None = None

    @classmethod
    def of_json(cls, fields: Mapping[str, Any]) -> "Calibration":
        """What `asdict` wrote; ValueError for other numbers than a fit can give."""
        found = cls(**fields)
        if not 0 < found.temperature < float("inf"):
            raise InputError(f"temperature is {found.temperature!r}; expected a number above 0")
        if found.threshold is not None and not 0 <= found.threshold <= 1:
            raise InputError(f"threshold is {found.threshold!r}; expected a probability")
        return found


def calibrate(val: "Prediction", dataset: Dataset, known: Candidates) -> Calibration:
    """Temperature of the best likelihood, and threshold of the best Youden index.

    val: the prediction for the val split; known: the candidates of the dataset
    """
    spec, labels = dataset.spec, dataset.splits["val"].labels
    temperature = fit_temperature(val, dataset, known.members)
    if spec.multi_label or len(spec.classes) != 2:
        return Calibration(temperature)
    p = np.exp(val.log_probability - np.logaddexp.reduce(val.log_probability, 1, keepdims=True))
    return Calibration(temperature, fit_threshold((p @ known.members.astype(float))[:, 1], labels))


def fit_threshold(probability: np.ndarray, labels: np.ndarray) -> float | None:
    """The threshold with the largest sensitivity + specificity, halfway between two images.

    probability: (n,) of class 1; labels: 0 or 1, (n,). Of equal thresholds, the one nearest to one
    half. None if a class is missing.
    """
    if len(np.unique(labels)) < 2:
        return None
    scores = np.unique(probability)
    cuts = np.array([0.0, *(scores[1:] + scores[:-1]) / 2, 1.0])
    above = probability >= cuts[:, None]
    index = above[:, labels == 1].mean(1) - above[:, labels == 0].mean(1)
    best = cuts[index >= index.max() - 1e-12]
    return round(float(best[np.abs(best - 0.5).argmin()]), 6)


def at_temperature(prediction: "Prediction", temperature: float) -> np.ndarray:
    """Log-probabilities at a temperature; for independent labels, the logits are scaled."""
    log_p = prediction.log_probability
    if prediction.kind == "candidates":
        return log_p / temperature
    logits = log_p - np.log1p(-np.exp(np.minimum(log_p, -1e-12)))
    return -np.logaddexp(0, -logits / temperature)


def fit_temperature(val: "Prediction", dataset: Dataset, members: np.ndarray) -> float:
    """The temperature that maximises the likelihood of the val split."""
    from scipy.optimize import minimize_scalar

    truth = dataset.splits["val"].labels

    def loss(log_temperature: float) -> float:
        log_p = at_temperature(val, float(np.exp(log_temperature)))
        if val.kind == "labels":
            absent = np.log1p(-np.exp(np.minimum(log_p, -1e-12)))
            return -float(np.where(truth == 1, log_p, absent).mean())
        log_p = log_p - np.logaddexp.reduce(log_p, axis=1, keepdims=True)
        answer = candidate_of(truth, members)
        known = answer >= 0  # a label set that is not a candidate has no likelihood
        return -float(log_p[known, answer[known]].mean()) if known.any() else 0.0

    found = minimize_scalar(loss, bounds=LOG_TEMPERATURES, method="bounded")
    return round(float(np.exp(found.x)), 6)


def candidate_of(labels: np.ndarray, members: np.ndarray) -> np.ndarray:
    """The candidate that matches the labels; -1 if none does."""
    if labels.ndim == 1:
        return labels
    known = {row.tobytes(): number for number, row in enumerate(members)}
    return np.array([known.get(row.astype(bool).tobytes(), -1) for row in labels])


def confidence(prediction: "Prediction") -> np.ndarray:
    """Log-probability of the predicted answer, (images,)."""
    log_p = prediction.log_probability
    if prediction.kind == "labels":
        absent = np.log1p(-np.exp(np.minimum(log_p, -1e-12)))
        return np.maximum(log_p, absent).sum(1)
    return log_p.max(1) - np.logaddexp.reduce(log_p, axis=1)


def abstention(
    val: "Prediction", test: "Prediction", dataset: Dataset, members: np.ndarray
) -> list[list[float]]:
    """[share of val answered, share of test answered, accuracy on these] for each coverage."""
    of_val, of_test = confidence(val), confidence(test)
    right = _right(test, dataset.splits["test"].labels, members)
    found = []
    for coverage in COVERAGES:
        threshold = np.quantile(of_val, 1 - coverage) if coverage < 1 else -np.inf
        answered = of_test >= threshold
        accuracy = float(right[answered].mean()) if answered.any() else 0.0
        found.append([coverage, round(float(answered.mean()), 6), round(accuracy, 6)])
    return found


def _right(prediction: "Prediction", labels: np.ndarray, members: np.ndarray) -> np.ndarray:
    log_p = prediction.log_probability
    if prediction.kind == "labels":
        return ((log_p > np.log(0.5)) == (labels == 1)).all(1)
    return log_p.argmax(1) == candidate_of(labels, members)
