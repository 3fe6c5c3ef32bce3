"""A record: what one (suite, method, seed) gave and all that produced it, as JSON and Parquet.

Everything that differs between two runs of the same thing (time, memory) lies in `measured`;
the rest of a record is the same bytes each time.
"""

import hashlib
import json
import os
import platform
import re
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vitask.prompts import Candidates

if TYPE_CHECKING:
    from vitask.data.spec import Dataset
    from vitask.score import Prediction

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = (
    "torch", "torchvision", "transformers", "peft", "timm", "medmnist", "triton", "accelerate",
    "scikit-learn", "scipy", "numpy", "pandas", "pyarrow", "pillow", "safetensors", "tokenizers",
)  # fmt: skip
_NUMBERS = re.compile(r"\[(\n[-+.,\deE\s]+)\]")  # JSON strings hold no line ends
SCHEMA = pa.schema(
    [
        ("dataset", pa.string()),
        ("id", pa.string()),
        ("label", pa.list_(pa.int16())),  # the class, or 0/1 of every label for multi-label
        ("group", pa.string()),  # patient or lesion, where the data names it
        ("kind", pa.string()),
        ("log_probability", pa.list_(pa.float64())),
        ("generated", pa.string()),
    ]
)


@dataclass
class Record:
    """One method, trained and scored once. `data` and `command` let anyone make it again."""

    suite: str
    method: str
    seed: int
    key: str  # content key: equal keys give equal results
    command: str
    recipe: dict[str, Any]
    plan: dict[str, Any]  # source and names of the datasets that were asked for, limit
    data: dict[str, dict[str, Any]]  # per scored dataset: source, size, md5, md5_ok, images used
    trained_on: dict[str, dict[str, Any]]  # the same of what was trained on
    candidates: dict[str, dict[str, Any]]  # multi-label only: answers, members, coverage
    prompts: dict[str, str]  # per dataset, the instruction
    prompts_sha256: str
    samples_sha256: str
    metrics: dict[str, dict[str, float | None]]  # per scored dataset; None for NaN
    confusion: dict[str, list[list[int]]]
    extras: dict[str, Any]  # validation curves, losses, what was chosen
    versions: dict[str, str]
    commit: str
    hardware: dict[str, Any]
    items: dict[str, dict[str, Any]] = field(default_factory=dict)  # per dataset: bench.items
    # seconds and peak_mib since the method before it (what methods share counts for the first of
    # them), values, sha256
    measured: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return record_name(self.suite, self.method, self.seed)

    def write(self, folder: Path) -> None:
        self.measured["sha256"] = self.digest()
        write_text(folder / "records" / f"{self.name}.json", self.text())

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
        """Its fields; items only where there are some."""
        content = asdict(self)
        if not self.items:
            del content["items"]
        return content

    @classmethod
    def read(cls, path: Path) -> "Record":
        try:
            return cls(**json.loads(path.read_text()))
        except (json.JSONDecodeError, TypeError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path} is no whole record ({error}); remove it and run the suite again"
            ) from error


def record_name(suite: str, method: str, seed: int) -> str:
    return f"{suite}-{method}-seed{seed}"


def write_text(path: Path, text: str) -> None:
    """Atomic: the file is whole or not there."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Atomic: written beside the place, then moved onto it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


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
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns, schema=SCHEMA), sink, compression="zstd")
    content = sink.getvalue().to_pybytes()
    write_bytes(path, content)
    return hashlib.sha256(content).hexdigest()


@dataclass(frozen=True)
class Samples:
    """The test images of one dataset as a samples file holds them; arrays as in a Split."""

    ids: np.ndarray
    labels: np.ndarray
    groups: np.ndarray | None
    prediction: "Prediction"


def read_samples(path: Path) -> dict[str, Samples]:
    """What `write_samples` wrote, by dataset."""
    from vitask.score import Prediction

    try:
        table = pq.read_table(path, schema=SCHEMA)
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(f"{path} is no whole samples file ({error})") from error
    found = {}
    names = table["dataset"].to_pylist()
    for name in dict.fromkeys(names):
        rows = table.filter(pa.compute.equal(table["dataset"], name))
        generated, groups = rows["generated"].to_pylist(), rows["group"].to_pylist()
        labels = np.array(rows["label"].to_pylist(), dtype=np.int64)
        found[name] = Samples(
            ids=np.array(rows["id"].to_pylist()),
            labels=labels[:, 0] if labels.shape[1] == 1 else labels,
            groups=None if groups[0] is None else np.array(groups),
            prediction=Prediction(
                dataset=name,
                kind=rows["kind"][0].as_py(),
                log_probability=np.array(rows["log_probability"].to_pylist(), dtype=np.float64),
                generated=None if generated[0] is None else generated,
            ),
        )
    return found


def file_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def content_key(parts: Mapping[str, Any]) -> str:
    """Hash of everything that decides a result, 16 hexadecimal digits."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def sources_sha256() -> str:
    """Hash of the sources of `vitask` and `kernels`, the embedded weights included."""
    digest = hashlib.sha256()
    for package in ("kernels", "vitask"):
        for path in sorted((ROOT / package).rglob("*")):
            if path.suffix in (".py", ".safetensors", ".json", ".txt", ".jinja"):
                digest.update(path.relative_to(ROOT).as_posix().encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()


def versions(libraries: Sequence[str] = LIBRARIES) -> dict[str, str]:
    """Python's and the libraries' versions, "missing" for those that are not there."""
    found = {"python": platform.python_version()}
    for library in libraries:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = "missing"
    return found


def commit() -> str:
    """The checkout's commit, "-dirty" behind it if sources differ; "unknown" without git."""
    try:
        head = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--", "bench", "kernels", "vitask")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}-dirty" if changed else head


def hardware() -> dict[str, Any]:
    """Processor, cores, memory and accelerator."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(memory / 2**30),
        "gpu": gpu,
    }


def reset_peak() -> None:
    """Measure the peak anew from here, where the system can (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> float:
    """Largest resident memory of this process since `reset_peak`, or of all its life."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.is_file() else None
    kib = int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib / 1024


def command_line(roots: Sequence[Path], out: Path, arguments: Sequence[str] | None = None) -> str:
    """The command as it was given, its paths replaced by DATA_ROOT and OUT.

    `--resume` and `--fresh` say what to do with files, not what is computed: left out.
    """
    names = {str(path): name for path, name in [*((r, "DATA_ROOT") for r in roots), (out, "OUT")]}
    given = sys.argv[1:] if arguments is None else arguments
    words = [names.get(word.rstrip("/") or word, names.get(word, word)) for word in given]
    words = [
        f"{word.split('=')[0]}={names[word.split('=', 1)[1]]}"
        if "=" in word and word.split("=", 1)[1] in names
        else word
        for word in words
        if word not in ("--resume", "--fresh")
    ]
    return " ".join(["python -m bench", *words])


def candidates_card(candidates: Candidates, labels: np.ndarray) -> dict[str, Any]:
    """Answers of a multi-label dataset and the share of test images that they can answer."""
    return {
        "answers": list(candidates.texts),
        "members": [np.flatnonzero(row).tolist() for row in candidates.members],
        "coverage": candidates.coverage(labels),
    }


def candidates_of(card: Mapping[str, Any], classes: int) -> Candidates:
    """The inverse of `candidates_card`."""
    members = np.zeros((len(card["answers"]), classes), dtype=bool)
    for row, present in enumerate(card["members"]):
        members[row, present] = True
    return Candidates(tuple(card["answers"]), members)


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()
