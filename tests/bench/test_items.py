"""Metrics of items get the same statistics as metrics of answers."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.report.table import Cells, _Cell, _Table
from bench.stats import items as item_stats
from bench.stats import resampling as stats
from bench.stats.items import Items, points
from bench.stats.resampling import bootstrap_weights, centred_interval, interval, swaps
from bench.suite import SUITES, Suite, suite
from bench.suites.ranking import BINS
from vitask.data import load
from vitask.decision import scored
from vitask.score import Prediction

SPEC = load("retinamnist", source="phantom").spec
CORRUPTIONS, EXTERNAL, RANKING = map(suite, ("corruptions", "external", "ranking"))


def table_of(suite: Suite, cells: dict[str, Cells] | None = None) -> _Table:
    """A table of these cells, without records."""
    table = _Table.__new__(_Table)
    table.suite, table.cells = suite, cells or {}
    return table


def only_ranks(suite: Suite) -> dict[str, tuple[str, ...]]:
    """Metric -> values that it only compares, for a suite's metrics."""
    return {metric.name: metric.ranks for metric in suite.metrics if metric.ranks}


def answers(seed: int, labels: np.ndarray):
    log_p = np.log(np.random.default_rng(seed).dirichlet(np.ones(5), len(labels)))
    return scored(SPEC, labels, Prediction("retinamnist", "candidates", log_p))


@pytest.mark.parametrize("grouped", [False, True])
def test_share_of_right_answers_has_the_statistics_of_accuracy(grouped):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 60)
    groups = np.array([f"patient {i // 3}" for i in range(60)]) if grouped else None
    ours, theirs = ([answers(10 * method + s, labels) for s in range(2)] for method in (1, 2))
    right = [
        [Items({"accuracy": (a.predicted == labels).astype(float)}, groups) for a in method]
        for method in (ours, theirs)
    ]
    means = Suite().measured
    weights, swap = bootstrap_weights("x", 60, groups), swaps("x", 60, groups)
    expected = stats.resampled(ours, weights)["accuracy"]
    np.testing.assert_allclose(item_stats.resampled(right[0], means, weights)["accuracy"], expected)
    expected = stats.permuted_differences(ours, theirs, swap)["accuracy"]
    found = item_stats.permuted_differences(right[0], right[1], means, swap)["accuracy"]
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_an_image_is_drawn_with_its_corrupted_versions():
    ids = np.array([f"image {i}" for i in range(12)])  # "image 10" sorts before "image 2"
    for draw in (bootstrap_weights, swaps):
        for groups in (None, np.array(list("cabbacdacbad"))):
            of_made = np.tile(ids if groups is None else groups, 5)
            np.testing.assert_array_equal(draw("x", 60, of_made), np.tile(draw("x", 12, groups), 5))


def test_lost_accuracy_compares_the_same_drawn_images():
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
    table_of(CORRUPTIONS, found)._resample_lost()

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
    found = points(Items({"probability": p, "referable": truth}), EXTERNAL.measured)
    assert found["referable_auc"][0] == pytest.approx(roc_auc_score(truth, p))
    one_side = points(Items({"probability": p, "referable": np.ones(80)}), EXTERNAL.measured)
    assert np.isnan(one_side["referable_auc"][0])


@given(st.integers(0, 10_000))
def test_ranking_metrics_equal_those_of_the_drawn_images(seed):
    """Weights are counts, so they equal repeated images."""
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(seed)
    values = {"positive": rng.random(12).round(1), "negative": rng.random(12).round(1)}
    drawn = rng.integers(0, 12, 12)
    weights = np.bincount(drawn, minlength=12)[None].astype(float)
    found = RANKING.measured(values, weights)
    positive, negative = values["positive"][drawn], values["negative"][drawn]
    truth = np.repeat([1, 0], 12)
    auc = roc_auc_score(truth, np.concatenate([positive, negative]))
    assert found["ranking_auc"][0] == pytest.approx(auc)
    assert found["positive"][0] == pytest.approx(positive.mean())
    shares = [
        np.histogram(
            np.minimum((side * BINS).astype(int), BINS - 1),
            np.arange(BINS + 1),
        )[0]
        / 12
        for side in (positive, negative)
    ]
    assert found["overlap"][0] == pytest.approx(np.minimum(*shares).sum())


def sides(rng: np.random.Generator, count: int = 40) -> Items:
    return Items({"positive": rng.beta(3, 2, count), "negative": rng.beta(2, 2, count)})


def test_a_rank_metric_is_permuted_like_the_auc_of_answers(make):
    found = make("binary-class", count=60, methods=4)
    swap = swaps("x", 60)
    items = [
        Items({"probability": a.probability[:, 1], "referable": a.labels.astype(float)})
        for a in found
    ]
    expected = stats.permuted_differences(found[:2], found[2:], swap)["auc"]
    ranked = only_ranks(EXTERNAL)
    assert ranked == {"referable_auc": ("probability",)}
    permuted = item_stats.permuted_differences(
        items[:2], items[2:], EXTERNAL.measured, swap, ranked
    )
    np.testing.assert_allclose(permuted["referable_auc"], expected, atol=1e-12)


def test_permuting_a_rank_metric_ignores_the_scale_of_a_method():
    """Right and wrong images are ranked together; other metrics keep their values."""
    rng = np.random.default_rng(0)
    ours, theirs, swap = sides(rng), sides(rng), swaps("x", 40)
    faint = Items({name: array**5 / 9 for name, array in ours.values.items()})
    measured, ranked = RANKING.measured, only_ranks(RANKING)
    assert ranked == {"ranking_auc": ("positive", "negative")}
    first = item_stats.permuted_differences([ours], [theirs], measured, swap, ranked)
    second = item_stats.permuted_differences([faint], [theirs], measured, swap, ranked)
    np.testing.assert_array_equal(first["ranking_auc"], second["ranking_auc"])
    alike = item_stats.permuted_differences([ours], [faint], measured, swap, ranked)["ranking_auc"]
    np.testing.assert_allclose(alike, 0, atol=1e-12)
    raw = item_stats.permuted_differences([ours], [theirs], measured, swap)
    for name in ("overlap", "positive", "negative"):
        np.testing.assert_array_equal(first[name], raw[name])
    assert list(first) == list(raw)
    seen = [points(one, measured)["ranking_auc"][0] for one in (ours, theirs)]
    none = item_stats.permuted_differences(
        [ours], [theirs], measured, np.zeros((1, 40), bool), ranked
    )
    assert none["ranking_auc"][0] == pytest.approx(seen[0] - seen[1])


def test_a_suite_names_its_rank_metrics():
    rng = np.random.default_rng(2)
    ours, theirs = sides(rng), sides(rng)
    faint = Items({name: array**5 for name, array in ours.values.items()})

    def permuted(of: Suite, one: Items) -> dict[str, np.ndarray]:
        cells = {"crt": _Cell([], {}, [], [one]), "vanilla": _Cell([], {}, [], [theirs])}
        table_of(of)._resample_items("x", cells)
        assert not cells["vanilla"].permuted  # the reference
        return cells["crt"].permuted

    found = [permuted(RANKING, one) for one in (ours, faint)]
    np.testing.assert_array_equal(found[0]["ranking_auc"], found[1]["ranking_auc"])
    assert (found[0]["positive"] != found[1]["positive"]).any()
    silent = type(RANKING)()
    silent.metrics = tuple(replace(metric, ranks=()) for metric in RANKING.metrics)
    found = [permuted(silent, one) for one in (ours, faint)]
    assert (found[0]["ranking_auc"] != found[1]["ranking_auc"]).any()


def test_only_biased_metrics_get_centred_intervals():
    every = [suite(name) for name in SUITES]
    biased = {metric.name for one in every for metric in one.metrics if metric.biased}
    assert biased == {"ece", "overlap"}
    values = np.random.default_rng(0).uniform(0.1, 0.3, 500)  # all above the estimate
    table = table_of(RANKING)
    for metric in ("overlap", "ece"):
        assert table._interval(metric, {metric: values}, 0.05) == centred_interval(values, 0.05)
        assert table._interval(metric, {}, 0.05) == pytest.approx((np.nan, np.nan), nan_ok=True)
    for metric in ("ranking_auc", "accuracy", "recall:class 1"):
        assert table._interval(metric, {metric: values}, 0.05) == interval(values)
    cells = {}
    for method, shown in (("crt", 0.02), ("vanilla", 0.06)):
        cells[method] = _Cell([], {"overlap": [shown]})
    cells["crt"].resampled = {"overlap": values}
    cells["vanilla"].resampled = {"overlap": values[::-1] + 0.2}
    row = table._difference(cells, "crt", "overlap")
    paired = values - (values[::-1] + 0.2)
    expected = centred_interval(paired, 0.02 - 0.06, (-1.0, 1.0))
    assert (row["difference_low"], row["difference_high"]) == pytest.approx(expected)
    assert row["difference_low"] < row["difference"] < row["difference_high"]
    assert row["reference"] == "vanilla"
    assert table._difference(cells, "vanilla", "overlap") == {}


def test_average_counts_images_once_however_many_sets_contain_them():
    """Three corruptions of one dataset weigh as much as the single one of another."""
    rng = np.random.default_rng(0)
    found = {}
    for name in ("a+blur", "a+noise", "a+fog", "b+blur"):
        cell = _Cell([], {"accuracy": rng.random(2).tolist()}, ["answered"])
        cell.resampled, cell.permuted = {"accuracy": rng.random(5)}, {"accuracy": rng.random(5)}
        found[name] = {"tsm": cell}
    done = table_of(CORRUPTIONS)._average(found)["tsm"]

    def expected(of):
        a = [of(found[name]["tsm"]) for name in ("a+blur", "a+noise", "a+fog")]
        return (np.mean(a, axis=0) + of(found["b+blur"]["tsm"])) / 2

    for of in (lambda c: c.points, lambda c: c.resampled, lambda c: c.permuted):
        one = expected(lambda cell, of=of: np.array(of(cell)["accuracy"]))
        np.testing.assert_allclose(of(done)["accuracy"], one)
    plain = table_of(EXTERNAL)._average(found)["tsm"]  # every set has different images
    every = [cells["tsm"].points["accuracy"] for cells in found.values()]
    np.testing.assert_array_equal(plain.points["accuracy"], np.mean(every, axis=0))


def test_items_survive_a_record():
    items = Items({"a": np.array([0.123456789, 1.0])}, np.array(["p", "q"]))
    again = Items.of(items.card())
    assert again.values["a"].tolist() == [0.123457, 1.0]
    assert again.groups.tolist() == ["p", "q"]
