"""Result files in MedMNIST's own form, readable by its Evaluator."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from bench.metrics import measure, scored
from bench.record import Record, candidates_of, read_samples, write_text
from vitask.data.spec import Dataset


def write_official(
    folder: Path, records: list[Record], datasets: Mapping[str, Dataset]
) -> list[Path]:
    """One file per method, seed and dataset: `{flag}{_size}_test_[AUC]..._[ACC]...@{run}.csv`.

    For real, whole, verified MedMNIST test parts only. Rows: index and class probabilities, no
    header. Returns what was written.
    """
    written = []
    for record in records:
        samples = read_samples(folder / "samples" / f"{record.name}.parquet")
        for name, (_, labels, prediction) in samples.items():
            dataset = datasets[name]
            if not is_official(dataset):
                continue
            spec = dataset.spec
            answers = None
            if spec.multi_label:
                answers = candidates_of(record.candidates[name], len(spec.classes))
            truth = labels if spec.multi_label else labels[:, 0]
            data = scored(spec, truth, prediction, answers)
            point = measure(data)
            file = file_name(
                name,
                dataset.size,
                auc=float(point["auc"][0]),
                accuracy=float(point["medmnist_acc"][0]),
                run=f"{record.method}-seed{record.seed}",
            )
            written.append(folder / "official" / file)
            write_text(written[-1], _text(data.probability))
    return written


def is_official(dataset: Dataset) -> bool:
    """A verified file of MedMNIST with its whole test part."""
    whole = len(dataset.splits["test"]) == dataset.spec.n_samples["test"]
    return dataset.source == "medmnist" and dataset.md5_ok and whole


def file_name(flag: str, size: int, *, auc: float, accuracy: float, run: str) -> str:
    part = "" if size == 28 else f"_{size}"
    return f"{flag}{part}_test_[AUC]{auc:.3f}_[ACC]{accuracy:.3f}@{run}.csv"


def _text(probability: np.ndarray) -> str:
    return pd.DataFrame(probability).to_csv(header=False, lineterminator="\n", float_format="%.10g")
