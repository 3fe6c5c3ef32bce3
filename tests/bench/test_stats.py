"""Coverage of intervals, level of tests, and fast formulas against slow ones."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from scipy.stats import rankdata

from bench.stats.metrics import measure
from bench.stats.resampling import (
    RESAMPLES,
    bootstrap_weights,
    centred_interval,
    holm,
    interval,
    p_value,
    permuted_differences,
    resampled,
    swaps,
)
from vitask.data.spec import TASKS
from vitask.decision import Scored


def swapped(ours, reference, swap):
    """The slow way: swap the answers of the chosen images."""

    def chosen(a, b):
        if a is None or b is None:
            return None
        return np.where(swap.reshape(-1, *[1] * (a.ndim - 1)), b, a)

    return Scored(
        ours.spec,
        ours.labels,
        chosen(ours.probability, reference.probability),
        chosen(ours.predicted, reference.predicted),
        chosen(ours.generated, reference.generated),
    )


def ranked(data):
    """Every class's probabilities as ranks."""
    return replace(data, probability=rankdata(data.probability, axis=0))


def tempered(data):
    """Changes the confidence in every class, but not the order of images."""
    powers = 2 + np.arange(data.probability.shape[1])
    return replace(data, probability=data.probability**powers)


@pytest.mark.parametrize("task", TASKS)
def test_permutation_equals_swapping_the_answers(make, task):
    found = make(task, count=40, methods=4)
    ours, reference = found[:2], found[2:]  # two seeds each
    swap = swaps("toy", 40)[:7]
    fast = permuted_differences(ours, reference, swap)
    for number, chosen in enumerate(swap):
        differences = []
        for a, b in zip(ours, reference, strict=True):
            mine, theirs = measure(swapped(a, b, chosen)), measure(swapped(b, a, chosen))
            a, b = ranked(a), ranked(b)  # AUC swaps ranks
            mine |= {"auc": measure(swapped(a, b, chosen))["auc"]}
            theirs |= {"auc": measure(swapped(b, a, chosen))["auc"]}
            differences.append({m: (mine[m] - theirs[m])[0] for m in mine})
        assert list(fast) == list(differences[0])
        for metric, values in fast.items():
            expected = np.mean([d[metric] for d in differences])
            np.testing.assert_allclose(values[number], expected, atol=1e-12, err_msg=metric)


@pytest.mark.parametrize("task", TASKS)
def test_permuted_auc_ignores_confidence(make, task):
    ours, reference = make(task, count=60, methods=2)
    swap = swaps("toy", 60)
    expected = permuted_differences([ours], [reference], swap)["auc"]
    for one, other in ((tempered(ours), reference), (ours, tempered(reference))):
        np.testing.assert_array_equal(permuted_differences([one], [other], swap)["auc"], expected)
    alike = permuted_differences([ours], [tempered(ours)], swap)["auc"]
    np.testing.assert_allclose(alike, 0, atol=1e-12)


def test_permutation_when_only_one_method_generates_answers(make):
    ours, reference = make("multi-class", methods=2)
    mute = Scored(
        reference.spec, reference.labels, reference.probability, reference.predicted, None
    )
    assert "gen_accuracy" not in permuted_differences([ours], [mute], swaps("toy", 80))


def test_exact_p_value_of_a_small_case(make):
    (right,) = make("binary-class", count=6)
    right = Scored(right.spec, right.labels, np.eye(2)[right.labels], right.labels, None)
    wrong = Scored(right.spec, right.labels, np.eye(2)[1 - right.labels], 1 - right.labels, None)
    every = np.array(list(product([False, True], repeat=6)))
    permuted = permuted_differences([right], [wrong], every)["accuracy"]
    assert p_value(1.0, permuted) == pytest.approx((2 + 1) / (64 + 1))  # none or all swapped
    assert p_value(0.0, permuted) == 1.0


def test_p_values_are_uniform_under_the_null(make):
    p = {"macro_f1": [], "auc": []}
    for seed in range(150):
        ours, reference = make("multi-class", count=60, methods=2, seed=seed)
        ours = tempered(ours)
        permuted = permuted_differences([ours], [reference], swaps(f"null{seed}", 60)[:400])
        mine, theirs = measure(ours), measure(reference)
        for metric, found in p.items():
            found.append(p_value(mine[metric][0] - theirs[metric][0], permuted[metric]))
    for metric, found in p.items():
        assert np.mean(np.array(found) <= 0.05) < 0.12, metric
        assert 0.4 < np.mean(found) < 0.6, metric


def test_interval_covers_the_truth(make):
    truth = measure(make("multi-class", count=40_000, seed=99)[0])
    covered = {"accuracy": 0, "auc": 0, "macro_f1": 0}
    for seed in range(60):
        found = resampled(make("multi-class", count=120, seed=seed), bootstrap_weights("t", 120))
        for metric in covered:
            low, high = interval(found[metric])
            covered[metric] += low <= truth[metric][0] <= high
    assert all(count >= 50 for count in covered.values()), covered


def test_metrics_are_averaged_over_seeds_first(make):
    first, second = make("multi-class", count=30, methods=2)
    weights = bootstrap_weights("toy", 30)
    both = resampled([first, second], weights)
    one, two = resampled([first], weights), resampled([second], weights)
    for metric in both:
        np.testing.assert_allclose(both[metric], (one[metric] + two[metric]) / 2)


def test_draws_depend_on_the_name_alone_and_keep_groups_together():
    groups = np.array(["p1", "p2", "p1", "p3", "p2"])
    weights, swap = bootstrap_weights("a", 5), swaps("a", 5)
    assert weights.shape == swap.shape == (RESAMPLES, 5)
    assert (weights.sum(1) == 5).all()
    assert (weights == bootstrap_weights("a", 5)).all()
    assert (weights != bootstrap_weights("b", 5)).any()
    assert 0.45 < swap.mean() < 0.55
    for drawn in (bootstrap_weights("a", 5, groups), swaps("a", 5, groups)):
        assert (drawn[:, 0] == drawn[:, 2]).all()
        assert (drawn[:, 1] == drawn[:, 4]).all()


def test_holm():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx(
        {"a": 0.03, "c": 0.06, "b": 0.06}
    )
    rng = np.random.default_rng(0)
    for _ in range(50):
        p = {str(i): v for i, v in enumerate(rng.random(6) ** 3)}
        adjusted = holm(p)
        order = sorted(p, key=p.__getitem__)
        assert all(adjusted[n] >= p[n] for n in p)
        assert all(adjusted[n] <= min(1, 6 * p[n]) for n in p)
        assert [adjusted[n] for n in order] == sorted(adjusted.values())


def test_interval_without_values():
    assert np.isnan(interval(np.full(5, np.nan))).all()
    assert interval(np.array([np.nan, 1.0, 1.0])) == (1.0, 1.0)


def test_a_centred_interval_is_the_percentile_interval_moved_by_the_bias():
    values = np.random.default_rng(0).beta(4, 8, 500)
    low, high = interval(values)
    for estimate in (0.3, 0.4):
        moved = estimate - values.mean()
        expected = low + moved, high + moved
        assert centred_interval(values, estimate) == pytest.approx(expected)
        undefined = np.append(values, [np.nan] * 3)  # resamples without a value are left out
        assert centred_interval(undefined, estimate) == pytest.approx(expected)
    assert centred_interval(values, values.mean()) == pytest.approx((low, high))


def test_a_centred_interval_stays_within_the_bounds_of_its_metric():
    values = np.random.default_rng(0).uniform(0.2, 0.8, 500)
    low, high = centred_interval(values, 0.05)
    assert low == 0.0 < 0.05 < high
    low, high = centred_interval(values, 0.95)
    assert low < 0.95 < high == 1.0
    low, high = centred_interval(values, 0.05, (-1.0, 1.0))  # a difference may be negative
    assert low == pytest.approx(interval(values - values.mean())[0] + 0.05)
    assert low < 0


def test_centred_interval_contains_the_estimate(make):
    """An error below nearly all of its resamples, and a difference of two such errors."""
    rng = np.random.default_rng(0)
    (data,) = make("binary-class", count=150)
    weights = bootstrap_weights("toy", 150)
    methods = []
    for _ in range(2):  # three seeds each, perfectly calibrated
        sure = rng.uniform(0.5, 1, (3, 150))
        right = rng.random((3, 150)) < sure
        predicted = np.where(right, data.labels, 1 - data.labels)
        probability = np.where(np.eye(2)[predicted] == 1, sure[..., None], 1 - sure[..., None])
        methods.append(
            [
                replace(data, probability=p, predicted=guess)
                for p, guess in zip(probability, predicted, strict=True)
            ]
        )
    drawn = [resampled(seeds, weights)["ece"] for seeds in methods]
    seen = [np.mean([measure(one)["ece"][0] for one in seeds]) for seeds in methods]
    assert any(interval(values)[0] > one for values, one in zip(drawn, seen, strict=True))
    for values, one in zip(drawn, seen, strict=True):
        low, high = centred_interval(values, one)
        assert 0 <= low < one < high
        assert high - low <= np.diff(interval(values))[0] + 1e-12
    low, high = centred_interval(drawn[0] - drawn[1], seen[0] - seen[1], (-1.0, 1.0))
    assert low < seen[0] - seen[1] < high


def test_centred_interval_covers_the_mean_error_at_this_number_of_images():
    """A calibrated method's mean error over many test sets lies in nearly all their intervals, and
    in far fewer plain percentile intervals."""
    rng = np.random.default_rng(1)

    def error(confidence, right, weights):
        bins = np.eye(15)[np.minimum((confidence * 15).astype(int), 14)]
        gaps = (bins * (right - confidence)[..., None])[:, None]  # (seeds, 1, n, bins)
        return np.abs(weights @ gaps).sum(-1).mean((0, 1)) / confidence.shape[1]

    sets = []
    for _ in range(60):
        confidence = rng.uniform(0.5, 1, (3, 150))
        sets.append((confidence, (rng.random((3, 150)) < confidence).astype(float)))
    seen = [error(*one, np.ones((1, 150)))[0] for one in sets]
    weights = bootstrap_weights("toy", 150)[:300].astype(float)
    covered, by_percentiles = 0, 0
    for one, value in zip(sets, seen, strict=True):
        drawn = error(*one, weights)
        low, high = centred_interval(drawn, value)
        covered += low <= np.mean(seen) <= high
        low, high = interval(drawn)
        by_percentiles += low <= np.mean(seen) <= high
    assert covered >= 54 > by_percentiles, (covered, by_percentiles)
