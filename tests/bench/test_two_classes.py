"""Sensitivity and specificity at a validation threshold, and metrics per patient."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import recall_score, roc_auc_score

from bench.stats.metrics import measure
from bench.stats.resampling import bootstrap_weights, permuted_differences, resampled, swaps
from tests.bench.cheap_runs import complete, problems, records_of
from vitask.calibration import calibrate, fit_threshold
from vitask.data.phantom import make as phantom
from vitask.prompts import candidates
from vitask.score import Prediction

IMAGES = 60


@pytest.fixture
def two(make):
    """Two methods with thresholds of their own, on images of 20 patients."""
    groups = np.array([f"patient {i}" for i in np.random.default_rng(3).integers(20, size=IMAGES)])
    thresholds = (0.3, 0.62)
    found = make("binary-class", count=IMAGES, methods=2)
    return [
        replace(one, threshold=t, groups=groups) for one, t in zip(found, thresholds, strict=True)
    ]


@given(st.lists(st.tuples(st.sampled_from([0.1, 0.2, 0.5, 0.7, 0.9]), st.booleans()), min_size=2))
def test_no_other_threshold_has_a_larger_youden_index(images):
    probability, labels = (np.array(column, dtype=float) for column in zip(*images, strict=True))
    found = fit_threshold(probability, labels.astype(int))
    if len(set(labels)) == 1:
        assert found is None
        return

    def index(threshold):
        above = probability >= threshold
        return above[labels == 1].mean() - above[labels == 0].mean()

    assert index(found) == pytest.approx(max(map(index, np.linspace(0, 1.01, 103))))


def test_threshold_and_temperature_come_from_the_val_split_alone():
    dataset = phantom("breastmnist", (20, 40, 10))
    known = candidates(dataset.spec, dataset.splits["train"].labels)
    log_p = np.random.default_rng(0).normal(size=(40, 2))
    found = calibrate(Prediction("breastmnist", "candidates", log_p), dataset, known)
    for split in ("train", "test"):
        dataset.splits[split].labels[:] = 1 - dataset.splits[split].labels
    assert calibrate(Prediction("breastmnist", "candidates", log_p), dataset, known) == found
    dataset.splits["val"].labels[:] = 1 - dataset.splits["val"].labels
    other = calibrate(Prediction("breastmnist", "candidates", log_p), dataset, known)
    assert other.threshold != found.threshold
    assert other.temperature != found.temperature


def test_they_match_scikit_learn(two):
    for data in two:
        named = (data.probability[:, 1] >= data.threshold).astype(int)
        found = measure(data)
        assert found["sensitivity"] == pytest.approx(recall_score(data.labels, named))
        assert found["specificity"] == pytest.approx(recall_score(data.labels, named, pos_label=0))
        patients = sorted(set(data.groups))
        p = np.array([data.probability[data.groups == one, 1].mean() for one in patients])
        sick = np.array([data.labels[data.groups == one].max() for one in patients])
        named = (p >= data.threshold).astype(int)
        assert found["patient_auc"] == pytest.approx(roc_auc_score(sick, p))
        assert found["patient_sensitivity"] == pytest.approx(recall_score(sick, named))
        assert found["patient_specificity"] == pytest.approx(recall_score(sick, named, pos_label=0))


def test_without_threshold_or_patients_the_other_metrics_stay(two):
    whole = measure(two[0])
    without = measure(replace(two[0], groups=None))
    assert set(whole) - set(without) == {
        f"patient_{n}" for n in ("auc", "sensitivity", "specificity")
    }
    none = measure(replace(two[0], threshold=None))
    assert set(without) - set(none) == {"sensitivity", "specificity"}
    assert all(whole[name] == without[name] for name in without)
    assert all(whole[name] == none[name] for name in none)


def test_resamples_draw_whole_patients(two):
    """A metric per patient under weights equals that of the patients written out."""
    data = two[0]
    weights = bootstrap_weights("toy", IMAGES, data.groups)[:50]
    found = resampled([data], weights)
    for number, drawn in enumerate(weights):
        rows = np.repeat(np.arange(IMAGES), drawn)
        copy = np.concatenate([np.arange(count) for count in drawn])
        again = replace(
            data, labels=data.labels[rows], probability=data.probability[rows],
            predicted=data.predicted[rows], generated=None,
            groups=np.array([f"{g}/{c}" for g, c in zip(data.groups[rows], copy, strict=True)]),
        )  # fmt: skip
        for metric, value in measure(again).items():
            np.testing.assert_allclose(found[metric][number], value[0], err_msg=metric, atol=1e-12)


def test_permutations_swap_whole_patients(two):
    ours, reference = two
    swap = swaps("toy", IMAGES, ours.groups)[:7]
    fast = permuted_differences([ours], [reference], swap)
    for number, chosen in enumerate(swap):
        for metric in ("sensitivity", "patient_sensitivity", "patient_specificity"):
            sides = []
            for a, b in ((ours, reference), (reference, ours)):
                # each answer is held against its own method's threshold
                shifted = [one.probability[:, 1] - one.threshold for one in (a, b)]
                if metric.startswith("patient"):
                    shifted = [
                        np.array([s[a.groups == g].mean() for g in a.groups]) for s in shifted
                    ]
                p = 0.5 + np.where(chosen, shifted[1], shifted[0]) / 2
                one = replace(a, probability=np.stack([1 - p, p], 1), threshold=0.5)
                sides.append(measure(one)[metric][0])
            assert fast[metric][number] == pytest.approx(sides[0] - sides[1], abs=1e-9)


def test_thresholds_stand_in_records_and_tables(plan, monkeypatch):
    from bench.suite import suite

    whole = suite("cheap").run

    def run(work, wanted):
        for outcome in whole(work, wanted):
            yield replace(outcome, thresholds={"breastmnist": 0.25 + work.seed / 2})

    monkeypatch.setattr(suite("cheap"), "run", run)
    complete(replace(plan, seeds=(0, 1)))
    assert [r.thresholds["breastmnist"] for r in records_of(plan)] == [0.25] * 3 + [0.75] * 3
    page = (plan.folder / "cheap.md").read_text("utf-8")
    assert "Sensitivity at the threshold chosen on validation data" in page
    assert "per patient" not in page
    assert problems(plan) == []
    path = plan.folder / "records" / f"{records_of(plan)[0].name}.json"
    path.write_text(path.read_text("utf-8").replace('"breastmnist": 0.25', '"breastmnist": 0.75'))
    with pytest.raises(ValueError, match="changed after it was written"):
        records_of(plan)
