"""Subsets keep the shares of the classes; duplicates are found in any split."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitask import data
from vitask.data import SPLITS, Dataset, Split, check, medmnist
from vitask.data.subset import shares, strata


@given(st.lists(st.integers(0, 50), min_size=1, max_size=12), st.data())
def test_shares_sum_up_and_stay_within_the_counts(counts, draw):
    total = draw.draw(st.integers(0, sum(counts)))
    given_ = shares(np.array(counts), total)
    assert given_.sum() == total
    assert (given_ >= 0).all()
    assert (given_ <= counts).all()
    present = np.array(counts) > 0
    if total >= present.sum():
        assert (given_[present] >= 1).all()


@given(st.lists(st.integers(1000, 10**6), min_size=2, max_size=12), st.integers(200, 500))
def test_shares_are_in_proportion(counts, total):
    exact = total * np.array(counts) / sum(counts)
    # Off by one from rounding, and by the images that lift the smallest to 1.
    assert np.abs(shares(np.array(counts), total) - exact).max() <= len(counts)


@pytest.fixture(scope="module")
def sets():
    return {
        name: data.load(name, source="phantom", phantom_sizes=(90, 40, 50))
        for name in ("pathmnist", "chestmnist", "breastmnist")
    }


@pytest.mark.parametrize("name", ["pathmnist", "chestmnist", "breastmnist"])
@settings(max_examples=20, deadline=None)
@given(train=st.integers(1, 120), seed=st.integers(0, 9))
def test_a_subset_is_stratified_ordered_and_repeatable(sets, name, train, seed):
    whole = sets[name]
    fewer = data.subset(whole, train=train, seed=seed)
    split, source = fewer.splits["train"], whole.splits["train"]
    assert len(split) == min(train, len(source))
    assert fewer.splits["test"] is whole.splits["test"]  # None: all
    at = [int(i.rsplit("/", 1)[1]) for i in split.ids]
    assert at == sorted(set(at))
    np.testing.assert_array_equal(split.images, source.images[at])
    np.testing.assert_array_equal(split.labels, source.labels[at])
    again = data.subset(whole, train=train, seed=seed)
    assert again.splits["train"].ids.tolist() == split.ids.tolist()
    stratum = strata(source.labels)
    if train >= len(np.unique(stratum)):
        assert set(stratum[at]) == set(stratum)


def test_other_seeds_give_other_images_and_limits_are_checked(sets):
    first, second = (
        data.subset(sets["pathmnist"], train=30, seed=seed).splits["train"].ids for seed in (0, 1)
    )
    assert first.tolist() != second.tolist()
    with pytest.raises(ValueError, match="val=0 for pathmnist"):
        data.subset(sets["pathmnist"], val=0)


def test_strata_of_multi_label_rows():
    labels = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0], [1, 1, 1]])
    assert strata(labels).tolist() == [0, 1, -1, 2]


def planted() -> Dataset:
    """Six images in each split; copies in another split, in the same, and with another label."""
    rng = np.random.default_rng(0)
    splits = {}
    for split in SPLITS:
        images = rng.integers(0, 256, (6, 28, 28), dtype=np.uint8)
        names = np.array([f"own/{split}/{i:06d}" for i in range(6)])
        groups = np.array([f"{split}{i}" for i in range(6)], dtype="U8")
        splits[split] = Split(images, np.zeros(6, np.int64), names, groups)
    splits["test"].images[2] = splits["train"].images[1]
    splits["val"].images[4] = splits["val"].images[3]
    splits["train"].images[5] = splits["train"].images[0]
    splits["train"].labels[5] = 1
    splits["test"].groups[0] = "train3"
    spec = replace(medmnist.spec("breastmnist"), name="own")
    return Dataset(spec, splits, 28, "card", "", True)


def test_planted_duplicates_are_found():
    report = check.duplicates(planted())
    assert report.across == (("own/train/000001", "own/test/000002"),)
    conflict, copies = (
        ("own/train/000000", "own/train/000005"),
        ("own/val/000003", "own/val/000004"),
    )
    assert report.within == (conflict, copies)
    assert report.conflicting == (conflict,)
    assert report.groups == ("train3",)
    assert not report.clean
    text = "\n".join(report.lines())
    assert "own: 1 image(s) in two splits" in text
    assert "own/test/000002" in text
    assert "and 1 more" in "\n".join(report.lines(show=1))
