"""Metrics against scikit-learn, against medmnist itself, and under weights."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sk

from bench.stats.metrics import ECE_BINS, confusion, measure
from vitask.data.spec import TASKS, DatasetSpec
from vitask.decision import INVALID, Scored, rounded, scored
from vitask.prompts import candidates
from vitask.score import Prediction

SINGLE, MULTI = TASKS[:3], TASKS[3]


def value(data, metric):
    return float(measure(data)[metric][0])


def take(data, at):
    generated = None if data.generated is None else data.generated[at]
    return Scored(data.spec, data.labels[at], data.probability[at], data.predicted[at], generated)


def test_answers_finer_than_the_labels_merge_into_one_class():
    names = ("none", "mild", "moderate", "severe", "proliferative")
    spec = DatasetSpec(
        name="merged", task="ordinal-regression", classes=(*names[:3], "severe or worse"),
        modality="eye", n_channels=3, n_samples={"train": 1, "val": 1, "test": 1},
        license="none", source="a test", head="eye",
        answers=tuple((name, min(grade, 3)) for grade, name in enumerate(names)),
    )  # fmt: skip
    grades = np.array([0, 1, 2, 3, 4, 4, 3])
    log_p = np.log(np.where(np.eye(5)[grades] == 1, 0.6, 0.1))
    written = [f"{names[grade]}." for grade in grades]
    data = scored(spec, np.minimum(grades, 3), Prediction("merged", "candidates", log_p, written))
    for metric in ("accuracy", "macro_f1", "qwk", "auc", "gen_accuracy", "gen_macro_f1"):
        assert value(data, metric) == pytest.approx(1)
    np.testing.assert_allclose(data.probability[-1], [0.1, 0.1, 0.1, 0.7])


@pytest.mark.parametrize("task", SINGLE)
def test_single_label_equals_sklearn(make, task):
    (data,) = make(task)
    y, guess, classes = data.labels, data.predicted, range(len(data.spec.classes))
    expected = {
        "accuracy": sk.accuracy_score(y, guess),
        "macro_f1": sk.f1_score(y, guess, labels=classes, average="macro", zero_division=0),
        "balanced_accuracy": sk.balanced_accuracy_score(y, guess),
        "gen_macro_f1": sk.f1_score(
            y, data.generated, labels=classes, average="macro", zero_division=0
        ),
        "gen_invalid": np.mean(data.generated == INVALID),
        "gen_accuracy": sk.accuracy_score(y, data.generated),
    }
    recalls = sk.recall_score(y, guess, labels=classes, average=None)
    expected |= {f"recall:{n}": r for n, r in zip(data.spec.classes, recalls, strict=True)}
    if task == "ordinal-regression":
        expected["qwk"] = sk.cohen_kappa_score(y, guess, weights="quadratic", labels=classes)
    for metric, number in expected.items():
        assert value(data, metric) == pytest.approx(number, abs=1e-12), metric
    assert ("qwk" in measure(data)) == (task == "ordinal-regression")
    assert confusion(data) == sk.confusion_matrix(y, guess, labels=classes).tolist()
    assert 0 < value(data, "gen_invalid") < 0.3


@pytest.mark.parametrize("kind", ["candidates", "labels"])
def test_multi_label_equals_sklearn(make, kind):
    (data,) = make(MULTI, kind=kind)
    y, guess = data.labels, data.predicted
    assert value(data, "accuracy") == pytest.approx((y == guess).all(1).mean())
    f1 = sk.f1_score(y, guess, average="macro", zero_division=0)
    assert value(data, "macro_f1") == pytest.approx(f1)
    balanced = np.mean(
        [sk.balanced_accuracy_score(a, b) for a, b in zip(y.T, guess.T, strict=True)]
    )
    assert value(data, "balanced_accuracy") == pytest.approx(balanced)
    assert np.array(confusion(data)).sum() == y.size


def test_multi_label_probability_sums_the_candidates_with_that_label():
    spec = DatasetSpec(
        name="toy", task=MULTI, classes=("a", "b"), modality="m", n_channels=1,
        n_samples={"train": 3, "val": 1, "test": 1}, license="", source="", head="toy",
    )  # fmt: skip
    labels = np.array([[1, 1], [1, 1], [0, 1]])
    known = candidates(spec, labels)  # a | b | none | a; b
    assert known.texts == ("a", "b", "no finding", "a; b")
    log_p = np.log([[0.2, 0.1, 0.3, 0.4]] * 3) + 5.0  # unnormalised
    texts = ["a; b.", "No  Finding", "b; c"]
    data = scored(spec, labels, Prediction("toy", "candidates", log_p, texts), known)
    np.testing.assert_allclose(data.probability, [[0.6, 0.5]] * 3)
    assert data.predicted.tolist() == [[1, 1]] * 3
    assert data.generated.tolist() == [[1, 1], [0, 0], [INVALID, INVALID]]
    assert value(data, "accuracy") == pytest.approx(2 / 3)
    assert value(data, "gen_accuracy") == pytest.approx(1 / 3)
    assert value(data, "gen_invalid") == pytest.approx(1 / 3)


@pytest.mark.parametrize("task", SINGLE)
def test_calibration_error_matches_its_definition(make, task):
    (data,) = make(task)
    confidence, right = data.probability.max(1), data.predicted == data.labels
    error = 0.0
    for low in np.arange(ECE_BINS) / ECE_BINS:
        there = (confidence >= low) & (confidence < low + 1 / ECE_BINS)
        if there.any():
            error += there.mean() * abs(right[there].mean() - confidence[there].mean())
    assert value(data, "ece") == pytest.approx(error)


@pytest.mark.parametrize("task", TASKS)
def test_weights_are_counts_of_images(make, task):
    (data,) = make(task, count=40)
    rng = np.random.default_rng(1)
    drawn = rng.integers(40, size=(6, 40))
    weights = np.stack([np.bincount(at, minlength=40) for at in drawn]).astype(float)
    weighted = measure(data, weights)
    for number, at in enumerate(drawn):
        plain = measure(take(data, at))
        assert list(plain) == list(weighted)
        for metric in plain:
            np.testing.assert_allclose(
                weighted[metric][number], plain[metric][0], rtol=0, atol=1e-12, err_msg=metric
            )


def test_means_leave_out_an_absent_class(make):
    (data,) = make("multi-class")
    kept = take(data, np.flatnonzero(data.labels != 3))
    per_class = [sk.roc_auc_score(kept.labels == k, kept.probability[:, k]) for k in range(3)]
    assert value(kept, "auc") == pytest.approx(np.mean(per_class))
    assert np.isnan(value(kept, "recall:class 3"))
    assert not np.isnan(value(kept, "balanced_accuracy"))
    with np.errstate(all="raise"):
        one = take(data, np.flatnonzero(data.labels == 0))
        assert np.isnan(value(one, "auc"))


def test_an_absent_class_never_predicted_counts_as_zero(make):
    (data,) = make("multi-class")
    exact = Scored(data.spec, data.labels % 2, data.probability, data.labels % 2, None)
    assert value(exact, "accuracy") == 1
    assert value(exact, "macro_f1") == pytest.approx(2 / 4)


@pytest.mark.parametrize(
    ("kind", "shape", "number", "match"),
    [
        ("labels", (80, 4), 0.0, "kind"),
        ("candidates", (80, 3), 0.0, r"\(80, 4\)"),
        ("candidates", (79, 4), 0.0, r"\(80, 4\)"),
        ("candidates", (80, 4), np.nan, "NaN"),
        ("candidates", (80, 4), -np.inf, "infinite"),
    ],
)
def test_a_mismatched_prediction_is_an_error(make, kind, shape, number, match):
    (data,) = make("multi-class")
    with pytest.raises(ValueError, match=match):
        scored(data.spec, data.labels, Prediction("toy", kind, np.full(shape, number)))


MEDMNIST = """
import json, sys
import numpy as np
from medmnist.evaluator import getACC, getAUC
arrays = np.load(sys.argv[1])
tasks = json.loads(sys.argv[2])
print(json.dumps([[float(f(arrays[f"y{i}"], arrays[f"p{i}"], t)) for f in (getAUC, getACC)]
                  for i, t in enumerate(tasks)]))
"""


def test_auc_and_accuracy_equal_medmnist(make, tmp_path):
    found = [make(task)[0] for task in TASKS] + [make(MULTI, kind="labels")[0]]
    arrays = {f"y{i}": data.labels.reshape(80, -1) for i, data in enumerate(found)}
    arrays |= {f"p{i}": data.probability for i, data in enumerate(found)}
    np.savez(tmp_path / "arrays.npz", **arrays)
    tasks = json.dumps([data.spec.task for data in found])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEDMNIST, str(tmp_path / "arrays.npz"), tasks],
        env=os.environ | {"HOME": str(tmp_path)},  # importing medmnist makes a folder there
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    for data, (auc, accuracy) in zip(found, json.loads(done.stdout), strict=True):
        assert value(data, "auc") == pytest.approx(auc, abs=1e-12)
        assert value(data, "medmnist_acc") == pytest.approx(accuracy, abs=1e-12)


@pytest.mark.parametrize("kind", ["candidates", "labels"])
@given(seed=st.integers(0, 2**32 - 1))
def test_rounding_for_samples_moves_little_and_no_decision(kind, seed):
    """Even where two candidates are nearly tied, or a label's probability is nearly one half."""
    rng = np.random.default_rng(seed)
    exact = rng.normal(-1, 1e-3, (20, 4)) if kind == "candidates" else np.log(0.5)
    exact = exact + rng.normal(0, 1e-3, (20, 4))
    kept = rounded(Prediction("toy", kind, exact)).log_probability
    assert np.abs(kept - exact).max() <= 2 * 2.0**-10
    np.testing.assert_array_equal(kept.astype(np.float32).astype(float), kept)
    np.testing.assert_array_equal(kept * 2**10, np.round(kept * 2**10))
    if kind == "candidates":
        np.testing.assert_array_equal(kept.argmax(1), exact.argmax(1))
    else:
        np.testing.assert_array_equal(kept > np.log(0.5), exact > np.log(0.5))
