"""Turns predictions into class probabilities and decisions, the input of all metrics."""

from dataclasses import dataclass, replace

import numpy as np

from vitask.data.spec import DatasetSpec
from vitask.errors import InputError
from vitask.prompts import Candidates, candidates
from vitask.score import Prediction
from vitask.validation import decide

DIGITS = 2.0**-10  # nat
INVALID = -1  # a generated answer that is not a candidate


@dataclass(frozen=True)
class Scored:
    """One method's answers for one dataset's test images.

    labels:      int (n,), or 0/1 (n, classes) for multi-label
    probability: (n, classes); multi-label: that each label is present
    predicted:   like labels, by arg max over candidates or the threshold 0.5
    generated:   like labels, INVALID (multi-label: a row of it) for an answer that is not a
                 candidate; None for methods that do not generate answers
    threshold:   of two classes, the probability of class 1 from which it is the answer where
                 sensitivity and specificity are asked; None if no val split chose one
    groups:      str (n,), the patient of each image, or None
    """

    spec: DatasetSpec
    labels: np.ndarray
    probability: np.ndarray
    predicted: np.ndarray
    generated: np.ndarray | None
    threshold: float | None = None
    groups: np.ndarray | None = None


def scored(
    spec: DatasetSpec,
    labels: np.ndarray,
    prediction: Prediction,
    answers: Candidates | None = None,
    *,
    threshold: float | None = None,
    groups: np.ndarray | None = None,
) -> Scored:
    """Class probabilities and decisions from a prediction.

    A class's probability is the softmax over candidates, summed over the candidates of that class;
    a label's is the sum over the label sets that contain it. answers: the multi-label candidates.
    """
    log_p = prediction.log_probability
    if spec.multi_label and answers is None:
        raise InputError(f"{spec.name}: the candidates of a multi-label dataset must be given")
    if not spec.multi_label:
        answers = candidates(spec, labels)
    assert answers is not None
    _check(spec, labels, prediction, answers)
    if prediction.kind == "labels":
        probability, predicted = np.exp(log_p), decide(spec, log_p)
    else:
        probability = np.minimum(_softmax(log_p) @ answers.members.astype(float), 1)
        predicted = decide(spec, log_p, answers)
    generated = None
    if prediction.generated is not None:
        generated = np.stack([_parsed(spec, answers, text) for text in prediction.generated])
    return Scored(spec, labels, probability, predicted, generated, threshold, groups)


def _check(
    spec: DatasetSpec, labels: np.ndarray, prediction: Prediction, answers: Candidates
) -> None:
    """Raise ValueError for a prediction that does not match its dataset."""
    widths = {"candidates": len(answers.texts)}
    if spec.multi_label:
        widths["labels"] = len(spec.classes)
    if prediction.kind not in widths:
        raise InputError(
            f"{spec.name}: kind of the prediction is {prediction.kind!r}; "
            f"expected {' or '.join(widths)} for the task {spec.task!r}"
        )
    log_p, expected = prediction.log_probability, (len(labels), widths[prediction.kind])
    if log_p.shape != expected:
        raise InputError(f"{spec.name}: log-probabilities {log_p.shape}; expected {expected}")
    if np.isnan(log_p).any() or not np.isfinite(log_p.max(1)).all():
        raise InputError(f"{spec.name}: log-probabilities are NaN or all infinite in some rows")
    if prediction.generated is not None and len(prediction.generated) != len(labels):
        raise InputError(
            f"{spec.name}: {len(prediction.generated)} generated answers to {len(labels)} images"
        )


def _softmax(log_p: np.ndarray) -> np.ndarray:
    shifted = np.exp(log_p - log_p.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


def _parsed(spec: DatasetSpec, answers: Candidates, text: str) -> np.ndarray:
    if spec.multi_label:
        labels = answers.parse_labels(text, spec.classes)
        return np.full(len(spec.classes), INVALID) if labels is None else labels.astype(int)
    found = answers.parse(text)
    return np.array(INVALID if found is None else answers.members[found].argmax())


def rounded(prediction: Prediction) -> Prediction:
    """Log-probabilities rounded to 2^-10 nat, as samples keep them; every decision stays.

    A rounded tie, or a label's probability rounded across one half, moves one step back.
    """
    exact, half = prediction.log_probability, np.log(0.5)
    kept = np.round(exact / DIGITS) * DIGITS
    if prediction.kind == "labels":
        wrong = (kept > half) != (exact > half)
        kept = np.where(wrong, kept + np.where(exact > half, DIGITS, -DIGITS), kept)
    else:
        best, rows = exact.argmax(1), np.arange(len(exact))
        wrong = kept.argmax(1) != best
        kept[rows, best] = np.where(wrong, kept.max(1) + DIGITS, kept[rows, best])
    return replace(prediction, log_probability=kept)
