"""Score again from the per-sample files and the data's labels alone, and compare."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.items import Items, measure_of, points
from bench.metrics import confusion, measure, scored
from bench.official import FOLDER, official_files, official_texts
from bench.record import (
    Record,
    Samples,
    candidates_card,
    content_key,
    file_sha256,
    read_samples,
)
from bench.runs import plain, read_manifest
from bench.suites import suite
from bench.table import render
from vitask.data.spec import Dataset
from vitask.prompts import candidates


def differences(folder: Path, records: list[Record], datasets: Mapping[str, Dataset]) -> list[str]:
    """What does not agree, a line each; empty if every file says what the samples say."""
    found = _manifest(folder, records)
    for record in records:
        found += [f"{record.name}: {text}" for text in _record(folder, record, datasets)]
    if found:
        return found  # tables made from wrong samples would only repeat it
    specs = {name: dataset.spec for name, dataset in datasets.items()}
    expected = render(folder, records, specs)
    expected |= {f"{FOLDER}/{name}": text for name, text in official_texts(folder, records).items()}
    for file, text in expected.items():
        path = folder / file
        if not path.is_file():
            found.append(f"{file} is missing; `report` writes it again")
        elif path.read_bytes() != text.encode():
            found.append(f"{file} is not what the records render; `report` writes it again")
    for path in official_files(folder, records):
        if f"{FOLDER}/{path.name}" not in expected:
            found.append(f"{FOLDER}/{path.name} belongs to no record; `report` removes it")
    return found


def strays(folder: Path) -> list[str]:
    """Records and samples that no run of the folder owns, and a folder without any run."""
    manifest = read_manifest(folder)
    if not manifest:
        return ["run.json names no run; start one again, or remove the folder"]
    owned = {name for entry in manifest.values() for name in entry["records"]}
    files = [*(folder / "records").glob("*.json"), *(folder / "samples").glob("*.parquet")]
    return [
        f"{path.parent.name}/{path.name} belongs to no run"
        for path in sorted(files)
        if path.stem not in owned
    ]


def _manifest(folder: Path, records: list[Record]) -> list[str]:
    entry = read_manifest(folder)[records[0].suite]
    if not entry["finished"]:
        return [f"suite {records[0].suite}: the run is not finished; the same command continues it"]
    if entry["key"] != content_key({record.name: record.key for record in records}):
        return [f"suite {records[0].suite}: run.json names another run than its records"]
    return []


def _record(folder: Path, record: Record, datasets: Mapping[str, Dataset]) -> list[str]:
    """The record's own bytes, its samples' bytes, then everything that they say."""
    text = (folder / "records" / f"{record.name}.json").read_bytes()
    if text != record.text().encode() or record.measured.get("sha256") != record.digest():
        return ["the record was changed after it was written"]
    path = folder / "samples" / f"{record.name}.parquet"
    if not path.is_file():
        return [f"{path.name} is missing"]
    digest = file_sha256(path)
    if digest != record.samples_sha256:
        said = record.samples_sha256[:16]
        return [f"{path.name} has SHA-256 {digest[:16]}, the record says {said}"]
    samples = read_samples(path)
    if list(samples) != list(record.confusion):
        return [f"samples hold {list(samples)}, the record {list(record.confusion)}"]
    found = []
    for name, sample in samples.items():
        if name not in datasets:
            found.append(f"{name}: no such dataset in this run's data")
            continue
        wrong = _inputs(record, name, sample, datasets[name])
        found += [f"{name}: {text}" for text in wrong or _scores(record, sample, datasets[name])]
    for name, card in record.items.items():
        again = plain(points(Items.of(card), measure_of(suite(record.suite))))
        found += [f"{name}: {text}" for text in _disagreements(again, record.metrics[name])]
    return found


def _inputs(record: Record, name: str, sample: Samples, dataset: Dataset) -> list[str]:
    """Images, labels, groups and possible answers, against the data."""
    test, card = dataset.splits["test"], record.data[name]
    if card["md5"] != dataset.md5:
        return [f"the data's MD5 is {dataset.md5}, the record says {card['md5']}"]
    if sample.ids.tolist() != test.ids.tolist():
        return ["the samples' image ids are not the data's"]
    if sample.labels.shape != test.labels.shape:
        return [f"labels have shape {sample.labels.shape}, the data's {test.labels.shape}"]
    wrong = (sample.labels != test.labels).reshape(len(test), -1).any(1)
    if wrong.any():
        return [f"{wrong.sum()} label(s) differ from the data's, first {sample.ids[wrong][0]}"]
    groups = [None if g is None else g.tolist() for g in (sample.groups, test.groups)]
    if groups[0] != groups[1]:
        return ["the samples' groups are not the data's"]
    if dataset.spec.multi_label:
        answers = candidates(dataset.spec, dataset.splits["train"].labels)
        if record.candidates.get(name) != candidates_card(answers, test.labels):
            return ["the candidate answers are not those of the training part"]
    return []


def _scores(record: Record, sample: Samples, dataset: Dataset) -> list[str]:
    """Metrics and confusion matrix, against what the samples give."""
    name, labels = dataset.spec.name, dataset.splits["test"].labels
    answers = candidates(dataset.spec, dataset.splits["train"].labels)
    data = scored(dataset.spec, labels, sample.prediction, answers)
    found = _disagreements(plain(measure(data)), record.metrics[name])
    if confusion(data) != record.confusion[name]:
        found.append("the confusion matrix is another one")
    return found


def _disagreements(
    again: Mapping[str, float | None], said: Mapping[str, float | None]
) -> list[str]:
    return [
        f"{metric} is {again[metric]} from the samples, {said.get(metric)} in the record"
        for metric in again
        if not _same(again[metric], said.get(metric))
    ]


def _same(ours: Any, theirs: Any) -> bool:
    """Equal but for the last digits, which may differ between machines."""
    if ours is None or theirs is None:
        return ours is theirs
    return abs(ours - theirs) <= 1e-11
