"""Score again from the per-sample files and the data's labels alone, and compare."""

from collections.abc import Mapping
from pathlib import Path

from bench.report.official import official_files, official_texts
from bench.report.render import render
from bench.runs.ingredients import record_key, set_key
from bench.runs.judge import judge
from bench.runs.records import Record, Samples, read_samples, samples_path
from bench.runs.sets import OFFICIAL, read_manifest
from bench.stats.items import Items
from bench.suite import Outcome, suite
from vitask.data.spec import Dataset


def differences(folder: Path, records: list[Record], datasets: Mapping[str, Dataset]) -> list[str]:
    """Every disagreement, a line each; empty if every file agrees with the samples."""
    found = _manifest(folder, records)
    for record in records:
        found += [f"{record.name}: {text}" for text in _record(folder, record, datasets)]
    if found:
        return found  # tables made from wrong samples would only repeat it
    expected = render(folder, records)[0]
    official = official_texts(folder, records)
    expected |= {f"{OFFICIAL}/{name}": text for name, text in official.items()}
    for file, text in expected.items():
        path = folder / file
        if not path.is_file():
            found.append(f"{file} is missing; `report` writes it again")
        elif path.read_bytes() != text.encode():
            found.append(f"{file} differs from what the records render; `report` writes it again")
    for path in official_files(folder, records):
        if f"{OFFICIAL}/{path.name}" not in expected:
            found.append(f"{OFFICIAL}/{path.name} belongs to no record; `report` removes it")
    return found


def _manifest(folder: Path, records: list[Record]) -> list[str]:
    """Whether the records are of the set that run.json names; older sets name no ingredients."""
    name = records[0].suite
    entry = read_manifest(folder)[name]
    if not entry.ingredients:
        return []
    found = []
    if set_key(name, entry.ingredients) != entry.key:
        found.append(f"suite {name}: run.json's key is not that of its ingredients")
    return found + [
        f"{record.name}: its key is of another set than run.json's"
        for record in records
        if record.key != record_key(entry.key, record.method, record.seed)
    ]


def _record(folder: Path, record: Record, datasets: Mapping[str, Dataset]) -> list[str]:
    """The record's bytes, its samples' bytes, then everything that they say."""
    if damage := record.damage(folder):
        return [damage]
    samples = read_samples(samples_path(folder, record.name))
    if list(samples) != list(record.confusion):
        return [f"samples hold {list(samples)}, the record {list(record.confusion)}"]
    wrong = {name: _inputs(record, name, s, datasets.get(name)) for name, s in samples.items()}
    if any(wrong.values()):
        return [f"{name}: {text}" for name, text in wrong.items() if text]
    items = {name: Items.of(card) for name, card in record.items.items()}
    predictions = [sample.prediction for sample in samples.values()]
    outcome = Outcome(record.method, predictions, items=items, thresholds=record.thresholds)
    again = judge(suite(record.suite), outcome, datasets)
    found = [
        f"{name}: {metric} is {value} from the samples, {said} in the record"
        for name, metrics in again.metrics.items()
        for metric, value in metrics.items()
        if not _same(value, said := record.metrics[name].get(metric))
    ]
    if again.confusion != record.confusion:
        found.append("the confusion matrices differ")
    if again.candidates != record.candidates:
        found.append("the candidates differ from those of the training split")
    return found


def _inputs(record: Record, name: str, sample: Samples, dataset: Dataset | None) -> str:
    """How images, labels or groups differ from the data; empty if they do not."""
    if dataset is None:
        return "not a dataset of this run's data"
    card, test = record.data[name], dataset.splits["test"]
    if card["md5"] != dataset.md5:
        return f"the data's MD5 is {dataset.md5}, the record says {card['md5']}"
    if sample.ids.tolist() != test.ids.tolist():
        return "the samples' image ids differ from the data's"
    if sample.labels.shape != test.labels.shape:
        return f"labels have shape {sample.labels.shape}, the data's {test.labels.shape}"
    wrong = (sample.labels != test.labels).reshape(len(test), -1).any(1)
    if wrong.any():
        return f"{wrong.sum()} label(s) differ from the data's, first {sample.ids[wrong][0]}"
    groups = [None if g is None else g.tolist() for g in (sample.groups, test.groups)]
    return "" if groups[0] == groups[1] else "the samples' groups differ from the data's"


def _same(ours: float | None, theirs: float | None) -> bool:
    """Equal but for the last digits, which may differ between machines."""
    if ours is None or theirs is None:
        return ours is theirs
    return abs(ours - theirs) <= 1e-11
