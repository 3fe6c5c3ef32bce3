"""A record: the results of one (suite, method, seed) and what produced them, as JSON and Parquet.

Everything that differs between two runs of the same thing (time, memory) is in `measured`; the
rest of a record is the same bytes each time.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vitask.data.spec import DatasetSpec
from vitask.errors import InputError, reason
from vitask.files import file_sha256, write_bytes, write_text

if TYPE_CHECKING:
    from vitask.data.spec import Dataset
    from vitask.score import Prediction

REMEDY = "put it back from a copy, or run the suite again: it computes this record alone"
_NUMBERS = re.compile(r"\[(\n[-+.,\deE\s]+)\]")  # JSON strings hold no line ends
SCHEMA = pa.schema(
    [
        ("dataset", pa.string()),
        ("id", pa.string()),
        ("label", pa.list_(pa.int16())),  # the class, or 0/1 of every label for multi-label
        ("group", pa.string()),  # patient or lesion, where the data names it
        ("kind", pa.string()),
        ("log_probability", pa.list_(pa.float32())),  # rounded to 2^-10 nat
        ("generated", pa.string()),
    ]
)
LOG_PROBABILITY = "log_probability.list.element"
DICTIONARIES = [name for name in SCHEMA.names if name not in ("label", "log_probability")]


@dataclass
class Record:
    """One method, trained and scored once. `data` and `command` let anyone make it again."""

    suite: str
    method: str
    seed: int
    key: str  # equal keys give equal results
    command: str
    recipe: dict[str, Any]
    plan: dict[str, Any]  # source and names of the datasets that were asked for, limit
    data: dict[str, dict[str, Any]]  # per scored dataset: source, size, md5, md5_ok, images used
    trained_on: dict[str, dict[str, Any]]  # the same per dataset that was trained on
    candidates: dict[str, dict[str, Any]]  # multi-label only: answers, members, coverage
    prompts: dict[str, str]  # per dataset, the instruction
    prompts_sha256: str
    samples_sha256: str
    metrics: dict[str, dict[str, float | None]]  # per scored dataset; None for NaN
    confusion: dict[str, list[list[int]]]
    extras: dict[str, Any]  # validation curves, losses, chosen settings
    versions: dict[str, str]
    commit: str
    hardware: dict[str, Any]
    items: dict[str, dict[str, Any]] = field(default_factory=dict)  # per dataset: bench.stats.items
    thresholds: dict[str, float] = field(default_factory=dict)  # per two-class dataset
    # seconds and peak_mib since the method before it (shared work counts for the first method
    # that needs it), values, sha256
    measured: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return record_name(self.suite, self.method, self.seed)

    @property
    def specs(self) -> dict[str, DatasetSpec]:
        """The descriptions of its datasets, as they were when it was made."""
        return {name: DatasetSpec.of_json(card["spec"]) for name, card in self.data.items()}

    def write(self, folder: Path) -> None:
        self.measured["sha256"] = self.digest()
        write_text(record_path(folder, self.name), self.text())

    def text(self) -> str:
        """The file's text; numbers of a list stand on one line."""
        text = json.dumps(self._content(), indent=1, ensure_ascii=False, allow_nan=False)
        return _NUMBERS.sub(lambda m: "[" + re.sub(r"\s+", " ", m[1].strip()) + "]", text) + "\n"

    def digest(self) -> str:
        """SHA-256 of everything else in the record: a changed byte is seen."""
        content = self._content()
        content["measured"].pop("sha256", None)
        text = json.dumps(content, sort_keys=True, ensure_ascii=False, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def _content(self) -> dict[str, Any]:
        """Its fields; items and thresholds only if it has some."""
        content = asdict(self)
        for name in ("items", "thresholds"):
            if not content[name]:
                del content[name]
        return content

    @classmethod
    def read(cls, path: Path) -> "Record":
        try:
            return cls(**json.loads(path.read_bytes()))
        except Exception as error:  # not JSON, not UTF-8, other fields, nested too deeply
            raise InputError(f"{path} is not a whole record ({reason(error)}); {REMEDY}") from error

    def damage(self, folder: Path) -> str | None:
        """How its files differ from their digests; None if they do not."""
        changed = "the record was changed after it was written"
        try:
            path = record_path(folder, self.name)
            same = path.read_bytes() == self.text().encode()
            if not same or self.measured["sha256"] != self.digest():
                return changed
        except Exception:  # another name, or fields of other types
            return changed
        samples = samples_path(folder, self.name)
        if not samples.is_file():
            return f"{samples.name} is missing"
        digest = file_sha256(samples)
        if digest != self.samples_sha256:
            said = self.samples_sha256[:16]
            return f"{samples.name} has SHA-256 {digest[:16]}, the record says {said}"
        return None


def record_name(suite: str, method: str, seed: int) -> str:
    return f"{suite}-{method}-seed{seed}"


def record_path(folder: Path, name: str) -> Path:
    return folder / "records" / f"{name}.json"


def samples_path(folder: Path, name: str) -> Path:
    return folder / "samples" / f"{name}.parquet"


def write_samples(
    path: Path, predictions: "Sequence[Prediction]", datasets: "Mapping[str, Dataset]"
) -> str:
    """One row per test image; returns the file's SHA-256. The same rows give the same bytes."""
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    for prediction in predictions:
        test = datasets[prediction.dataset].splits["test"]
        columns["dataset"] += [prediction.dataset] * len(test)
        columns["id"] += test.ids.tolist()
        columns["label"] += test.labels.reshape(len(test), -1).tolist()
        groups = test.groups
        columns["group"] += [None] * len(test) if groups is None else groups.tolist()
        columns["kind"] += [prediction.kind] * len(test)
        columns["log_probability"] += prediction.log_probability.tolist()
        columns["generated"] += prediction.generated or [None] * len(test)
    content = samples_bytes(pa.table(columns, schema=SCHEMA))
    write_bytes(path, content)
    return hashlib.sha256(content).hexdigest()


def samples_bytes(table: pa.Table) -> bytes:
    """The Parquet file: small, and the same bytes for the same rows."""
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        compression="zstd",
        compression_level=19,
        use_dictionary=DICTIONARIES,
        column_encoding={LOG_PROBABILITY: "BYTE_STREAM_SPLIT"},
    )
    return sink.getvalue().to_pybytes()


@dataclass(frozen=True)
class Samples:
    """The test images of one dataset as a samples file holds them; arrays as in a Split."""

    ids: np.ndarray
    labels: np.ndarray
    groups: np.ndarray | None
    prediction: "Prediction"

    def take(self, rows: np.ndarray) -> "Samples":
        """The images of these rows, in this order."""
        given, groups = self.prediction, self.groups
        written = given.generated and [given.generated[row] for row in rows]
        taken = replace(given, log_probability=given.log_probability[rows], generated=written)
        groups = None if groups is None else groups[rows]
        return Samples(self.ids[rows], self.labels[rows], groups, taken)


def read_samples(path: Path) -> dict[str, Samples]:
    """The content of a samples file, by dataset."""
    try:
        table = pq.read_table(path)  # older files hold float64
        if table.schema.names != SCHEMA.names:
            raise InputError(f"its columns are {', '.join(table.schema.names)}")
        return _samples(table)
    except Exception as error:  # a changed byte can make pyarrow raise almost anything
        raise InputError(
            f"{path} is not a whole samples file ({reason(error)}); {REMEDY}"
        ) from error


def _samples(table: pa.Table) -> dict[str, Samples]:
    from vitask.score import Prediction

    found = {}
    for name in dict.fromkeys(table["dataset"].to_pylist()):
        rows = table.filter(pa.compute.equal(table["dataset"], name)).to_pydict()
        labels = np.array(rows["label"], dtype=np.int64)
        log_p = np.array(rows["log_probability"], dtype=np.float64)
        written = None if rows["generated"][0] is None else rows["generated"]
        found[name] = Samples(
            ids=np.array(rows["id"]),
            labels=labels[:, 0] if labels.shape[1] == 1 else labels,
            groups=None if rows["group"][0] is None else np.array(rows["group"]),
            prediction=Prediction(name, rows["kind"][0], log_p, written),
        )
    return found
