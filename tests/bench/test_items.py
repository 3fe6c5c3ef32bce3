"""A suite's own metrics have the same statistics as those of answers."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import items as own
from bench import stats
from bench.report.table import _average, _Cell, _resample_items, _resample_lost
from bench.stats.items import Items, means, points
from bench.stats.resampling import bootstrap_weights, swaps
from bench.suite import corruptions, external, ranking
from vitask.data import load
from vitask.decision import scored
from vitask.score import Prediction

SPEC = load("retinamnist", source="phantom").spec


def answers(seed: int, labels: np.ndarray):
    log_p = np.log(np.random.default_rng(seed).dirichlet(np.ones(5), len(labels)))
    return scored(SPEC, labels, Prediction("retinamnist", "candidates", log_p))


@pytest.mark.parametrize("grouped", [False, True])
def test_share_of_right_answers_has_the_interval_and_permutations_of_accuracy(grouped):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 60)
    groups = np.array([f"patient {i // 3}" for i in range(60)]) if grouped else None
    ours, theirs = ([answers(10 * method + s, labels) for s in range(2)] for method in (1, 2))
    right = [
        [Items({"accuracy": (a.predicted == labels).astype(float)}, groups) for a in method]
        for method in (ours, theirs)
    ]
    weights, swap = bootstrap_weights("x", 60, groups), swaps("x", 60, groups)
    expected = stats.resampled(ours, weights)["accuracy"]
    np.testing.assert_allclose(own.resampled(right[0], means, weights)["accuracy"], expected)
    expected = stats.permuted_differences(ours, theirs, swap)["accuracy"]
    found = own.permuted_differences(right[0], right[1], means, swap)["accuracy"]
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_an_image_is_drawn_with_all_that_was_made_of_it():
    ids = np.array([f"image {i}" for i in range(12)])  # "image 10" sorts before "image 2"
    for draw in (bootstrap_weights, swaps):
        for groups in (None, np.array(list("cabbacdacbad"))):
            of_made = np.tile(ids if groups is None else groups, 5)
            np.testing.assert_array_equal(draw("x", 60, of_made), np.tile(draw("x", 12, groups), 5))


def test_what_a_corruption_takes_is_measured_on_the_images_that_are_drawn():
    from sklearn.metrics import balanced_accuracy_score

    labels, ids = np.arange(40) % 5, np.array([f"image {i}" for i in range(40)])
    found, truth = {"x": {}, "x+blur": {}}, {}
    weights = bootstrap_weights("x", 40)
    for number, method in enumerate(("tsm", "vanilla")):
        clean, made = answers(number, labels), answers(10 + number, np.tile(labels, 5))
        found["x"][method] = _Cell([], {}, [clean], [], stats.resampled([clean], weights))
        drawn = stats.resampled([made], bootstrap_weights("x", 200, np.tile(ids, 5)))
        found["x+blur"][method] = _Cell([], {}, [made], [], drawn)
        truth[method] = clean, made
    _resample_lost(found, corruptions)

    def accuracy(one, rows):
        return balanced_accuracy_score(one.labels[rows], one.predicted[rows])

    clean, made = truth["tsm"]
    for k in range(20):
        rows = np.repeat(np.arange(40), weights[k])
        versions = np.concatenate([rows + 40 * severity for severity in range(5)])
        lost = accuracy(clean, rows) - accuracy(made, versions)
        assert found["x+blur"]["tsm"].resampled["lost"][k] == pytest.approx(lost)
    assert "lost" not in found["x"]["tsm"].resampled


def test_referable_auc_is_the_auc_of_the_two_sides():
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(1)
    p, truth = rng.random(80).round(2), rng.integers(0, 2, 80).astype(float)
    found = points(Items({"probability": p, "referable": truth}), external.measured)
    assert found["referable_auc"][0] == pytest.approx(roc_auc_score(truth, p))
    one_side = points(Items({"probability": p, "referable": np.ones(80)}), external.measured)
    assert np.isnan(one_side["referable_auc"][0])


@given(st.integers(0, 10_000))
def test_ranking_numbers_are_those_of_the_drawn_images(seed):
    """Weights are counts: the same as repeating images."""
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(seed)
    values = {"positive": rng.random(12).round(1), "negative": rng.random(12).round(1)}
    drawn = rng.integers(0, 12, 12)
    weights = np.bincount(drawn, minlength=12)[None].astype(float)
    found = ranking.measured(values, weights)
    positive, negative = values["positive"][drawn], values["negative"][drawn]
    truth = np.repeat([1, 0], 12)
    auc = roc_auc_score(truth, np.concatenate([positive, negative]))
    assert found["ranking_auc"][0] == pytest.approx(auc)
    assert found["positive"][0] == pytest.approx(positive.mean())
    shares = [
        np.histogram(
            np.minimum((side * ranking.BINS).astype(int), ranking.BINS - 1),
            np.arange(ranking.BINS + 1),
        )[0]
        / 12
        for side in (positive, negative)
    ]
    assert found["overlap"][0] == pytest.approx(np.minimum(*shares).sum())


def sides(rng: np.random.Generator, count: int = 40) -> Items:
    return Items({"positive": rng.beta(3, 2, count), "negative": rng.beta(2, 2, count)})


RANKED = {"ranking_auc": ("positive", "negative")}


def test_a_metric_of_ranks_is_permuted_as_the_auc_of_answers_is(make):
    found = make("binary-class", count=60, methods=4)
    swap = swaps("x", 60)
    items = [
        Items({"probability": a.probability[:, 1], "referable": a.labels.astype(float)})
        for a in found
    ]
    expected = stats.permuted_differences(found[:2], found[2:], swap)["auc"]
    ranked = {"referable_auc": ("probability",)}
    permuted = own.permuted_differences(items[:2], items[2:], external.measured, swap, ranked)
    np.testing.assert_allclose(permuted["referable_auc"], expected, atol=1e-12)


def test_a_metric_of_ranks_is_permuted_whatever_the_scale_of_a_method():
    """Right and wrong images are ranked together, and what is no metric of ranks stays."""
    rng = np.random.default_rng(0)
    ours, theirs, swap = sides(rng), sides(rng), swaps("x", 40)
    faint = Items({name: array**5 / 9 for name, array in ours.values.items()})
    measured = ranking.measured
    first = own.permuted_differences([ours], [theirs], measured, swap, RANKED)
    second = own.permuted_differences([faint], [theirs], measured, swap, RANKED)
    np.testing.assert_array_equal(first["ranking_auc"], second["ranking_auc"])
    alike = own.permuted_differences([ours], [faint], measured, swap, RANKED)["ranking_auc"]
    np.testing.assert_allclose(alike, 0, atol=1e-12)
    raw = own.permuted_differences([ours], [theirs], measured, swap)
    for name in ("overlap", "positive", "negative"):
        np.testing.assert_array_equal(first[name], raw[name])
    assert list(first) == list(raw)
    seen = [points(one, measured)["ranking_auc"][0] for one in (ours, theirs)]
    none = own.permuted_differences([ours], [theirs], measured, np.zeros((1, 40), bool), RANKED)
    assert none["ranking_auc"][0] == pytest.approx(seen[0] - seen[1])


def test_a_suite_says_which_of_its_metrics_are_of_ranks():
    rng = np.random.default_rng(2)
    ours, theirs = sides(rng), sides(rng)
    faint = Items({name: array**5 for name, array in ours.values.items()})
    module = SimpleNamespace(**vars(ranking) | {"RANKED": RANKED})
    found = []
    for one in (ours, faint):
        cells = {"crt": _Cell([], {}, [], [one]), "vanilla": _Cell([], {}, [], [theirs])}
        _resample_items("x", cells, module)
        found.append(cells["crt"].permuted)
    np.testing.assert_array_equal(found[0]["ranking_auc"], found[1]["ranking_auc"])
    assert (found[0]["positive"] != found[1]["positive"]).any()


def test_average_counts_images_once_however_many_sets_show_them():
    """Three corruptions of one dataset weigh as much as the only one of another."""
    rng = np.random.default_rng(0)
    found = {}
    for name in ("a+blur", "a+noise", "a+fog", "b+blur"):
        cell = _Cell([], {"accuracy": rng.random(2).tolist()}, ["answered"])
        cell.resampled, cell.permuted = {"accuracy": rng.random(5)}, {"accuracy": rng.random(5)}
        found[name] = {"tsm": cell}
    done = _average(found, corruptions)["tsm"]

    def expected(of):
        a = [of(found[name]["tsm"]) for name in ("a+blur", "a+noise", "a+fog")]
        return (np.mean(a, axis=0) + of(found["b+blur"]["tsm"])) / 2

    for of in (lambda c: c.points, lambda c: c.resampled, lambda c: c.permuted):
        one = expected(lambda cell, of=of: np.array(of(cell)["accuracy"]))
        np.testing.assert_allclose(of(done)["accuracy"], one)
    plain = _average(found, external)["tsm"]  # there every set shows its own images
    every = [cells["tsm"].points["accuracy"] for cells in found.values()]
    np.testing.assert_array_equal(plain.points["accuracy"], np.mean(every, axis=0))


def test_a_record_keeps_what_items_are_measured_of():
    items = Items({"a": np.array([0.123456789, 1.0])}, np.array(["p", "q"]))
    again = Items.of(items.card())
    assert again.values["a"].tolist() == [0.123457, 1.0]
    assert again.groups.tolist() == ["p", "q"]
