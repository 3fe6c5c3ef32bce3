"""Corrupted images: the optional package, reproducibility, and corruptions that cannot be made."""

import random

import numpy as np
import pytest

from vitask.data import load
from vitask.data.corruption import (
    PICKLED,
    SEVERITIES,
    corrupted,
    listed,
    missing,
    relative_errors,
    split_listed,
)
from vitask.data.medmnist import NAMES, spec

needs_package = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture(scope="module")
def images():
    return {
        n: load(n, source="phantom").splits["test"].images[:3] for n in ("octmnist", "pathmnist")
    }


def test_a_missing_package_is_named_with_its_installation(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "medmnistc.corruptions.registry", None)
    missing.cache_clear()
    text = missing()
    missing.cache_clear()
    assert text.startswith("medmnistc cannot be imported")
    assert "--no-deps medmnistc" in text


@needs_package
@pytest.mark.parametrize("name", ["octmnist", "pathmnist"])
def test_corruptions_do_not_depend_on_earlier_random_draws(name, images):
    for one in ("jpeg_compression", "speckle_noise", "bubble"):
        if one not in listed(spec(name)):
            continue
        first = corrupted(images[name], spec(name), one)
        random.random(), np.random.default_rng(0).random()
        again = corrupted(images[name], spec(name), one)
        assert first.dtype == np.uint8
        assert first.shape == (SEVERITIES * 3, *images[name].shape[1:])
        np.testing.assert_array_equal(first, again)


@needs_package
def test_global_generators_are_restored(images):
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    expected = random.Random(3).random(), np.random.RandomState(3).rand()
    corrupted(images["octmnist"], spec("octmnist"), "speckle_noise")
    assert (random.random(), np.random.rand()) == expected  # noqa: NPY002


@needs_package
def test_every_listed_corruption_but_the_pickled_one_can_be_made():
    for name in NAMES:
        usable, lacking = split_listed(spec(name))
        assert set(usable) | set(lacking) == set(listed(spec(name)))
        assert set(lacking) <= set(PICKLED)
        assert len(usable) >= 5


@needs_package
def test_stronger_corruptions_change_more(images):
    clean = images["pathmnist"].astype(float)
    made = corrupted(images["pathmnist"], spec("pathmnist"), "brightness_down").astype(float)
    change = [np.abs(part - clean).mean() for part in np.split(made, SEVERITIES)]
    assert change == sorted(change)
    assert change[0] > 1


@needs_package
def test_relative_errors_equal_those_of_medmnistc(tmp_path):
    """Compares with the package's evaluator on random answers."""
    from medmnistc.eval import Evaluator

    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, (40, 1))
    theirs = Evaluator(
        "retinamnist", labels, ["pixelate"], str(tmp_path), "x", spec("retinamnist").task
    )
    theirs.evaluate_clean(rng.random((40, 5)))
    theirs.evaluate(rng.random((200, 5)), "pixelate")
    theirs.output_log = {}
    theirs.populate_summary()
    mean = float(np.mean(theirs.corruption_errors["pixelate"]))
    ours = relative_errors(spec("retinamnist"), theirs.clean_score, {"pixelate": mean})
    log = theirs.output_log
    assert ours["pixelate"] == pytest.approx(
        (log["be_scores"]["pixelate"], log["rbe_scores"]["pixelate"])
    )
