"""Uncertainty and significance: bootstrap, paired permutation, Holm.

2,000 resamples of test images, drawn once per dataset and shared by all methods and seeds; images
of one group (patient, lesion) are drawn together. Metrics are averaged over seeds first.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import pandas as pd

from bench.stats.metrics import columns, finish, measure, of_ranks, one_against_rest
from vitask.decision import Scored

RESAMPLES = 2000
CHUNK = 250  # resamples computed at once; bounds the memory of (resamples, n) arrays
LEVEL = 0.95


def bootstrap_weights(name: str, count: int, groups: np.ndarray | None = None) -> np.ndarray:
    """How often each image is drawn, uint16 (2000, n). Depends on the dataset's name alone."""
    rng = np.random.default_rng(zlib.crc32(f"bootstrap/{name}".encode()))
    total, member = _members(count, groups)
    weights = np.empty((RESAMPLES, count), dtype=np.uint16)
    for resample in weights:
        resample[:] = np.bincount(rng.integers(total, size=total), minlength=total)[member]
    return weights


def swaps(name: str, count: int, groups: np.ndarray | None = None) -> np.ndarray:
    """Which images swap methods, bool (2000, n); images of one group swap together."""
    rng = np.random.default_rng(zlib.crc32(f"permutation/{name}".encode()))
    total, member = _members(count, groups)
    return rng.integers(2, size=(RESAMPLES, total), dtype=np.uint8).astype(bool)[:, member]


def resampled(seeds: Sequence[Scored], weights: np.ndarray) -> dict[str, np.ndarray]:
    """Every metric under every resample, averaged over seeds: (2000,) each."""
    return chunked([partial(measure, data) for data in seeds], weights)


def permuted_differences(
    ours: Sequence[Scored], reference: Sequence[Scored], swap: np.ndarray
) -> dict[str, np.ndarray]:
    """Metric of ours minus reference after swapping the two methods' answers, (2000,) each.

    An image swaps in all seeds at once. Exact and cheap: sums over images change by
    swap @ (reference's column - ours), and the difference of two AUCs is linear in the swaps.
    For AUC, ranks within method, seed and class are swapped instead of scores (Venkatraman and Begg
    1996, Biometrika 83:835). Two methods' scores share no scale, so a mixture of them would give
    the null distribution of confidence, which AUC ignores.
    """
    return chunked([_Pair(a, b) for a, b in zip(ours, reference, strict=True)], swap)


class _Pair:
    """Two methods' answers to the same images with one seed: swaps -> differences of metrics."""

    def __init__(self, ours: Scored, reference: Scored) -> None:
        mine, theirs = columns(ours), columns(reference)
        shared = [name for name in mine if name in theirs]  # only one may have generated answers
        widths = np.cumsum([mine[name].shape[1] for name in shared])
        self._spec, self._names, self._cuts = ours.spec, shared, widths[:-1]
        ours_at, theirs_at = (np.hstack([c[name] for name in shared]) for c in (mine, theirs))
        self._ours, self._theirs = ours_at.sum(0), theirs_at.sum(0)
        self._change = theirs_at - ours_at  # (n, columns)
        both = [name for name in of_ranks(ours) if name in of_ranks(reference)]
        self._auc = {name: _auc_difference(ours, reference, name) for name in both}

    def __call__(self, swap: np.ndarray) -> dict[str, np.ndarray]:
        change = swap @ self._change
        mine, theirs = self._metrics(self._ours + change), self._metrics(self._theirs - change)
        done = {name: mine[name] - theirs[name] for name in mine}
        return done | {name: value + swap @ by for name, (value, by) in self._auc.items()}

    def _metrics(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        named = dict(zip(self._names, np.split(sums, self._cuts, axis=1), strict=True))
        return finish(self._spec, named, dict.fromkeys(self._auc, np.zeros(len(sums))))


def _auc_difference(ours: Scored, reference: Scored, name: str) -> tuple[float, np.ndarray]:
    """AUC of ours minus reference, and its change when an image's answers are swapped, (n,).

    With both methods' answers side by side, an AUC is w_p M w_n / (p n): M says which positive
    answer beats which negative one, w which answers a method uses. The other method uses 1 - w, so
    their difference (w_p M 1 + 1 M w_n - 1 M 1) / (p n) is linear in w.
    """
    images = len(ours.labels)
    (ours, at), (reference, _) = of_ranks(ours)[name], of_ranks(reference)[name]
    count = len(ours.labels)
    values, changes = [], []
    for (mine, positive), (theirs, _) in zip(
        one_against_rest(ours), one_against_rest(reference), strict=True
    ):
        pairs = positive.sum() * (~positive).sum()
        if pairs == 0:
            continue
        score = np.concatenate([ranks(mine), ranks(theirs)])
        label = np.concatenate([positive, positive])
        # For a positive, how many negatives it beats; for a negative, how many positives beat it.
        beats = np.where(
            label, _below(score, score[~label]), label.sum() - _below(score, score[label])
        )
        values.append((beats[:count].sum() - beats[label].sum()) / pairs)
        changes.append((beats[count:] - beats[:count]) / pairs)
    if not values:
        return float("nan"), np.full(images, np.nan)
    of_images = np.zeros(images)
    of_images[at] = np.mean(changes, axis=0)
    return float(np.mean(values)), of_images


def ranks(scores: np.ndarray) -> np.ndarray:
    """Mid-ranks divided by their number, so in (0, 1] like probabilities."""
    return pd.Series(scores).rank(pct=True).to_numpy()


def _below(score: np.ndarray, others: np.ndarray) -> np.ndarray:
    """How many of the others lie below each score; ties count one half."""
    others = np.sort(others)
    return np.mean([np.searchsorted(others, score, side) for side in ("left", "right")], axis=0)


def p_value(observed: float, permuted: np.ndarray) -> float:
    """Two-sided: (b + 1) / (m + 1) with b permutations at least as far from 0."""
    far = np.abs(permuted) >= abs(observed) - 1e-12  # tolerates the order of summation
    return float((far.sum() + 1) / (len(permuted) + 1))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down adjustment over a family of tests, by name."""
    ordered = sorted(p_values, key=lambda name: p_values[name])
    scaled = [(len(ordered) - rank) * p_values[name] for rank, name in enumerate(ordered)]
    adjusted = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return dict(zip(ordered, adjusted.tolist(), strict=True))


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 % percentile interval, without the resamples that have no value (an absent class)."""
    values = values[~np.isnan(values)]
    if values.size == 0:
        return (float("nan"), float("nan"))
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def centred_interval(
    values: np.ndarray, estimate: float, bounds: tuple[float, float] = (0.0, 1.0)
) -> tuple[float, float]:
    """95 % interval of a biased metric or its difference: `interval` of resamples, shifted.

    A sum of distances (or of the overlap of two histograms) over bins is biased: noise in a bin
    adds distance, whatever its sign, so resamples, noisier than the images, lie to one side of
    the estimate. This subtracts their bias, mean(values) - estimate (Efron and Tibshirani 1993,
    ch. 10), and clips to `bounds`. The interval is then about the reported metric, at this number
    of images, and contains it. The basic interval and Efron's bias-corrected percentiles exclude
    the estimate where the percentile interval does. No such interval covers the error at infinitely
    many images: the ECE of a well-calibrated method is itself too large.
    """
    low, high = np.clip(interval(values - np.nanmean(values) + estimate), *bounds)
    return float(low), float(high)


def chunked(
    seeds: Sequence[Callable[[np.ndarray], dict[str, np.ndarray]]], rows: np.ndarray
) -> dict[str, np.ndarray]:
    """Metrics of all rows, averaged over seeds. seeds: each seed's function of some float rows."""
    parts = []
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK].astype(np.float64)
        found = [metrics(chunk) for metrics in seeds]
        parts.append({name: np.mean([one[name] for one in found], axis=0) for name in found[0]})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _members(count: int, groups: np.ndarray | None) -> tuple[int, np.ndarray]:
    """The number of groups and each image's group; without groups each image is one.

    Groups are numbered by first appearance. Images and their corrupted versions, grouped by image
    in the same order, are therefore drawn alike.
    """
    if groups is None:
        return count, np.arange(count)
    member, names = pd.factorize(groups)
    return len(names), member
