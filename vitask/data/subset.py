"""Fewer images of a dataset, with the shares of its classes kept."""

from dataclasses import replace

import numpy as np

from vitask.data.spec import SPLITS, Dataset
from vitask.errors import InputError


def subset(
    dataset: Dataset,
    *,
    train: int | None = None,
    val: int | None = None,
    test: int | None = None,
    seed: int = 0,
) -> Dataset:
    """At most the given number of images of each split (None: all), stratified, in order.

    Every class keeps its share, and at least one image where the limit allows it. A multi-label
    image counts for the rarest of its labels. The same seed gives the same images. ValueError for
    a limit below 1.
    """
    splits = {}
    limits = {"train": train, "val": val, "test": test}
    for number, split in enumerate(SPLITS):
        images, limit = dataset.splits[split], limits[split]
        if limit is not None and limit < 1:
            raise InputError(
                f"{split}={limit} for {dataset.spec.name}; expected 1 or more, or None"
            )
        if limit is not None and limit < len(images):
            rng = np.random.default_rng([seed, number])
            images = images.take(_stratified(strata(images.labels), limit, rng))
        splits[split] = images
    return replace(dataset, splits=splits)


def strata(labels: np.ndarray) -> np.ndarray:
    """int64 (n,): the class, or for multi-label the rarest label present, -1 for none."""
    if labels.ndim == 1:
        return labels
    by_rarity = np.argsort(labels.sum(0), kind="stable")
    first = labels[:, by_rarity].argmax(1)
    return np.where(labels.any(1), by_rarity[first], -1)


def shares(counts: np.ndarray, total: int) -> np.ndarray:
    """Split `total` in proportion to `counts`, by largest remainder; int64, sums to `total`.

    No entry gets more than its count. Each non-empty entry gets at least 1 where total allows it,
    else the largest entries get 1 each.
    """
    counts = np.asarray(counts, dtype=np.int64)
    present = counts > 0
    if total <= present.sum():
        given = np.zeros_like(counts)
        given[np.argsort(-counts, kind="stable")[:total]] = 1
        return given
    exact = total * counts / counts.sum()
    given = np.minimum(np.maximum(np.floor(exact).astype(np.int64), present), counts)
    while given.sum() != total:
        if given.sum() < total:
            room = np.where(given < counts, exact - given, -np.inf)
            given[np.argmax(room)] += 1
        else:
            surplus = np.where(given > 1, given - exact, -np.inf)
            given[np.argmax(surplus)] -= 1
    return given


def _stratified(stratum: np.ndarray, limit: int, rng: np.random.Generator) -> np.ndarray:
    values, counts = np.unique(stratum, return_counts=True)
    chosen = [
        rng.choice(np.flatnonzero(stratum == value), size=share, replace=False)
        for value, share in zip(values, shares(counts, limit), strict=True)
    ]
    return np.sort(np.concatenate(chosen))


def fraction(datasets: dict[str, Dataset], share: float) -> dict[str, Dataset]:
    """A share of the training images, at least as many as there are classes; 1 for all."""
    if share == 1:
        return datasets
    found = {}
    for name, dataset in datasets.items():
        images = round(len(dataset.splits["train"]) * share * 1e6) // 10**6
        found[name] = subset(dataset, train=max(images, len(dataset.spec.classes)))
    return found
