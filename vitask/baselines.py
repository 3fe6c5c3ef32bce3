"""Baselines: class frequencies, a linear probe, contrastive decoding, an ensemble."""

from collections.abc import Mapping

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from vitask.checkpoint import VITask
from vitask.data.spec import Dataset
from vitask.errors import InputError
from vitask.features import Features
from vitask.score import Prediction
from vitask.tsm import TSM
from vitask.validation import decide, macro_f1

Scores = dict[float, np.ndarray]  # strength -> log-probabilities (images, candidates)

INVERSE_REGULARISATION = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # C, chosen on the val split
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)  # contrastive strengths and ensemble weights
SMALLEST = 1e-6  # probability of a class that is absent from the train split


def majority(datasets: Mapping[str, Dataset]) -> list[Prediction]:
    """The train split's class frequencies, for every image."""
    predictions = []
    for name, dataset in datasets.items():
        spec, labels = dataset.spec, dataset.splits["train"].labels
        if spec.multi_label:
            share = labels.mean(axis=0)
        else:
            share = np.bincount(labels, minlength=len(spec.classes)) / len(labels)
        log_share = np.log(share.clip(SMALLEST, 1 - SMALLEST))
        if not spec.multi_label:
            log_share -= np.log(np.exp(log_share).sum())
        rows = np.tile(log_share, (len(dataset.splits["test"]), 1))
        predictions.append(Prediction(name, _kind(dataset), rows))
    return predictions


def linear_probe(
    datasets: Mapping[str, Dataset], features: Features
) -> tuple[list[Prediction], dict[str, dict[str, float]]]:
    """Logistic regression on frozen features, one per dataset; C chosen by val macro-F1.

    Returns the predictions for the test splits, and per dataset the val macro-F1 of every C.
    Raises ValueError for a train split of one class.
    """
    predictions, curves = [], {}
    for name, dataset in datasets.items():
        labels = dataset.splits["train"].labels
        if labels.ndim == 1 and len(np.unique(labels)) < 2:
            raise InputError(
                f"{name}: its {len(labels)} training image(s) are all of class {labels[0]}; "
                "expected two classes or more: raise --limit or bring more images"
            )
        fits, curve = {}, {}
        for c in INVERSE_REGULARISATION:
            fits[c] = _fit(dataset, features(name, "train").numpy(), c)
            log_p = _log_probability(fits[c], dataset, features(name, "val").numpy())
            val = dataset.splits["val"].labels
            curve[f"C={c:g}"] = macro_f1(dataset.spec, val, decide(dataset.spec, log_p))
        best = max(INVERSE_REGULARISATION, key=lambda c: curve[f"C={c:g}"])
        log_p = _log_probability(fits[best], dataset, features(name, "test").numpy())
        predictions.append(Prediction(name, _kind(dataset), log_p))
        curves[name] = curve
    return predictions, curves


def _kind(dataset: Dataset) -> str:
    return "labels" if dataset.spec.multi_label else "candidates"


def _fit(dataset: Dataset, train: np.ndarray, c: float) -> list[Pipeline | float]:
    """One classifier, or one per label; a constant label gets its value instead."""
    labels = dataset.splits["train"].labels
    columns = labels.T if dataset.spec.multi_label else [labels]
    return [
        float(column[0])
        if dataset.spec.multi_label and len(set(column.tolist())) == 1
        else make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=500)).fit(
            train, column
        )
        for column in columns
    ]


def _log_probability(fits: list[Pipeline | float], dataset: Dataset, x: np.ndarray) -> np.ndarray:
    """float64 (n, classes), as sample files store it and metrics read it."""
    x = x.astype(np.float64)
    classes = len(dataset.spec.classes)
    if dataset.spec.multi_label:
        columns = [
            np.full(len(x), fit) if isinstance(fit, float) else fit.predict_proba(x)[:, 1]
            for fit in fits
        ]
        return np.log(np.stack(columns, axis=1).clip(SMALLEST, 1 - SMALLEST))
    (fit,) = fits
    assert isinstance(fit, Pipeline)
    seen = np.full((len(x), classes), SMALLEST)
    seen[:, fit.classes_] = fit.predict_proba(x)
    return np.log(seen.clip(SMALLEST) / seen.sum(axis=1, keepdims=True))


def contrastive(model: VITask, name: str, dataset: Dataset, image: Features, split: str) -> Scores:
    """Contrastive decoding: log p(y | v) - strength log p(y | mean training image)."""
    own = model.score(name, image(name, split))
    blank = model.score(name, image(name, "train").mean(0, keepdim=True))
    return {strength: own - strength * blank for strength in STRENGTHS}


def ensemble(
    tsm: TSM, model: VITask, name: str, dataset: Dataset, image: Features, split: str
) -> Scores:
    """(1 - weight) times a VLM's class log-probabilities plus weight times a TSM's."""
    own = model.score(name, image(name, split))
    own = own - np.logaddexp.reduce(own, axis=1, keepdims=True)
    other = tsm.log_probabilities(dataset.splits[split].images, dataset.spec)
    if dataset.spec.multi_label:  # per candidate label set, with independent labels
        members = model.tasks[name].candidates.members
        absent = np.log1p(-np.minimum(np.exp(other), 1 - 1e-12))
        other = other @ members.T + absent @ (~members).T
    return {weight: (1 - weight) * own + weight * other for weight in STRENGTHS}
