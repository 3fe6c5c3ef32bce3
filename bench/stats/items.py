"""A suite's own metrics, computed from one value per image (or question), with their uncertainty.

A suite that measures more than answers puts such values into its outcome, and
`Suite.measured(values, weights)` computes metrics from them. As in `metrics.py`, one function
serves the point value, the bootstrap and the paired permutation test. `Metric.ranks` names the
values that a metric only compares, as AUC does.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from bench.stats.resampling import chunked, ranks

DIGITS = 6  # records round values to these digits, and all metrics use the rounded values
Values = Mapping[str, np.ndarray]  # name -> float (n,)
Measure = Callable[[Values, np.ndarray], dict[str, np.ndarray]]  # weights (k, n) -> (k,) each
Ranked = Mapping[str, tuple[str, ...]]  # metric -> values that it only compares, ranked together


@dataclass(frozen=True)
class Items:
    """values: name -> float (n,); groups: str (n,), resampled together, or None."""

    values: dict[str, np.ndarray]
    groups: np.ndarray | None = None

    def __len__(self) -> int:
        return len(next(iter(self.values.values())))

    def card(self) -> dict[str, Any]:
        """The form that records keep."""
        values = {n: np.round(a.astype(float), DIGITS).tolist() for n, a in self.values.items()}
        return {"values": values, "groups": None if self.groups is None else self.groups.tolist()}

    @classmethod
    def of(cls, card: Mapping[str, Any]) -> "Items":
        values = {name: np.array(array, dtype=float) for name, array in card["values"].items()}
        return cls(values, None if card["groups"] is None else np.array(card["groups"]))


def points(items: Items, measure: Measure) -> dict[str, np.ndarray]:
    """Every metric of all items, (1,) each."""
    return measure(items.values, np.ones((1, len(items))))


def resampled(
    seeds: Sequence[Items], measure: Measure, weights: np.ndarray
) -> dict[str, np.ndarray]:
    """Every metric under every resample, averaged over seeds: (2000,) each."""
    return chunked([partial(measure, items.values) for items in seeds], weights)


def permuted_differences(
    ours: Sequence[Items],
    reference: Sequence[Items],
    measure: Measure,
    swap: np.ndarray,
    ranked: Ranked | None = None,
) -> dict[str, np.ndarray]:
    """Metric of ours minus reference after swapping the two methods' items, (2000,) each.

    For the metrics in `ranked`, ranks are swapped, as in `resampling.permuted_differences`.
    """

    def permuted(names: tuple[str, ...]) -> dict[str, np.ndarray]:
        pairs = [_pair(a.values, b.values, names) for a, b in zip(ours, reference, strict=True)]
        return chunked([partial(_difference, pair, measure) for pair in pairs], swap)

    return permuted(()) | {
        metric: permuted(names)[metric] for metric, names in (ranked or {}).items()
    }


def _pair(ours: Values, reference: Values, names: tuple[str, ...]) -> Values:
    """Ours, then the reference's values, (2 n,) each; the named ones as ranks."""
    sides = [_ranked(values, names) for values in (ours, reference)]
    return {name: np.concatenate([side[name] for side in sides]) for name in ours}


def _ranked(values: Values, names: tuple[str, ...]) -> Values:
    """The values, the named ones replaced by their ranks among all of these."""
    if not names:
        return values
    among = ranks(np.concatenate([values[name] for name in names]))
    return {**values, **dict(zip(names, np.split(among, len(names)), strict=True))}


def _difference(pair: Values, measure: Measure, swap: np.ndarray) -> dict[str, np.ndarray]:
    left = measure(pair, np.hstack([1 - swap, swap]))
    right = measure(pair, np.hstack([swap, 1 - swap]))
    return {name: left[name] - right[name] for name in left}
