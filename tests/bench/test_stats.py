"""Intervals that cover, tests that hold their level, and shortcuts that equal the long way."""

from itertools import product

import numpy as np
import pytest

from bench.metrics import Scored, measure
from bench.stats import (
    RESAMPLES,
    bootstrap_weights,
    holm,
    interval,
    p_value,
    permuted_differences,
    resampled,
    swaps,
)
from vitask.data.spec import TASKS


def swapped(ours, reference, swap):
    """The long way: exchange the answers of the chosen images."""

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


@pytest.mark.parametrize("task", TASKS)
def test_permutation_equals_exchanging_the_answers(make, task):
    found = make(task, count=40, methods=4)
    ours, reference = found[:2], found[2:]  # two seeds each
    swap = swaps("toy", 40)[:7]
    fast = permuted_differences(ours, reference, swap)
    for number, chosen in enumerate(swap):
        differences = []
        for a, b in zip(ours, reference, strict=True):
            mine, theirs = measure(swapped(a, b, chosen)), measure(swapped(b, a, chosen))
            differences.append({m: (mine[m] - theirs[m])[0] for m in mine})
        assert list(fast) == list(differences[0])
        for metric, values in fast.items():
            expected = np.mean([d[metric] for d in differences])
            np.testing.assert_allclose(values[number], expected, atol=1e-12, err_msg=metric)


def test_permutation_when_only_one_of_two_methods_writes(make):
    ours, reference = make("multi-class", methods=2)
    mute = Scored(
        reference.spec, reference.labels, reference.probability, reference.predicted, None
    )
    assert "gen_accuracy" not in permuted_differences([ours], [mute], swaps("toy", 80))


def test_exact_p_of_a_small_case(make):
    (right,) = make("binary-class", count=6)
    right = Scored(right.spec, right.labels, np.eye(2)[right.labels], right.labels, None)
    wrong = Scored(right.spec, right.labels, np.eye(2)[1 - right.labels], 1 - right.labels, None)
    every = np.array(list(product([False, True], repeat=6)))
    permuted = permuted_differences([right], [wrong], every)["accuracy"]
    assert p_value(1.0, permuted) == pytest.approx((2 + 1) / (64 + 1))  # none or all swapped
    assert p_value(0.0, permuted) == 1.0


def test_p_is_uniform_when_nothing_differs(make):
    p = []
    for seed in range(150):
        ours, reference = make("multi-class", count=60, methods=2, seed=seed)
        permuted = permuted_differences([ours], [reference], swaps(f"null{seed}", 60)[:400])
        seen = measure(ours)["macro_f1"][0] - measure(reference)["macro_f1"][0]
        p.append(p_value(seen, permuted["macro_f1"]))
    assert np.mean(np.array(p) <= 0.05) < 0.12
    assert 0.4 < np.mean(p) < 0.6


def test_interval_covers_the_truth(make):
    truth = measure(make("multi-class", count=40_000, seed=99)[0])
    covered = {"accuracy": 0, "auc": 0, "macro_f1": 0}
    for seed in range(60):
        found = resampled(make("multi-class", count=120, seed=seed), bootstrap_weights("t", 120))
        for metric in covered:
            low, high = interval(found[metric])
            covered[metric] += low <= truth[metric][0] <= high
    assert all(count >= 50 for count in covered.values()), covered


def test_seeds_are_averaged_before_anything_else(make):
    first, second = make("multi-class", count=30, methods=2)
    weights = bootstrap_weights("toy", 30)
    both = resampled([first, second], weights)
    one, two = resampled([first], weights), resampled([second], weights)
    for metric in both:
        np.testing.assert_allclose(both[metric], (one[metric] + two[metric]) / 2)


def test_draws_depend_on_the_name_alone_and_respect_groups():
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
