"""Result files in MedMNIST's format, readable by its Evaluator."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bench.runs.records import Record, read_samples, samples_path
from bench.runs.sets import OFFICIAL
from bench.stats.metrics import measure
from vitask.data.medmnist import result_name
from vitask.decision import scored
from vitask.files import write_text
from vitask.prompts import Candidates

SUITE = "main"


def write_official(folder: Path, records: Sequence[Record]) -> list[Path]:
    """Write the result files of a suite's records, replacing older ones; returns their paths."""
    texts = official_texts(folder, records)
    for path in official_files(folder, records):
        if path.name not in texts:
            path.unlink()
    for name, text in texts.items():
        write_text(folder / OFFICIAL / name, text)
    return [folder / OFFICIAL / name for name in texts]


def official_files(folder: Path, records: Sequence[Record]) -> list[Path]:
    """The existing result files of these records, whatever metrics their names state."""
    places = (folder / OFFICIAL).glob("*.csv")
    runs = {f"@{record.name}.csv" for record in records}
    return sorted(path for path in places if path.name[path.name.rfind("@") :] in runs)


def official_texts(folder: Path, records: Sequence[Record]) -> dict[str, str]:
    """File name -> text, one per record and official dataset.

    `{flag}{_size}_test_[AUC]..._[ACC]...@{run}.csv`, without a header; a row is an index and class
    probabilities. Only for suite `main`, and for complete, verified MedMNIST files.
    """
    texts = {}
    for record in records:
        official = [name for name, card in record.data.items() if is_official(card)]
        if not official or record.plan["limit"] is not None or record.suite != SUITE:
            continue
        samples, specs = read_samples(samples_path(folder, record.name)), record.specs
        for name in (name for name in samples if name in official):
            known = None
            if specs[name].multi_label:
                known = Candidates.of_card(record.candidates[name], len(specs[name].classes))
            data = scored(specs[name], samples[name].labels, samples[name].prediction, known)
            point = measure(data)
            file = result_name(
                name,
                record.data[name]["size"],
                auc=float(point["auc"][0]),
                accuracy=float(point["medmnist_acc"][0]),
                run=record.name,
            )
            texts[file] = _text(data.probability)
    return texts


def is_official(card: dict[str, Any]) -> bool:
    """Whether the data are a verified MedMNIST file, with all training and test images used."""
    used, published = card["images"], card["spec"]["n_samples"]
    complete = all(used[split] == published[split] for split in ("train", "test"))
    return card["source"] == "medmnist" and card["md5_ok"] and complete


def _text(probability: np.ndarray) -> str:
    return pd.DataFrame(probability).to_csv(header=False, lineterminator="\n", float_format="%.10g")
