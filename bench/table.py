"""Records -> the long CSV and the page: means over seeds, intervals, differences, significance."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bench import items as own
from bench.items import Items, Measure, measure_of, ranked_of
from bench.metrics import Scored, scored
from bench.page import SMALL_TEST, page
from bench.record import Record, candidates_of, read_samples, write_text
from bench.stats import (
    bootstrap_weights,
    holm,
    interval_of,
    p_value,
    permuted_differences,
    resampled,
    swaps,
)
from bench.suites import Rows, images_of, reference_of, suite
from vitask.data.spec import DatasetSpec

COLUMNS = (
    "dataset", "method", "metric", "mean", "sd", "ci_low", "ci_high", "seeds", "n_test",
    "primary", "size", "source", "md5_ok", "diff_to_vanilla", "diff_low", "diff_high", "p_holm",
    "small_test", "record",
)  # fmt: skip
AVERAGE = "average"
SECONDARY = ("gen_accuracy", "gen_macro_f1", "gen_invalid")
NOT_AVERAGED = ("qwk", "recall:")  # no meaning across datasets
ROOT = Path(__file__).resolve().parents[1]


class Answers:
    """What the records' test images were answered, out of the samples beside the records.

    module: methods, references and how images are drawn, if not the suite's own
    """

    def __init__(
        self,
        folder: Path,
        records: Sequence[Record],
        specs: Mapping[str, DatasetSpec],
        module: Rows | None = None,
    ) -> None:
        self.module = module or suite(records[0].suite)
        paths = {r.name: folder / "samples" / f"{r.name}.parquet" for r in records}
        self.samples = {name: read_samples(path) for name, path in paths.items()}
        self.specs = specs

    def scored(self, record: Record, name: str) -> Scored:
        """The record's answers to a set, ready to be measured."""
        spec, sample = self.specs[name], self.samples[record.name][name]
        members = None
        if spec.multi_label:
            members = candidates_of(record.candidates[name], len(spec.classes))
        return scored(spec, sample.labels, sample.prediction, members)

    def weights(self, name: str) -> np.ndarray:
        """How often each image of a set is drawn, uint16 (2000, n)."""
        return bootstrap_weights(*self._drawn(name))

    def swaps(self, name: str) -> np.ndarray:
        """Which images of a set change method, bool (2000, n)."""
        return swaps(*self._drawn(name))

    def _drawn(self, name: str) -> tuple[str, int, np.ndarray | None]:
        sample = next(own[name] for own in self.samples.values() if name in own)
        return images_of(self.module, name), len(sample.labels), sample.groups


def tabulate(records: Sequence[Record], answers: Answers) -> pd.DataFrame:
    """The long table of a suite's records."""
    module = answers.module
    images = list(records[0].data)  # datasets whose test images are answered
    others = dict.fromkeys(n for r in records for n in _values(r) if n not in images)
    found: dict[str, dict[str, _Cell]] = {}
    for name in (*images, *others):
        cells = {}
        for method in module.METHODS:
            mine = [r for r in records if r.method == method and name in _values(r)]
            if mine:
                cells[method] = _Cell.of(sorted(mine, key=lambda r: r.seed), name, answers)
        _resample(name, cells, answers)
        _resample_items(name, cells, module)
        found[name] = cells
    _resample_lost(found, module)
    if len(counted := _counted(found, module)) > 1:
        found[AVERAGE] = _average({name: found[name] for name in counted}, module)
    return _frame(found, records[0], images, module)


def _values(record: Record) -> dict[str, dict[str, float | None]]:
    """Dataset -> metric -> value, those that differ from run to run included."""
    varying = record.measured.get("values", {})
    names = dict.fromkeys([*record.metrics, *varying])
    return {name: record.metrics.get(name, {}) | varying.get(name, {}) for name in names}


@dataclass
class _Cell:
    """One method on one dataset.

    points:    metric -> value of each seed
    seeds:     its answers by seed; empty for what no image's answer says
    items:     what its suite's own metrics are made of, by seed; empty without any
    resampled, permuted: metric -> (2000,) under the bootstrap; differences to the reference
    """

    records: list[Record]
    points: dict[str, list[float]]
    seeds: list[Scored]
    items: list[Items] = field(default_factory=list)
    resampled: dict[str, np.ndarray] = field(default_factory=dict)
    permuted: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(cls, records: list[Record], name: str, answers: Answers) -> "_Cell":
        values = [_values(record)[name] for record in records]
        points = {metric: [_number(v[metric]) for v in values] for metric in values[0]}
        answered = [r for r in records if name in answers.samples[r.name]]
        return cls(
            records,
            points,
            [answers.scored(r, name) for r in answered],
            [Items.of(r.items[name]) for r in records if name in r.items],
        )

    def mean(self, metric: str) -> float:
        return float(np.mean(self.points[metric]))

    def interval(self, metric: str) -> tuple[float, float]:
        values = self.resampled.get(metric, np.array([]))
        return interval_of(metric, values, self.mean(metric))


def _resample(name: str, cells: dict[str, _Cell], answers: Answers) -> None:
    """Bootstrap every method with the same indices; permute against its reference."""
    answered = {method: cell for method, cell in cells.items() if cell.seeds}
    if not answered:
        return
    weights, swap = answers.weights(name), answers.swaps(name)
    for method, cell in answered.items():
        cell.resampled = resampled(cell.seeds, weights)
        reference = reference_of(answers.module, method)
        if reference in answered:
            cell.permuted = permuted_differences(cell.seeds, answered[reference].seeds, swap)


def _resample_items(name: str, cells: dict[str, _Cell], module: Rows) -> None:
    """The same of what the suite measures itself."""
    measure: Measure = measure_of(module)
    measured = {method: cell for method, cell in cells.items() if cell.items}
    drawn = images_of(module, name)
    for method, cell in measured.items():
        count, groups = len(cell.items[0]), cell.items[0].groups
        weights = bootstrap_weights(drawn, count, groups)
        cell.resampled |= own.resampled(cell.items, measure, weights)
        other = measured.get(reference_of(module, method) or "")
        if other is not None:
            swap = swaps(drawn, count, groups)
            cell.permuted |= own.permuted_differences(
                cell.items, other.items, measure, swap, ranked_of(module)
            )


def _resample_lost(found: Mapping[str, Mapping[str, _Cell]], module: Rows) -> None:
    """What a set loses against another one made of the same images, drawn as one with it."""
    against: Callable[[str], Mapping[str, tuple[str, str]]]
    against = getattr(module, "lost_against", lambda name: {})
    for name, cells in found.items():
        for metric, (whole, of) in against(name).items():
            for method, cell in cells.items():
                other = found[whole][method]
                cell.resampled[metric] = other.resampled[of] - cell.resampled[of]
                if of in cell.permuted:
                    cell.permuted[metric] = other.permuted[of] - cell.permuted[of]


def _counted(found: Mapping[str, Mapping[str, _Cell]], module: Rows) -> list[str]:
    """The datasets of the average: those with images or items, unless the suite says otherwise."""
    counts: Callable[[str], bool] = getattr(module, "averaged", lambda name: True)
    return [
        name
        for name, cells in found.items()
        if name != AVERAGE and counts(name) and any(c.seeds or c.items for c in cells.values())
    ]


def _average(found: Mapping[str, dict[str, _Cell]], module: Rows) -> dict[str, _Cell]:
    """Mean over the datasets, each resampled and permuted within itself (those of the same images
    together), for methods that answer them all."""
    done = {}
    for method in module.METHODS:
        cells = {name: every[method] for name, every in found.items() if method in every}
        if len(cells) < len(found) or not all(c.seeds or c.items for c in cells.values()):
            continue
        first = next(iter(cells.values()))
        shared = set.intersection(*(set(c.points) for c in cells.values()))
        done[method] = cell = _Cell(first.records, {}, [])
        for metric in first.points:
            if metric not in shared or metric.startswith(NOT_AVERAGED):
                continue
            points = {name: np.array(c.points[metric]) for name, c in cells.items()}
            cell.points[metric] = _mean_over_images(points, module).tolist()
            for kind in ("resampled", "permuted"):
                values = {name: getattr(c, kind).get(metric) for name, c in cells.items()}
                if all(value is not None for value in values.values()):
                    getattr(cell, kind)[metric] = _mean_over_images(values, module)
    return done


def _mean_over_images(values: Mapping[str, np.ndarray], module: Rows) -> np.ndarray:
    """Mean over sets: first over those of the same images, so that these count once."""
    by_images: dict[str, list[np.ndarray]] = {}
    for name, value in values.items():
        by_images.setdefault(images_of(module, name), []).append(value)
    return np.mean([np.mean(same, axis=0) for same in by_images.values()], axis=0)


def _frame(
    found: dict[str, dict[str, _Cell]], first: Record, images: Sequence[str], module: Rows
) -> pd.DataFrame:
    rows = []
    p_holm = _adjusted(found, module)
    for name, cells in found.items():
        parts = _counted(found, module) if name == AVERAGE else [name]
        cards = [first.data[part] for part in parts if part in images]
        cards = cards or list((first.data or first.trained_on).values())
        shown = {images_of(module, part): part for part in parts}  # images count once
        sizes = [_size(found[part], first.data.get(own)) for own, part in shown.items()]
        for method, cell in cells.items():
            for metric, points in cell.points.items():
                low, high = cell.interval(metric)
                row: dict[str, Any] = {
                    "dataset": name,
                    "method": method,
                    "metric": metric,
                    "mean": np.mean(points),
                    "sd": np.std(points, ddof=1) if len(points) > 1 else np.nan,
                    "ci_low": low,
                    "ci_high": high,
                    "seeds": ";".join(str(record.seed) for record in cell.records),
                    "n_test": sum(sizes),
                    "primary": metric not in SECONDARY,
                    "size": cards[0]["size"],
                    "source": ";".join(sorted({card["source"] for card in cards})),
                    "md5_ok": all(card["md5_ok"] for card in cards),
                    "small_test": min(sizes) < SMALL_TEST,
                    "record": ";".join(record.key for record in cell.records),
                }
                rows.append(row | _difference(cells, method, metric, module))
                if (name, method, metric) in p_holm:
                    rows[-1]["p_holm"] = p_holm[name, method, metric]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _difference(cells: dict[str, _Cell], method: str, metric: str, module: Rows) -> dict[str, Any]:
    """Paired difference to the reference, on the same resamples."""
    reference, cell = cells.get(reference_of(module, method) or ""), cells[method]
    if reference is None or metric not in reference.points:
        return {}
    low = high = np.nan
    difference = cell.mean(metric) - reference.mean(metric)
    if metric in cell.resampled and metric in reference.resampled:
        values = cell.resampled[metric] - reference.resampled[metric]
        low, high = interval_of(metric, values, difference, bounds=(-1.0, 1.0))
    return {
        "diff_to_vanilla": difference,
        "diff_low": low,
        "diff_high": high,
    }


def _size(cells: Mapping[str, _Cell], card: Mapping[str, Any] | None) -> int:
    """Test images of a dataset, or what is asked instead; 0 where nothing is."""
    if card is not None:
        return card["images"]["test"]
    return max((len(cell.items[0]) for cell in cells.values() if cell.items), default=0)


def _adjusted(
    found: dict[str, dict[str, _Cell]], module: Rows
) -> dict[tuple[str, str, str], float]:
    """p by permutation, Holm over the datasets for each method and metric; the average's is one
    test of its own."""
    adjusted: dict[tuple[str, str, str], float] = {}
    for method in module.METHODS:
        mine = {name: cells for name, cells in found.items() if method in cells}
        reference = reference_of(module, method)
        for metric in dict.fromkeys(m for cells in mine.values() for m in cells[method].points):
            p = {}
            for name, cells in mine.items():
                permuted = cells[method].permuted.get(metric)
                if permuted is None or metric not in cells[str(reference)].points:
                    continue
                seen = cells[method].mean(metric) - cells[str(reference)].mean(metric)
                if not np.isnan(seen):
                    p[name] = p_value(seen, permuted)
            if AVERAGE in p:
                adjusted[AVERAGE, method, metric] = p[AVERAGE]
            family = holm({name: value for name, value in p.items() if name != AVERAGE})
            adjusted |= {(name, method, metric): value for name, value in family.items()}
    return adjusted


def csv_text(frame: pd.DataFrame) -> str:
    """Fixed digits, so that equal numbers are equal bytes."""
    text = io.StringIO()
    frame.to_csv(text, index=False, float_format="%.6f", lineterminator="\n")
    return text.getvalue()


def render(
    folder: Path, records: Sequence[Record], specs: Mapping[str, DatasetSpec]
) -> dict[str, str]:
    """File name -> text of everything that a suite's records are shown as."""
    name = records[0].suite
    answers = Answers(folder, records, specs)
    module = answers.module
    frame = tabulate(records, answers)
    figures: dict[str, str] = getattr(module, "figures", lambda frame: {})(frame)
    figures |= getattr(module, "plots", lambda records: {})(records)
    sections: list[tuple[str, str]]
    sections = getattr(module, "sections", lambda records, answers: [])(records, answers)
    return {
        f"{name}.csv": csv_text(frame),
        f"{name}.md": page(frame, records, ROOT, figures, sections),
        **figures,
    }


def write(folder: Path, records: Sequence[Record], specs: Mapping[str, DatasetSpec]) -> list[Path]:
    """Render and write; returns the files."""
    texts = render(folder, records, specs)
    for file, text in texts.items():
        write_text(folder / file, text)
    return [folder / file for file in texts]


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
