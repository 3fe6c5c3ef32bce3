"""Score again from the per-sample files and the data's labels alone, and compare."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from bench.metrics import confusion, measure, scored
from bench.record import Record, candidates_of, read_samples
from bench.runs import plain
from bench.table import render
from vitask.data.spec import Dataset


def differences(folder: Path, records: list[Record], datasets: Mapping[str, Dataset]) -> list[str]:
    """What does not agree, a line each; empty if every file says what the samples say."""
    found = []
    for record in records:
        found += [f"{record.name}: {text}" for text in _record(folder, record, datasets)]
    if found:
        return found  # tables made from wrong samples would only repeat it
    specs = {name: dataset.spec for name, dataset in datasets.items()}
    for file, text in render(folder, records, specs).items():
        path = folder / file
        if not path.is_file():
            found.append(f"{file} is missing; `report` writes it again")
        elif path.read_bytes() != text.encode():
            found.append(f"{file} is not what the records render; `report` writes it again")
    return found


def _record(folder: Path, record: Record, datasets: Mapping[str, Dataset]) -> list[str]:
    path = folder / "samples" / f"{record.name}.parquet"
    if not path.is_file():
        return [f"{path.name} is missing"]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != record.samples_sha256:
        return [
            f"{path.name} has SHA-256 {digest[:16]}, the record says {record.samples_sha256[:16]}"
        ]
    samples = read_samples(path)
    found = []
    if list(samples) != list(record.metrics):
        found.append(f"samples hold {list(samples)}, the record {list(record.metrics)}")
    for name, (ids, labels, prediction) in samples.items():
        test, spec = datasets[name].splits["test"], datasets[name].spec
        if ids.tolist() != test.ids.tolist():
            found.append(f"{name}: the samples' image ids are not the data's")
            continue
        if not np.array_equal(labels, test.labels.reshape(len(test), -1)):
            wrong = (labels != test.labels.reshape(len(test), -1)).any(1)
            found.append(
                f"{name}: {wrong.sum()} labels differ from the data's, first {ids[wrong][0]}"
            )
            continue
        answers = None
        if spec.multi_label:
            answers = candidates_of(record.candidates[name], len(spec.classes))
        data = scored(spec, test.labels, prediction, answers)
        again = plain(measure(data))
        for metric in again.keys() | record.metrics[name].keys():
            if again.get(metric) != record.metrics[name].get(metric):
                found.append(
                    f"{name}: {metric} is {again.get(metric)} from the samples, "
                    f"{record.metrics[name].get(metric)} in the record"
                )
        if confusion(data) != record.confusion[name]:
            found.append(f"{name}: the confusion matrix is another one")
    return found
