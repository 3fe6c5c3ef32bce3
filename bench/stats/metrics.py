"""Metrics as functions of weights over test images.

One definition serves the point value (all weights 1), the bootstrap (weights count how often an
image is drawn) and the paired permutation test (weights choose between two methods' answers).
Every metric but AUC is a function of sums over images: `columns` gives the summands, `finish` the
metrics, and a weighting takes one matrix product.
Weights are float (resamples, n); every metric comes back as float64 (resamples,).
"""

from collections.abc import Iterator, Mapping

import numpy as np

from vitask.data.spec import DatasetSpec
from vitask.decision import INVALID, Scored

ECE_BINS = 15

Columns = dict[str, np.ndarray]  # name -> (n, width): summands
Sums = Mapping[str, np.ndarray]  # name -> (resamples, width)


def measure(
    data: Scored, weights: np.ndarray | None = None, *, ranks: bool = True
) -> dict[str, np.ndarray]:
    """Every metric of the task, each (resamples,); NaN where it is undefined.

    ranks: False leaves out AUC, which takes most of the time.
    """
    if weights is None:
        weights = np.ones((1, len(data.labels)))
    sums = {name: weights @ column for name, column in columns(data).items()}
    done = finish(data.spec, sums, dict.fromkeys(of_ranks(data), np.full(len(weights), np.nan)))
    if ranks:
        done |= {name: auc(one, weights[:, at]) for name, (one, at) in of_ranks(data).items()}
    return done


def confusion(data: Scored) -> list[list[int]]:
    """Counts (true class, predicted class); for multi-label [[tn, fp], [fn, tp]] summed."""
    truth, predicted = data.labels.ravel(), data.predicted.ravel()
    size = 2 if data.spec.multi_label else len(data.spec.classes)
    return np.bincount(truth * size + predicted, minlength=size**2).reshape(size, size).tolist()


# Summands


def columns(data: Scored) -> Columns:
    """The summands of each image. In multi-label tasks each label is a class."""
    spec, n = data.spec, len(data.labels)
    true, guess = _indicator(spec, data.labels), _indicator(spec, data.predicted)
    if spec.multi_label:
        right = (data.labels == data.predicted).all(1)
        agrees = (data.probability > 0.5) == (data.labels == 1)
        medmnist = agrees.mean(1)
        # Calibration per label: confidence that it is present, or absent.
        confidence = np.maximum(data.probability, 1 - data.probability)
    else:
        right = data.labels == data.predicted
        binary = spec.task == "binary-class"  # medmnist thresholds the last column
        medmnist = (data.probability[:, -1] > 0.5) == (data.labels == 1) if binary else right
        confidence, agrees = data.probability.max(1, keepdims=True), right[:, None]
    done = {
        "count": np.ones((n, 1)),
        "right": right[:, None].astype(float),
        "medmnist": np.asarray(medmnist, dtype=float)[:, None],
        "support": true,
        "named": guess,
        "hit": true * guess,
        "calibration": _calibration(confidence, agrees),
    }
    if spec.task == "ordinal-regression":
        done["distance"] = (data.labels - data.predicted)[:, None].astype(float) ** 2
    if data.generated is not None:
        done |= _generated(spec, true, data.labels, data.generated)
    if data.threshold is not None:
        done |= _of_two("", data)
        if data.groups is not None:
            patients, first = by_patient(data)
            for name, column in _of_two("patient_", patients).items():
                done[name] = np.zeros((n, 1))
                done[name][first] = column
    return done


def _of_two(kind: str, data: Scored) -> Columns:
    """Summands of sensitivity and specificity: class 1 against class 0, at the threshold."""
    positive, named = data.labels == 1, data.probability[:, -1] >= data.threshold
    found = {
        "positive": positive, "true_positive": positive & named,
        "negative": ~positive, "true_negative": ~positive & ~named,
    }  # fmt: skip
    return {f"{kind}{name}": column[:, None].astype(float) for name, column in found.items()}


def by_patient(data: Scored) -> tuple[Scored, np.ndarray]:
    """One row a patient, and the number of its first image, (patients,).

    Its probability is the mean over its images; it is positive if one of its images is. The images
    of a patient are drawn and swapped together, so the weight of the first is that of all.
    """
    assert data.groups is not None
    _, first, member = np.unique(data.groups, return_index=True, return_inverse=True)
    labels = np.zeros(len(first), dtype=np.int64)
    np.maximum.at(labels, member, data.labels)
    probability = np.zeros((len(first), 2))
    np.add.at(probability, member, data.probability)
    probability /= np.bincount(member)[:, None]
    predicted = probability.argmax(1)
    return Scored(data.spec, labels, probability, predicted, None, data.threshold), first


def of_ranks(data: Scored) -> dict[str, tuple[Scored, np.ndarray]]:
    """AUC's names -> the answers that it ranks, and the number of each one's image."""
    found = {"auc": (data, np.arange(len(data.labels)))}
    if data.threshold is not None and data.groups is not None:
        found["patient_auc"] = by_patient(data)
    return found


def _generated(
    spec: DatasetSpec, true: np.ndarray, labels: np.ndarray, generated: np.ndarray
) -> Columns:
    """Summands of generated answers. An invalid answer is wrong and predicts no class."""
    invalid = (generated == INVALID).reshape(len(labels), -1).any(1)
    right = (generated == labels).reshape(len(labels), -1).all(1)
    kept = invalid.reshape(-1, 1) if generated.ndim == 2 else invalid
    guess = _indicator(spec, np.where(kept, 0, generated)) * ~invalid[:, None]
    return {
        "gen_right": right[:, None].astype(float),
        "gen_invalid": invalid[:, None].astype(float),
        "gen_named": guess,
        "gen_hit": true * guess,
    }


def _calibration(confidence: np.ndarray, agrees: np.ndarray) -> np.ndarray:
    """(n, width * 15): agreement minus confidence, in the column of the confidence's bin."""
    bins = np.minimum((confidence * ECE_BINS).astype(int), ECE_BINS - 1)
    gap = np.eye(ECE_BINS)[bins] * (agrees - confidence)[..., None]
    return gap.reshape(len(confidence), -1)


def _indicator(spec: DatasetSpec, labels: np.ndarray) -> np.ndarray:
    return labels.astype(float) if spec.multi_label else np.eye(len(spec.classes))[labels]


# Metrics


def finish(
    spec: DatasetSpec, sums: Sums, ranked: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Metrics from sums over images; those of ranks (AUC) are put among them."""
    total = sums["count"]

    def share(name: str) -> np.ndarray:
        return (sums[name] / total)[:, 0]

    hit, support, named = sums["hit"], sums["support"], sums["named"]
    recall = _divide(hit, support)
    balanced = recall
    if spec.multi_label:  # per label, the mean of sensitivity and specificity
        balanced = (recall + _divide(total - support - named + hit, total - support)) / 2
    widths = sums["calibration"].shape[1] // ECE_BINS
    done = {
        "accuracy": share("right"),
        "macro_f1": _f1(hit, support, named).mean(1),
        "auc": ranked["auc"],
        "medmnist_acc": share("medmnist"),
        "balanced_accuracy": _mean_of_defined(balanced),
        "ece": np.abs(sums["calibration"]).sum(1) / total[:, 0] / widths,
    }
    if spec.task == "ordinal-regression":
        done["qwk"] = _quadratic_kappa(sums)
    for kind in ("", "patient_"):
        if f"{kind}positive" in sums:
            if f"{kind}auc" in ranked:
                done[f"{kind}auc"] = ranked[f"{kind}auc"]
            hits, spared = sums[f"{kind}true_positive"], sums[f"{kind}true_negative"]
            done[f"{kind}sensitivity"] = _divide(hits, sums[f"{kind}positive"])[:, 0]
            done[f"{kind}specificity"] = _divide(spared, sums[f"{kind}negative"])[:, 0]
    for number, name in enumerate(spec.classes):
        done[f"recall:{name}"] = recall[:, number]
    if "gen_right" in sums:
        done["gen_accuracy"] = share("gen_right")
        done["gen_macro_f1"] = _f1(sums["gen_hit"], support, sums["gen_named"]).mean(1)
        done["gen_invalid"] = share("gen_invalid")
    return done


def _f1(hit: np.ndarray, support: np.ndarray, named: np.ndarray) -> np.ndarray:
    """F1 per class; 0 for a class with neither support nor predictions."""
    both = support + named
    return np.divide(2 * hit, both, out=np.zeros_like(hit), where=both > 0)


def _quadratic_kappa(sums: Sums) -> np.ndarray:
    """Cohen's kappa with quadratic weights; NaN where the expected disagreement is 0."""
    total = sums["count"][:, 0]
    grades = np.arange(sums["support"].shape[1])
    distance = (grades[:, None] - grades[None]) ** 2.0
    expected = ((sums["support"] @ distance) * sums["named"]).sum(1) / total**2
    return 1 - _divide(sums["distance"][:, 0] / total, expected)


def _divide(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """above / below; NaN where `below` is 0."""
    return np.divide(above, below, out=np.full(above.shape, np.nan), where=below > 0)


def _mean_of_defined(values: np.ndarray) -> np.ndarray:
    """Mean over the columns that are not NaN; NaN if all are. (n, classes) -> (n,)."""
    defined = ~np.isnan(values)
    return _divide(np.where(defined, values, 0).sum(1), defined.sum(1).astype(float))


# AUC: a sum over pairs of images


def auc(data: Scored, weights: np.ndarray) -> np.ndarray:
    """AUC as medmnist computes it: mean of one class against the rest, or over labels; binary: of
    the last column. The mean leaves out classes without positive or negative weight; NaN if all
    are left out."""
    by_image = np.ascontiguousarray(weights.T, dtype=np.float64)  # (n, resamples), as rows are read
    each = [binary_auc(score, positive, by_image) for score, positive in one_against_rest(data)]
    return _mean_of_defined(np.stack(each, axis=1))


def one_against_rest(data: Scored) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The (score, is positive) pairs, each (n,), whose AUC medmnist averages."""
    if data.spec.task == "binary-class":
        yield data.probability[:, -1], data.labels == 1
        return
    for k in range(len(data.spec.classes)):
        positive = data.labels[:, k] == 1 if data.spec.multi_label else data.labels == k
        yield data.probability[:, k], positive


def binary_auc(score: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted Mann-Whitney statistic; ties count one half. weights (n, resamples)."""
    negatives = np.flatnonzero(~positive)
    negatives = negatives[np.argsort(score[negatives], kind="stable")]
    positives = np.flatnonzero(positive)
    below = np.zeros((len(negatives) + 1, weights.shape[1]))
    np.cumsum(weights[negatives], axis=0, out=below[1:])
    wins = weights[positives]
    first = np.searchsorted(score[negatives], score[positives], "left")
    last = np.searchsorted(score[negatives], score[positives], "right")
    won = np.einsum("ir,ir->r", wins, below[first])
    if (first != last).any():
        won = (won + np.einsum("ir,ir->r", wins, below[last])) / 2
    return _divide(won, wins.sum(0) * below[-1])
