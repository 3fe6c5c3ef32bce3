"""Images, labels, classes, modality, parts and per-image ids: one form from every source.

medmnist   the 12 2D sets of MedMNIST, and own sets in its key layout with a JSON card
phantom    a procedural stand-in for the same 12, which proves plumbing and no science
"""

from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

import numpy as np

from vitask.data.spec import PARTS, TASKS, Dataset, DatasetSpec, Split, shares

__all__ = [
    "PARTS",
    "SOURCES",
    "TASKS",
    "Dataset",
    "DatasetSpec",
    "Split",
    "load",
    "names",
    "specs",
    "subset",
]

SOURCES = ("medmnist", "phantom")

Sizes = tuple[int, int, int]  # images in train, val, test


def names(source: str = "medmnist", roots: Sequence[Path] = ()) -> tuple[str, ...]:
    """The official 12 names, and for "medmnist" the cards that lie in the roots."""
    from vitask.data import card, medmnist

    _known_source(source)
    own = card.names(roots) if source == "medmnist" else ()
    return (*medmnist.NAMES, *(name for name in own if name not in medmnist.NAMES))


def specs(source: str = "medmnist", roots: Sequence[Path] = ()) -> dict[str, DatasetSpec]:
    """Descriptions by name, without reading an image."""
    return {name: spec(name, source=source, roots=roots) for name in names(source, roots)}


def spec(name: str, *, source: str = "medmnist", roots: Sequence[Path] = ()) -> DatasetSpec:
    """The description of one dataset; an unknown name is a ValueError naming the nearest."""
    from vitask.data import card, medmnist, phantom

    _known_source(source)
    if name in medmnist.NAMES:
        return phantom.spec(name) if source == "phantom" else medmnist.spec(name)
    if source == "medmnist" and card.begun(name, roots):
        return card.read_card(card.find(name, roots))
    raise _unknown(name, names(source, roots), roots)


def load(
    name: str,
    *,
    source: str,
    roots: Sequence[Path] = (),
    size: int = 28,
    allow_unverified: Collection[str] = (),
    phantom_sizes: Sizes | Mapping[str, Sizes] | None = None,
) -> Dataset:
    """One dataset with all its images, every check passed.

    source:           "medmnist" (official sets and own ones with a card) | "phantom"
    roots:            folders that hold the files, searched in order
    size:             side of the source images in pixels
    allow_unverified: names of official sets whose MD5 may differ (then `md5_ok` is False)
    phantom_sizes:    images in train, val and test, for all sets or by name

    ValueError names the file, what was expected, what was found and what to do.
    """
    from vitask.data import card, medmnist, phantom

    _known_source(source)
    for allowed in allow_unverified:
        if allowed not in medmnist.NAMES:
            raise _unknown(allowed, medmnist.NAMES, ())
    own = source == "medmnist" and card.begun(name, roots)
    if name not in (known := names(source, roots)) and not own:
        raise _unknown(name, known, roots)
    if source == "phantom":
        if size != phantom.SIZE:
            raise ValueError(
                f"phantom images have {phantom.SIZE} pixels, not {size}; use a recipe with "
                f"source_size={phantom.SIZE}, or real data"
            )
        if isinstance(phantom_sizes, Mapping):
            phantom_sizes = phantom_sizes.get(name)
        return phantom.make(name, phantom_sizes or phantom.SIZES)
    if name in medmnist.NAMES:
        return medmnist.load(name, roots, size=size, allow_unverified=allow_unverified)
    return card.load(name, roots, size=size)


def subset(
    dataset: Dataset,
    *,
    train: int | None = None,
    val: int | None = None,
    test: int | None = None,
    seed: int = 0,
) -> Dataset:
    """At most so many images of each part (None: all), stratified by class, order kept.

    Every class keeps its share, and at least one image as long as there is room. A multi-label
    image counts for the rarest of its labels. The same seed gives the same images.
    """
    parts = {}
    for number, part in enumerate(PARTS):
        split, limit = dataset.splits[part], {"train": train, "val": val, "test": test}[part]
        if limit is not None and limit < 1:
            raise ValueError(f"{part}={limit} for {dataset.spec.name}; expected 1 or more, or None")
        if limit is not None and limit < len(split):
            rng = np.random.default_rng([seed, number])
            split = split.take(_stratified(strata(split.labels), limit, rng))
        parts[part] = split
    return Dataset(dataset.spec, parts, dataset.size, dataset.source, dataset.md5, dataset.md5_ok)


def strata(labels: np.ndarray) -> np.ndarray:
    """int64 (n,): the class, or for multi-label the rarest label present, -1 for none."""
    if labels.ndim == 1:
        return labels
    by_rarity = np.argsort(labels.sum(0), kind="stable")
    first = labels[:, by_rarity].argmax(1)
    return np.where(labels.any(1), by_rarity[first], -1)


def _stratified(stratum: np.ndarray, limit: int, rng: np.random.Generator) -> np.ndarray:
    values, counts = np.unique(stratum, return_counts=True)
    chosen = [
        rng.choice(np.flatnonzero(stratum == value), size=share, replace=False)
        for value, share in zip(values, shares(counts, limit), strict=True)
    ]
    return np.sort(np.concatenate(chosen))


def _known_source(source: str) -> None:
    if source not in SOURCES:
        near = get_close_matches(source, SOURCES) or list(SOURCES)
        raise ValueError(f"no data source {source!r}; did you mean {' or '.join(near)}?")


def _unknown(name: str, known: Sequence[str], roots: Sequence[Path]) -> ValueError:
    near = get_close_matches(name, known) or list(known)
    seen = f" (cards looked for in {', '.join(map(str, roots))})" if roots else ""
    return ValueError(f"no dataset {name!r}{seen}; did you mean {' or '.join(near)}?")
