"""The stand-in has the form of the real sets, and is the same in every call."""

import numpy as np
import pytest

from vitask import data
from vitask.data import SPLITS, check, medmnist, phantom

SIZES = (120, 50, 60)


@pytest.fixture(scope="module")
def made():
    return {name: data.load(name, source="phantom", phantom_sizes=SIZES) for name in medmnist.NAMES}


@pytest.mark.parametrize("name", medmnist.NAMES)
def test_has_the_form_of_the_real_set(name, made):
    dataset, real = made[name], medmnist.spec(name)
    spec = dataset.spec
    for field in ("name", "task", "classes", "modality", "n_channels", "head", "n_samples"):
        assert getattr(spec, field) == getattr(real, field)
    assert (dataset.source, dataset.size, dataset.md5_ok) == ("phantom", 28, True)
    assert "phantom" in spec.source
    assert data.specs("phantom")[name] == spec
    for split, n in zip(SPLITS, SIZES, strict=True):
        found = dataset.splits[split]
        assert found.images.dtype == np.uint8
        assert found.labels.dtype == np.int64
        assert found.images.shape == (n, 28, 28, *((3,) if real.n_channels == 3 else ()))
        assert found.labels.shape == ((n, 14) if real.multi_label else (n,))
        assert found.ids[7] == f"{name}/{split}/000007"


@pytest.mark.parametrize("name", medmnist.NAMES)
def test_every_class_is_in_every_split_and_the_imbalance_is_kept(name, made):
    official = np.array(phantom.TRAIN_COUNTS[name])
    assert len(official) == len(made[name].spec.classes)
    for split in made[name].splits.values():
        labels = split.labels
        counts = labels.sum(0) if labels.ndim == 2 else np.bincount(labels)
        assert len(counts) == len(official)
        assert counts.min() >= 1
    train = made[name].splits["train"].labels
    counts = train.sum(0) if train.ndim == 2 else np.bincount(train)
    assert counts[official.argmax()] == counts.max()
    assert np.corrcoef(counts, official)[0, 1] > 0.95
    if train.ndim == 2:  # mostly without a finding
        assert 0.5 < np.mean(~train.any(1)) < 0.6


@pytest.mark.parametrize("name", medmnist.NAMES)
def test_no_picture_occurs_twice(name, made):
    report = check.duplicates(made[name])
    assert report.clean
    assert not report.within


@pytest.mark.parametrize("name", medmnist.NAMES)
def test_is_the_same_in_every_call(name, made):
    again = phantom.make(name, SIZES)
    assert again.md5 == made[name].md5
    other = phantom.make(name, (SIZES[0], 5, 5))  # a split depends on its size only
    np.testing.assert_array_equal(other.splits["train"].images, again.splits["train"].images)
    assert other.md5 != again.md5


def test_the_sets_differ(made):
    assert len({dataset.md5 for dataset in made.values()}) == len(made)


@pytest.mark.parametrize("name", medmnist.NAMES)
def test_takes_a_single_image(name):
    assert [len(s) for s in phantom.make(name, (1, 1, 1)).splits.values()] == [1, 1, 1]


def test_marks_differ_in_form_only():
    marks = phantom.marks()
    assert marks.shape == (phantom.MARKS, 5, 5)
    np.testing.assert_allclose(marks.mean((1, 2)), 0, atol=1e-6)
    np.testing.assert_allclose((marks**2).sum((1, 2)), 1, rtol=1e-6)
    np.testing.assert_array_equal(marks, marks[:, :, ::-1])  # a mirrored picture keeps its class
    np.testing.assert_array_equal(marks[1::2], marks[::2, ::-1])


def test_brightness_does_not_depend_on_the_class(made):
    for name, dataset in made.items():
        split = dataset.splits["train"]
        if dataset.spec.multi_label:
            continue
        mean = split.images.reshape(len(split), -1).mean(1)
        counts = np.bincount(split.labels)
        spread = [mean[split.labels == c].mean() for c in np.flatnonzero(counts >= 8)]
        # Means of 8 or more pictures from one distribution: within 5 of their standard errors.
        assert np.ptp(spread) < 5 * mean.std() / np.sqrt(8), name


def test_sizes_are_checked():
    with pytest.raises(ValueError, match=r"phantom sizes \(5, 0, 5\)"):
        data.load("breastmnist", source="phantom", phantom_sizes=(5, 0, 5))
    with pytest.raises(ValueError, match="phantom images have 28 pixels, not 224"):
        data.load("breastmnist", source="phantom", size=224)
    by_name = {"breastmnist": (4, 3, 2)}
    given = data.load("breastmnist", source="phantom", phantom_sizes=by_name)
    assert [len(s) for s in given.splits.values()] == [4, 3, 2]
