"""Records -> the long CSV and the page: means over seeds, intervals, differences, significance."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bench.metrics import Scored, scored
from bench.record import Record, Samples, candidates_of, read_samples, write_text
from bench.stats import (
    bootstrap_weights,
    holm,
    interval,
    p_value,
    permuted_differences,
    resampled,
    swaps,
)
from bench.suites import Suite, suite
from vitask.data.spec import DatasetSpec

COLUMNS = (
    "dataset", "method", "metric", "mean", "sd", "ci_low", "ci_high", "seeds", "n_test",
    "primary", "size", "source", "md5_ok", "diff_to_vanilla", "diff_low", "diff_high", "p_holm",
    "small_test", "record",
)  # fmt: skip
AVERAGE = "average"
SMALL_TEST = 500  # images; below, a row is flagged
SECONDARY = ("gen_accuracy", "gen_macro_f1", "gen_invalid")
NOT_AVERAGED = ("qwk", "recall:")  # no meaning across datasets
ROOT = Path(__file__).resolve().parents[1]


def tabulate(
    folder: Path, records: Sequence[Record], specs: Mapping[str, DatasetSpec]
) -> pd.DataFrame:
    """The long table of a suite's records; their samples lie in the same folder."""
    module = suite(records[0].suite)
    names, methods = list(records[0].data), list(module.METHODS)
    cells: dict[tuple[str, str], list[Record]] = {}
    samples = {r.name: read_samples(folder / "samples" / f"{r.name}.parquet") for r in records}
    found: dict[str, dict[str, _Cell]] = {}
    for name in names:
        found[name] = {}
        for method in methods:
            mine = sorted((r for r in records if r.method == method), key=lambda r: r.seed)
            cells[name, method] = mine
            seeds = [_scored(r, specs[name], samples[r.name][name]) for r in mine]
            points = [r.metrics[name] for r in mine]
            found[name][method] = _Cell(points, seeds)
        _resample(name, found[name], samples[records[0].name][name].groups, module)
    found[AVERAGE] = _average(found, methods)
    return _frame(found, cells, records, module)


class _Cell:
    """One method on one dataset: point values by seed, and resampled ones."""

    def __init__(self, points: list[dict[str, float | None]], seeds: list[Scored]) -> None:
        self.points = {m: [_number(p[m]) for p in points] for m in points[0]}
        self.seeds = seeds
        self.resampled: dict[str, np.ndarray] = {}
        self.permuted: dict[str, np.ndarray] = {}

    def mean(self, metric: str) -> float:
        return float(np.mean(self.points[metric]))


def _scored(record: Record, spec: DatasetSpec, sample: Samples) -> Scored:
    answers = None
    if spec.multi_label:
        answers = candidates_of(record.candidates[spec.name], len(spec.classes))
    return scored(spec, sample.labels, sample.prediction, answers)


def _resample(name: str, cells: dict[str, _Cell], groups: np.ndarray | None, module: Suite) -> None:
    """Bootstrap every method with the same indices; permute against the reference."""
    count = len(next(iter(cells.values())).seeds[0].labels)
    weights, swap = bootstrap_weights(name, count, groups), swaps(name, count, groups)
    for cell in cells.values():
        cell.resampled = resampled(cell.seeds, weights)
    if module.REFERENCE is not None:
        reference = cells[module.REFERENCE]
        for method, cell in cells.items():
            if method != module.REFERENCE:
                cell.permuted = permuted_differences(cell.seeds, reference.seeds, swap)


def _average(found: dict[str, dict[str, _Cell]], methods: Sequence[str]) -> dict[str, _Cell]:
    """Mean over the datasets, each resampled and permuted within itself."""
    done = {}
    for method in methods:
        cells = [found[name][method] for name in found]
        shared = set.intersection(*(set(cell.points) for cell in cells))
        metrics = [m for m in cells[0].points if m in shared and not m.startswith(NOT_AVERAGED)]
        cell = _Cell([dict.fromkeys(metrics, 0.0)], [])
        for metric in metrics:
            cell.points[metric] = np.mean([c.points[metric] for c in cells], axis=0).tolist()
            cell.resampled[metric] = np.mean([c.resampled[metric] for c in cells], axis=0)
            if all(metric in c.permuted for c in cells):
                cell.permuted[metric] = np.mean([c.permuted[metric] for c in cells], axis=0)
        done[method] = cell
    return done


def _frame(
    found: dict[str, dict[str, _Cell]],
    made: dict[tuple[str, str], list[Record]],
    records: Sequence[Record],
    module: Suite,
) -> pd.DataFrame:
    rows = []
    datasets = [name for name in found if name != AVERAGE]
    data = records[0].data
    p_holm = _adjusted(found, datasets, module)
    for name, cells in found.items():
        parts = datasets if name == AVERAGE else [name]
        sizes = [data[part]["images"]["test"] for part in parts]
        for method, cell in cells.items():
            mine = made[parts[0], method]
            for metric, points in cell.points.items():
                low, high = interval(cell.resampled[metric])
                row: dict[str, Any] = {
                    "dataset": name,
                    "method": method,
                    "metric": metric,
                    "mean": np.mean(points),
                    "sd": np.std(points, ddof=1) if len(points) > 1 else np.nan,
                    "ci_low": low,
                    "ci_high": high,
                    "seeds": ";".join(str(record.seed) for record in mine),
                    "n_test": sum(sizes),
                    "primary": metric not in SECONDARY,
                    "size": data[parts[0]]["size"],
                    "source": ";".join(sorted({data[part]["source"] for part in parts})),
                    "md5_ok": all(data[part]["md5_ok"] for part in parts),
                    "small_test": min(sizes) < SMALL_TEST,
                    "record": ";".join(record.key for record in mine),
                }
                rows.append(row | _difference(cells, method, metric, module))
                if (name, method, metric) in p_holm:
                    rows[-1]["p_holm"] = p_holm[name, method, metric]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _difference(cells: dict[str, _Cell], method: str, metric: str, module: Suite) -> dict[str, Any]:
    """Paired difference to the reference, on the same resamples."""
    if module.REFERENCE is None or method == module.REFERENCE:
        return {}
    reference, cell = cells[module.REFERENCE], cells[method]
    if metric not in reference.points:
        return {}
    low, high = interval(cell.resampled[metric] - reference.resampled[metric])
    return {
        "diff_to_vanilla": cell.mean(metric) - reference.mean(metric),
        "diff_low": low,
        "diff_high": high,
    }


def _adjusted(
    found: dict[str, dict[str, _Cell]], datasets: Sequence[str], module: Suite
) -> dict[tuple[str, str, str], float]:
    """p by permutation, Holm over the datasets for each method and metric; the average's is one
    test of its own."""
    adjusted: dict[tuple[str, str, str], float] = {}
    if module.REFERENCE is None:
        return adjusted
    for method in found[AVERAGE]:
        for metric in dict.fromkeys(m for cells in found.values() for m in cells[method].points):
            p = {}
            for name, cells in found.items():
                permuted = cells[method].permuted.get(metric)
                if permuted is None or metric not in cells[module.REFERENCE].points:
                    continue
                seen = cells[method].mean(metric) - cells[module.REFERENCE].mean(metric)
                if not np.isnan(seen):
                    p[name] = p_value(seen, permuted)
            if AVERAGE in p:
                adjusted[AVERAGE, method, metric] = p[AVERAGE]
            family = holm({name: p[name] for name in datasets if name in p})
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
    from bench.page import page

    name = records[0].suite
    frame = tabulate(folder, records, specs)
    return {f"{name}.csv": csv_text(frame), f"{name}.md": page(frame, records, ROOT)}


def write(folder: Path, records: Sequence[Record], specs: Mapping[str, DatasetSpec]) -> list[Path]:
    """Render and write; returns the files."""
    texts = render(folder, records, specs)
    for file, text in texts.items():
        write_text(folder / file, text)
    return [folder / file for file in texts]


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
