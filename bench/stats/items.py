"""A suite's own metrics, made of one value per image (or question), with their uncertainty.

A suite that measures more than answers keeps such values in its outcome; `Suite.measured(values,
weights)` turns them into metrics. The same function serves the point value, the bootstrap and the
paired permutation test, as in `metrics.py`. `Metric.ranks` names the values that a metric only
compares, as an AUC does.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.stats.resampling import chunked, mean_over_seeds, ranks

DIGITS = 6  # of the values that a record keeps; everything is computed from these
Values = Mapping[str, np.ndarray]  # name -> float (n,)
Measure = Callable[[Values, np.ndarray], dict[str, np.ndarray]]  # weights (k, n) -> (k,) each
Ranked = Mapping[str, tuple[str, ...]]  # metric -> names whose values it only compares, together


@dataclass(frozen=True)
class Items:
    """values: name -> float (n,); groups: str (n,) or None, what is resampled together."""

    values: dict[str, np.ndarray]
    groups: np.ndarray | None = None

    def __len__(self) -> int:
        return len(next(iter(self.values.values())))

    def card(self) -> dict[str, Any]:
        """As a record keeps them."""
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
    return chunked(
        lambda part: mean_over_seeds([measure(s.values, part.astype(float)) for s in seeds]),
        weights,
    )


def permuted_differences(
    ours: Sequence[Items],
    reference: Sequence[Items],
    measure: Measure,
    swap: np.ndarray,
    ranked: Ranked | None = None,
) -> dict[str, np.ndarray]:
    """Metric of ours minus reference after swapping the two methods' items, (2000,) each.

    For the metrics of `ranked` the ranks are swapped, as `stats.permuted_differences` does.
    """
    ranked = ranked or {}

    def permuted(names: tuple[str, ...]) -> dict[str, np.ndarray]:
        pairs = [_pair(a.values, b.values, names) for a, b in zip(ours, reference, strict=True)]
        return chunked(
            lambda part: mean_over_seeds([_difference(pair, measure, part) for pair in pairs]), swap
        )

    return permuted(()) | {metric: permuted(names)[metric] for metric, names in ranked.items()}


def _pair(ours: Values, reference: Values, names: tuple[str, ...]) -> Values:
    """One method's values, then the other's, (2 n,) each; the named ones as ranks."""
    sides = [_ranked(values, names) for values in (ours, reference)]
    return {name: np.concatenate([side[name] for side in sides]) for name in ours}


def _ranked(values: Values, names: tuple[str, ...]) -> Values:
    """The named values as ranks among all of these."""
    if not names:
        return values
    among = ranks(np.concatenate([values[name] for name in names]))
    return {**values, **dict(zip(names, np.split(among, len(names)), strict=True))}


def _difference(pair: Values, measure: Measure, swap: np.ndarray) -> dict[str, np.ndarray]:
    moved = swap.astype(float)
    left, right = (
        measure(pair, np.hstack(used)) for used in ([1 - moved, moved], [moved, 1 - moved])
    )
    return {name: left[name] - right[name] for name in left}
