"""Records -> the long CSV: means over seeds, intervals, differences, tests."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from bench.report.answers import Answers
from bench.report.page import SMALL_TEST
from bench.runs.records import Record
from bench.stats import items as own
from bench.stats.items import Items
from bench.stats.resampling import (
    bootstrap_weights,
    centred_interval,
    holm,
    interval,
    p_value,
    permuted_differences,
    resampled,
    swaps,
)
from vitask.decision import Scored

COLUMNS = (
    "dataset", "method", "metric", "mean", "sd", "ci_low", "ci_high", "seeds", "n_test",
    "primary", "size", "source", "md5_ok", "reference", "difference", "difference_low",
    "difference_high", "p", "p_images", "small_test", "record",
)  # fmt: skip
AVERAGE = "average"


@dataclass
class _Cell:
    """One method on one dataset.

    points:    metric -> value of each seed
    seeds:     its answers by seed; empty where no images are answered
    items:     the values that its suite's own metrics are made of, by seed; empty without any
    resampled, permuted: metric -> (2000,) under the bootstrap; differences to the reference
    """

    records: list[Record]
    points: dict[str, list[float]]
    seeds: list[Scored] = field(default_factory=list)
    items: list[Items] = field(default_factory=list)
    resampled: dict[str, np.ndarray] = field(default_factory=dict)
    permuted: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(cls, records: list[Record], name: str, answers: Answers) -> "_Cell":
        values = [_values(record)[name] for record in records]
        points = {metric: [_number(v[metric]) for v in values] for metric in values[0]}
        return cls(
            records,
            points,
            [answers.scored(r, name) for r in records if name in answers.samples[r.name]],
            [Items.of(r.items[name]) for r in records if name in r.items],
        )

    def mean(self, metric: str) -> float:
        return float(np.mean(self.points[metric]))


Cells = dict[str, _Cell]  # method -> its cell


def tabulate(records: Sequence[Record], answers: Answers) -> pd.DataFrame:
    """The long table of a suite's records."""
    return _Table(records, answers).frame()


class _Table:
    """All cells of a suite: dataset -> method -> cell."""

    def __init__(self, records: Sequence[Record], answers: Answers) -> None:
        self.suite, self.answers, self.first = answers.suite, answers, records[0]
        answered = list(self.first.data)  # datasets whose test images are answered
        others = dict.fromkeys(n for r in records for n in _values(r) if n not in answered)
        self.cells: dict[str, Cells] = {}
        for name in (*answered, *others):
            cells = {}
            for method in self.suite.methods:
                mine = [r for r in records if r.method == method.name and name in _values(r)]
                if mine:
                    cells[method.name] = _Cell.of(sorted(mine, key=lambda r: r.seed), name, answers)
            self._resample(name, cells)
            self._resample_items(name, cells)
            self.cells[name] = cells
        self._resample_lost()
        if len(counted := self._counted()) > 1:
            self.cells[AVERAGE] = self._average({name: self.cells[name] for name in counted})

    def _reference(self, cells: Cells, method: str) -> _Cell | None:
        return cells.get(self.suite.method(method).against or "")

    def _resample(self, name: str, cells: Cells) -> None:
        """Bootstrap every method with the same indices; permute against its reference."""
        answered = {method: cell for method, cell in cells.items() if cell.seeds}
        if not answered:
            return
        weights, swap = self.answers.weights(name), self.answers.swaps(name)
        for method, cell in answered.items():
            cell.resampled = resampled(cell.seeds, weights)
            reference = self._reference(answered, method)
            if reference is not None:
                cell.permuted = permuted_differences(cell.seeds, reference.seeds, swap)

    def _resample_items(self, name: str, cells: Cells) -> None:
        """The same for the suite's own metrics."""
        measure = self.suite.measured
        ranked = {metric.name: metric.ranks for metric in self.suite.metrics if metric.ranks}
        measured = {method: cell for method, cell in cells.items() if cell.items}
        drawn = self.suite.images_of(name)
        for method, cell in measured.items():
            count, groups = len(cell.items[0]), cell.items[0].groups
            weights = bootstrap_weights(drawn, count, groups)
            cell.resampled |= own.resampled(cell.items, measure, weights)
            reference = self._reference(measured, method)
            if reference is not None:
                swap = swaps(drawn, count, groups)
                cell.permuted |= own.permuted_differences(
                    cell.items, reference.items, measure, swap, ranked
                )

    def _resample_lost(self) -> None:
        """Metrics that are another dataset's less this one's, both of the same drawn images."""
        for name, cells in self.cells.items():
            for metric, (whole, of) in self.suite.lost_against(name).items():
                for method, cell in cells.items():
                    other = self.cells[whole][method]
                    cell.resampled[metric] = other.resampled[of] - cell.resampled[of]
                    if of in cell.permuted:
                        cell.permuted[metric] = other.permuted[of] - cell.permuted[of]

    def _counted(self) -> list[str]:
        """The datasets of the average: those with images or items that the suite counts."""
        return [
            name
            for name, cells in self.cells.items()
            if name != AVERAGE
            and self.suite.averaged(name)
            and any(c.seeds or c.items for c in cells.values())
        ]

    def _average(self, found: Mapping[str, Cells]) -> Cells:
        """Mean over the datasets, each resampled and permuted within itself (those of the same
        images together), for methods that answer them all."""
        done = {}
        for method in (m.name for m in self.suite.methods):
            cells = {name: every[method] for name, every in found.items() if method in every}
            if len(cells) < len(found) or not all(c.seeds or c.items for c in cells.values()):
                continue
            first = next(iter(cells.values()))
            shared = set.intersection(*(set(c.points) for c in cells.values()))
            done[method] = cell = _Cell(first.records, {})
            for metric in first.points:
                if metric not in shared or not self.suite.metric(metric).averaged:
                    continue
                points = {name: np.array(c.points[metric]) for name, c in cells.items()}
                cell.points[metric] = self._mean_over_images(points).tolist()
                for kind in ("resampled", "permuted"):
                    values = {name: getattr(c, kind).get(metric) for name, c in cells.items()}
                    if all(value is not None for value in values.values()):
                        getattr(cell, kind)[metric] = self._mean_over_images(values)
        return done

    def _mean_over_images(self, values: Mapping[str, np.ndarray]) -> np.ndarray:
        """Mean over datasets: first over those of the same images, so that these count once."""
        by_images: dict[str, list[np.ndarray]] = {}
        for name, value in values.items():
            by_images.setdefault(self.suite.images_of(name), []).append(value)
        return np.mean([np.mean(same, axis=0) for same in by_images.values()], axis=0)

    # Rows

    def frame(self) -> pd.DataFrame:
        rows = []
        adjusted = self._p_values()
        for name, cells in self.cells.items():
            same = self._identity(name)
            for method, cell in cells.items():
                for metric, points in cell.points.items():
                    low, high = self._interval(metric, cell.resampled, cell.mean(metric))
                    of_cell: dict[str, Any] = {
                        "dataset": name,
                        "method": method,
                        "metric": metric,
                        "mean": np.mean(points),
                        "sd": np.std(points, ddof=1) if len(points) > 1 else np.nan,
                        "ci_low": low,
                        "ci_high": high,
                        "seeds": ";".join(str(record.seed) for record in cell.records),
                        "primary": not self.suite.metric(metric).secondary,
                        "record": ";".join(record.key for record in cell.records),
                    }
                    row = of_cell | same | self._difference(cells, method, metric)
                    if (p := adjusted.get((name, method, metric))) is not None:
                        row |= {"p": p, "p_images": p}  # one test so far: over images
                    rows.append(row)
        return pd.DataFrame(rows, columns=list(COLUMNS))

    def _identity(self, name: str) -> dict[str, Any]:
        """The columns that say which images a dataset's rows are about."""
        parts = self._counted() if name == AVERAGE else [name]
        first = self.first
        cards = [first.data[part] for part in parts if part in first.data]
        cards = cards or list((first.data or first.trained_on).values())
        of_images = {self.suite.images_of(part): part for part in parts}  # images count once
        sizes = [_size(self.cells[part], first.data.get(own)) for own, part in of_images.items()]
        return {
            "n_test": sum(sizes),
            "size": cards[0]["size"],
            "source": ";".join(sorted({card["source"] for card in cards})),
            "md5_ok": all(card["md5_ok"] for card in cards),
            "small_test": min(sizes) < SMALL_TEST,
        }

    def _interval(
        self, metric: str, resampled: Mapping[str, np.ndarray], estimate: float, low: float = 0.0
    ) -> tuple[float, float]:
        values = resampled.get(metric, np.array([]))
        if values.size and self.suite.metric(metric).biased:
            return centred_interval(values, estimate, (low, 1.0))
        return interval(values)

    def _difference(self, cells: Cells, method: str, metric: str) -> dict[str, Any]:
        """Paired difference to the reference, on the same resamples."""
        reference, cell = self._reference(cells, method), cells[method]
        if reference is None or metric not in reference.points:
            return {}
        low = high = np.nan
        difference = cell.mean(metric) - reference.mean(metric)
        if metric in cell.resampled and metric in reference.resampled:
            paired = {metric: cell.resampled[metric] - reference.resampled[metric]}
            low, high = self._interval(metric, paired, difference, low=-1.0)
        return {
            "reference": self.suite.method(method).against,
            "difference": difference,
            "difference_low": low,
            "difference_high": high,
        }

    def _p_values(self) -> dict[Any, float]:
        """(dataset, method, metric) -> p by permutation, Holm-adjusted over the datasets
        of each method and metric; the average is a separate test."""
        raw: dict[Any, float] = {}
        for name, cells in self.cells.items():
            for method, cell in cells.items():
                reference = self._reference(cells, method)
                for metric, permuted in cell.permuted.items():
                    if reference is None or metric not in {*cell.points} & {*reference.points}:
                        continue
                    observed = cell.mean(metric) - reference.mean(metric)
                    if not np.isnan(observed):
                        raw[name, method, metric] = p_value(observed, permuted)
        families: dict[Any, dict[Any, float]] = {}
        for place, p in raw.items():
            name, *of = place
            families.setdefault((name == AVERAGE, *of), {})[place] = p
        return {k: p for family in families.values() for k, p in holm(family).items()}


def _values(record: Record) -> dict[str, dict[str, float | None]]:
    """Dataset -> metric -> value, those that differ from run to run included."""
    varying = record.measured.get("values", {})
    names = dict.fromkeys([*record.metrics, *varying])
    return {name: record.metrics.get(name, {}) | varying.get(name, {}) for name in names}


def _size(cells: Cells, card: Mapping[str, Any] | None) -> int:
    """Test images of a dataset, or questions asked instead; 0 for neither."""
    if card is not None:
        return card["images"]["test"]
    return max((len(cell.items[0]) for cell in cells.values() if cell.items), default=0)


def csv_text(frame: pd.DataFrame) -> str:
    """Fixed digits, so that equal numbers are equal bytes."""
    text = io.StringIO()
    frame.to_csv(text, index=False, float_format="%.6f", lineterminator="\n")
    return text.getvalue()


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
