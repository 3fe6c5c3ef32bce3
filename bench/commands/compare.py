"""Two methods of a run, or one method in two runs, on the same test images."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from bench.report.answers import Answers
from bench.report.table import tabulate
from bench.runs.judge import plain
from bench.runs.records import Record, Samples, read_samples, samples_path
from bench.runs.sets import read_records
from bench.stats.metrics import measure
from bench.suite import Suite, suite
from vitask.errors import InputError

KEYS = ["dataset", "metric"]
RENAMED = {"difference_low": "low", "difference_high": "high"}
DEFAULT_METRICS = ("macro_f1", "accuracy", "auc", "balanced_accuracy", "ece", "qwk")


def compare_methods(folder: Path, name: str, method: str, reference: str) -> pd.DataFrame:
    """dataset, metric, both means, difference with its 95 % interval, Holm-adjusted p.

    Paired: both methods are resampled, and swapped, image by image. ValueError for a method that
    the suite does not have.
    """
    of = suite(name)
    for one in (method, reference):
        of.method(one)
    if method == reference:
        raise InputError(f"{method!r} was given twice; expected two different methods")
    mine = [r for r in read_records(folder, name) if r.method in (method, reference)]
    if missing := {method, reference} - {record.method for record in mine}:
        raise InputError(f"{folder} has no record of {sorted(missing)[0]!r}; run the suite again")
    pair = of.pair(method, reference)
    return _paired(mine, Answers.read(folder, mine, pair), method, reference)


def compare_runs(
    folders: tuple[Path, Path], name: str, method: str
) -> tuple[pd.DataFrame, list[str]]:
    """The same of one method in two runs, and notes on the seeds and images that they share.

    Images are paired by id. ValueError where the same image has two labels, or nothing is shared.
    """
    of, runs = suite(name), [str(folder) for folder in folders]
    of.method(method)
    if runs[0] == runs[1]:
        raise InputError(f"{runs[0]} was given twice; expected two different runs")
    sides = [
        {r.seed: r for r in read_records(folder, name) if r.method == method} for folder in folders
    ]
    seeds = sorted(set(sides[0]) & set(sides[1]))
    if not seeds:
        raise InputError(
            f"the runs share no seed of {method!r}: {runs[0]} has {sorted(sides[0])}, "
            f"{runs[1]} {sorted(sides[1])}; run one of them with a seed of the other"
        )
    read = [
        {seed: read_samples(samples_path(folder, side[seed].name)) for seed in seeds}
        for folder, side in zip(folders, sides, strict=True)
    ]
    shared = _shared_rows(read[0][seeds[0]], read[1][seeds[0]], runs)
    records, samples = [], {}
    for number, (run, side) in enumerate(zip(runs, sides, strict=True)):
        for seed in seeds:
            found, record = read[number][seed], replace(side[seed], method=run, items={})
            samples[record.name] = {n: found[n].take(rows[number]) for n, rows in shared.items()}
            records.append(record)
    pair = of.pair(*runs)
    answers = Answers(samples, records[0].specs, pair)
    for record in records:  # measured on the shared images
        record.metrics = {n: plain(measure(answers.scored(record, n))) for n in shared}
        cards = {n: (record.data[n], len(rows[0])) for n, rows in shared.items()}
        record.data = {n: c | {"images": {**c["images"], "test": k}} for n, (c, k) in cards.items()}
    notes = [f"{n}: {len(rows[0])} shared test images" for n, rows in shared.items()]
    return _paired(records, answers, *runs), [f"shared seeds: {', '.join(map(str, seeds))}", *notes]


def _paired(
    records: Sequence[Record], answers: Answers, method: str, reference: str
) -> pd.DataFrame:
    frame = tabulate(records, answers)
    means = frame[frame["method"] == reference].set_index(KEYS)["mean"].rename(reference)
    found = frame[frame["method"] == method].join(means, on=KEYS)
    found = found.rename(columns={"mean": method, **RENAMED})
    return found[[*KEYS, method, reference, "difference", "low", "high", "p"]]


def chosen(
    frame: pd.DataFrame, of: Suite, metrics: Collection[str], datasets: Collection[str]
) -> pd.DataFrame:
    """The rows of some metrics and datasets; by default the usual metrics of every dataset.

    ValueError names what there is.
    """
    default = {*DEFAULT_METRICS, *(metric.name for metric in of.metrics)}
    for column, wanted in (("metric", metrics), ("dataset", datasets)):
        known = frame[column].unique().tolist()
        for name in wanted:
            if name not in known:
                raise InputError(
                    f"no {column} {name!r} in these runs; they have {', '.join(known)}"
                )
    frame = frame[frame["metric"].isin(metrics or default)]
    return frame[frame["dataset"].isin(datasets)] if datasets else frame


def _shared_rows(
    ours: Mapping[str, Samples], theirs: Mapping[str, Samples], runs: Sequence[str]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Dataset -> rows in each run of the test images that both answer, paired by id."""
    shared = {}
    for name in (name for name in ours if name in theirs):
        a, b = ours[name], theirs[name]
        _, left, right = np.intersect1d(a.ids, b.ids, return_indices=True)
        if len(left) and not np.array_equal(a.labels[left], b.labels[right]):
            raise InputError(
                f"{name}: test images of {runs[0]} and {runs[1]} have the same ids and different "
                "labels; the runs are of different data and cannot be paired"
            )
        if len(left):
            shared[name] = (left, right)
    if not shared:
        raise InputError(f"{runs[0]} and {runs[1]} share no test image; they cannot be paired")
    return shared
