"""A run: which folder, what is done already, what is missing, and doing it.

Every (suite, method, seed) is written as soon as it exists. A run that was killed continues when
it is started again, and ends with the same files: `unfinished.json` names the suites of a command
until all of them have their tables. A finished run is computed again unless `resume` is wanted;
`fresh` throws away what is there.
"""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench import record as records
from bench.checkpoints import discard_of
from bench.items import Items, measure_of, points
from bench.metrics import confusion, measure, scored
from bench.plan import Job, prompts, prompts_sha256
from bench.progress import Advancing
from bench.record import (
    Record,
    content_key,
    file_sha256,
    record_name,
    write_samples,
    write_text,
)
from bench.suites import Context, Outcome, suite
from vitask.data.spec import Dataset
from vitask.prompts import candidates

UNFINISHED = "unfinished.json"
ENTRY = {"key", "command", "finished", "records"}  # of a suite in run.json
PARTS = ("records", "samples", "checkpoints", "official")  # folders of a run


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time writes a run's folder; the lock ends with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)  # the folder itself: no lock file to leave behind
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another run is writing {folder}; wait for it, or give another --out"
            ) from None
        _sweep(folder)
        yield
    finally:
        os.close(descriptor)


def _sweep(folder: Path) -> None:
    """Remove what a killed process was in the middle of writing: all of it has hidden names."""
    for place in (folder, *(folder / part for part in PARTS)):
        for path in place.glob(".*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Suite -> its run: key, names of its records, whether it ended. Empty without a run."""
    return _read(
        folder / "run.json",
        lambda entry: isinstance(entry, dict) and entry.keys() >= ENTRY,
        "put it back, or remove the folder: which records belong to a run stands there alone",
    )


def _read(path: Path, is_entry: Callable[[Any], bool], advice: str) -> dict[str, Any]:
    """Suite -> what a file says of it, empty without the file; ValueError if it is damaged."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:  # no JSON, or no text at all
        raise ValueError(f"{path} is no JSON ({error}); {advice}") from None
    if not isinstance(found, dict) or not all(map(is_entry, found.values())):
        raise ValueError(f"{path} is not what a run writes; {advice}")
    return found


def start_over(folder: Path, suites: Sequence[str]) -> None:
    """Throw away what runs of these suites have left in a folder, and all models."""
    manifest = read_manifest(folder)
    for name in suites:
        _discard(folder, name)
        manifest.pop(name, None)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    (folder / UNFINISHED).unlink(missing_ok=True)
    _write_manifest(folder, manifest)


def unfinished(folder: Path) -> dict[str, str]:
    """Suites of commands that were stopped before they ended -> key of their run."""
    return _read(
        folder / UNFINISHED,
        lambda key: isinstance(key, str),
        "remove it: suites that had finished are then computed again",
    )


def note_unfinished(folder: Path, runs: Mapping[str, str | None]) -> None:
    """Remember runs that begin (suite -> key) or forget those that ended (suite -> None)."""
    known: dict[str, str | None] = {**unfinished(folder), **runs}
    left = {name: key for name, key in known.items() if key is not None}
    if left:
        write_text(folder / UNFINISHED, json.dumps(left, indent=1) + "\n")
    else:
        (folder / UNFINISHED).unlink(missing_ok=True)


def record_keys(job: Job) -> dict[tuple[str, int], str]:
    """Content key of each method and seed.

    The suite's own source is part of it: there stands what its methods change in the recipe.
    """
    borrowed = [suite(name) for name in getattr(job.module, "BORROWED", ())]
    own = {
        "source": [file_sha256(Path(module.__file__)) for module in (job.module, *borrowed)],
        "libraries": records.versions(_libraries(job)),
    }
    return {
        (method, seed): content_key(
            job.identity() | own | {"suite": job.name, "method": method, "seed": seed}
        )
        for seed in job.plan.seeds
        for method in job.module.METHODS
    }


def run_key(job: Job) -> str:
    """Of the whole: equal keys end with the same records."""
    keys = record_keys(job).items()
    return content_key({record_name(job.name, *which): key for which, key in keys})


@dataclass
class _Share:
    """So many units of the whole: passes on what work tells of itself, and at its end skips what
    it has not told, because it was there already or because the work failed."""

    whole: Advancing
    left: float  # units
    text: str

    def __enter__(self) -> "_Share":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        stopped = kind is not None and not issubclass(kind, Exception)  # and all else with it
        if self.left > 1e-6 and not stopped:
            self.skip(self.left, self.text)

    def advance(self, units: float, text: str) -> None:
        self.left -= units
        self.whole.advance(units, text)

    def skip(self, units: float, text: str) -> None:
        self.left -= units
        self.whole.skip(units, text)

    def note(self, text: str) -> None:
        self.whole.note(text)


def run_suite(
    job: Job,
    folder: Path,
    progress: Advancing,
    *,
    command: str,
    resume: bool = False,
    cache: dict[Any, Any] | None = None,
) -> list[Record]:
    """Run one suite over all seeds and return its records, in the order of methods and seeds."""
    import torch

    module, name, plan = job.module, job.name, job.plan
    run, units = _Run(job, folder, record_keys(job), command), module.units(plan.recipe)
    with _Share(progress, units * len(plan.seeds), name) as whole:
        run.begin(whole, resume=resume)
        context = Context(
            suite=name,
            recipe=plan.recipe,
            datasets=job.datasets,
            evaluated=job.evaluated,
            folder=folder,
            identity=job.base(),
            device="cuda" if torch.cuda.is_available() else "cpu",
            progress=whole,
            prefix=_prefix(job),
            cache={} if cache is None else cache,
        )
        for seed in plan.seeds:
            with _Share(whole, units, f"{name}, seed {seed}") as context.progress:
                _run_seed(run, context, seed)
        run.end()
    return read_records(folder, name)


def _run_seed(run: "_Run", context: Context, seed: int) -> None:
    """The methods that are missing; each is on disk before the next one is scored."""
    methods, missing = run.job.module.METHODS, run.missing(seed)
    if done := len(methods) - len(missing):
        context.progress.note(
            f"{context.suite}, seed {seed}: {done} of {len(methods)} methods are there"
        )
    if missing:
        records.reset_peak()
        start = time.perf_counter()
        for outcome in run.job.module.run(context, seed, missing):
            run.write(outcome, seed, round(time.perf_counter() - start, 2))
            records.reset_peak()
            start = time.perf_counter()


def _libraries(job: Job) -> Sequence[str]:
    """What the suite alone computes with."""
    return getattr(job.module, "LIBRARIES", ())


def _prefix(job: Job) -> str:
    """Of checkpoints' names: suites that train on the same data share them."""
    if hasattr(job.module, "trained_on"):
        return f"{job.name}-"
    return "study-" if getattr(job.module, "STUDY", False) else ""


@dataclass
class _Run:
    """A suite's run on disk: its entry in the manifest, its records and samples."""

    job: Job
    folder: Path
    keys: dict[tuple[str, int], str]  # of each method and seed
    command: str
    manifest: dict[str, Any] = field(default_factory=dict)

    def begin(self, progress: Advancing, *, resume: bool) -> None:
        """Go on with what is there, or throw it away, and say in the manifest what will be."""
        name = self.job.name
        names = [record_name(name, method, seed) for method, seed in self.keys]
        key = run_key(self.job)
        self.manifest = read_manifest(self.folder)
        before = self.manifest.get(name, {})
        continues = before.get("key") == key and not before.get("finished")
        if before and not (continues or before.get("finished") or resume):
            progress.note(
                f"{name}: the unfinished run in {self.folder} is of another key; starting again"
            )
        if not (continues or resume):
            _discard(self.folder, name)
        self.manifest[name] = {
            "key": key,
            "command": self.command,
            "finished": False,
            "records": names,
        }
        _write_manifest(self.folder, self.manifest)

    def missing(self, seed: int) -> list[str]:
        """Methods whose record of this key is not there, or whose samples are damaged."""
        return [
            method
            for method in self.job.module.METHODS
            if not _there(self.folder, self.job.name, method, seed, self.keys[method, seed])
        ]

    def write(self, outcome: Outcome, seed: int, seconds: float) -> None:
        """Samples first, then the record: a record that exists is whole."""
        job, name = self.job, record_name(self.job.name, outcome.method, seed)
        digest = write_samples(
            self.folder / "samples" / f"{name}.parquet", outcome.predictions, job.evaluated
        )
        metrics, matrices, cards = _judge(job, outcome)
        items = {dataset: one.card() for dataset, one in outcome.items.items()}
        for dataset, card in items.items():
            own = plain(points(Items.of(card), measure_of(job.module)))
            metrics[dataset] = metrics.get(dataset, {}) | own
        varying = {}
        for dataset, values in outcome.values.items():
            fixed = {k: float(v) for k, v in values.items() if k not in outcome.measured}
            metrics[dataset] = metrics.get(dataset, {}) | fixed
            varying[dataset] = {k: float(v) for k, v in values.items() if k in outcome.measured}
        measured: dict[str, Any] = {"seconds": seconds, "peak_mib": round(records.peak_mib())}
        if any(varying.values()):
            measured["values"] = varying
        plan = job.plan
        Record(
            suite=job.name,
            method=outcome.method,
            seed=seed,
            key=self.keys[outcome.method, seed],
            command=self.command,
            recipe=asdict(plan.recipe),
            plan={"source": plan.source, "names": list(plan.names), "limit": plan.limit},
            data={n: _data_card(d) for n, d in job.evaluated.items()},
            trained_on={n: _data_card(d) for n, d in job.datasets.items()},
            candidates=cards,
            prompts=prompts(job.datasets | job.evaluated),
            prompts_sha256=prompts_sha256(job.datasets | job.evaluated),
            samples_sha256=digest,
            metrics=metrics,
            confusion=matrices,
            extras=outcome.extras,
            items=items,
            versions=records.versions() | records.versions(_libraries(job)),
            commit=records.commit(),
            hardware=records.hardware(),
            measured=measured,
        ).write(self.folder)

    def end(self) -> None:
        self.manifest[self.job.name]["finished"] = True
        _write_manifest(self.folder, self.manifest)


def _judge(job: Job, outcome: Outcome) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Metrics, confusion matrices and multi-label candidates, each by dataset."""
    metrics, matrices, cards = {}, {}, {}
    for prediction in outcome.predictions:
        name = prediction.dataset
        dataset = job.evaluated[name]
        test = dataset.splits["test"].labels
        answers = candidates(dataset.spec, dataset.splits["train"].labels)
        if dataset.spec.multi_label:
            cards[name] = records.candidates_card(answers, test)
        data = scored(dataset.spec, test, prediction, answers)
        metrics[name] = plain(measure(data))
        matrices[name] = confusion(data)
    return metrics, matrices, cards


def read_records(folder: Path, name: str) -> list[Record]:
    """The records that the manifest names for a suite; all have to be there."""
    entry = read_manifest(folder).get(name)
    if entry is None:
        raise ValueError(f"no run of suite {name!r} in {folder}; run it first")
    paths = [folder / "records" / f"{record}.json" for record in entry["records"]]
    missing = [path.stem for path in paths if not path.is_file()]
    if missing:
        raise ValueError(
            f"{folder} lacks {len(missing)} of {len(paths)} records of suite {name!r} "
            f"({', '.join(missing[:3])}, ...); start the same run again and it continues"
        )
    return [Record.read(path) for path in paths]


def _there(folder: Path, suite_name: str, method: str, seed: int, key: str) -> bool:
    path = folder / "records" / f"{record_name(suite_name, method, seed)}.json"
    samples = folder / "samples" / f"{path.stem}.parquet"
    if not (path.is_file() and samples.is_file()):
        return False
    there = Record.read(path)
    return there.key == key and file_sha256(samples) == there.samples_sha256


def _discard(folder: Path, suite_name: str) -> None:
    """Remove a suite's records, and the models made for it, before it is computed again."""
    for place, pattern in (
        ("records", f"{suite_name}-*-seed*.json"),
        ("samples", f"{suite_name}-*-seed*.parquet"),
        ("official", f"*@{suite_name}-*-seed*.csv"),
    ):
        for path in (folder / place).glob(pattern):
            path.unlink()
    discard_of(folder / "checkpoints", suite_name)


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    write_text(folder / "run.json", json.dumps(manifest, indent=1) + "\n")


def plain(metrics: dict[str, Any]) -> dict[str, float | None]:
    """Point values rounded to 12 digits (far below any meaning), None for NaN."""
    values = {name: float(value[0]) for name, value in metrics.items()}
    return {name: None if v != v else round(v, 12) for name, v in values.items()}


def _data_card(dataset: Dataset) -> dict[str, Any]:
    return {
        "source": dataset.source,
        "size": dataset.size,
        "md5": dataset.md5,
        "md5_ok": dataset.md5_ok,
        "license": dataset.spec.license,
        "spec": asdict(dataset.spec),
        "images": {part: len(split) for part, split in dataset.splits.items()},
    }
