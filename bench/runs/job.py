"""Running a job: the records that are missing are computed, each on disk as soon as it exists."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.runs import sets
from bench.runs.environment import commit, hardware
from bench.runs.ingredients import record_key
from bench.runs.judge import judge
from bench.runs.plan import Job
from bench.runs.progress import Advancing
from bench.runs.records import Record, record_name, samples_path, write_samples
from bench.runs.sets import Entry
from bench.runs.work import Work
from bench.suite import Outcome
from vitask import memory


@dataclass
class _Share:
    """So many units of the whole. It passes on the progress of its work; at its end it skips what
    was not reported, because it existed already or because the work failed."""

    whole: Advancing
    left: float  # units
    text: str

    def __enter__(self) -> "_Share":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        stopped = kind is not None and not issubclass(kind, Exception)  # and all else with it
        if self.left > 1e-6 and not stopped:
            self.skip(self.left, self.text)

    def advance(self, units: float, text: str, *, finished: bool = False) -> None:
        self.left -= units
        self.whole.advance(units, text, finished=finished)

    def skip(self, units: float, text: str) -> None:
        self.left -= units
        self.whole.skip(units, text)

    def note(self, text: str) -> None:
        self.whole.note(text)


def run_job(
    job: Job,
    folder: Path,
    progress: Advancing,
    *,
    command: str,
    cache: dict[Any, Any] | None = None,
) -> tuple[list[Record], int]:
    """Run one suite over all seeds: the records of its set, other seeds included, and how many
    of them were computed now. The folder must be `locked`."""
    name, methods = job.suite.name, [method.name for method in job.suite.methods]
    entry = Entry(job.key, command, [], job.ingredients)
    shown = sets.read_manifest(folder).get(name)
    seeds = set(job.plan.seeds)
    if shown is not None and shown.key == job.key:  # one of its records may be lost
        seeds |= {int(record.rpartition("seed")[2]) for record in shown.records}
    entry.records = sets.names_of(name, methods, sorted(seeds))
    sets.check_foreign(folder, name, entry)
    missing = {seed: [m for m in methods if not _found(job, folder, m, seed)] for seed in seeds}
    count, cache = sum(map(len, missing.values())), {} if cache is None else cache
    changed = sets.superseding(folder, name, entry)
    if changed:
        progress.note(f"{name}: the older results move to {sets.SUPERSEDED}/ when the new ones "
                      f"are whole; what differs: {_listed(changed)}")  # fmt: skip
    with _Share(progress, job.units * len(job.plan.seeds), name) as whole:
        if count:
            place = sets.begin(folder, name, entry)
            for seed, wanted in missing.items():
                with _Share(whole, job.units, f"{name}, seed {seed}") as share:
                    if wanted:
                        _run_seed(job, seed, wanted, folder, place, share, command, cache)
    if count or changed or shown is None or not {*entry.records} <= {*shown.records}:
        sets.promote(folder, name, entry)
    return sets.read_records(folder, name), count


def _listed(changed: list[str], most: int = 5) -> str:
    more = f"; and {len(changed) - most} more" if len(changed) > most else ""
    return "; ".join(changed[:most]) + more


def _found(job: Job, folder: Path, method: str, seed: int) -> bool:
    name = record_name(job.suite.name, method, seed)
    return sets.find(folder, job.key, name, record_key(job.key, method, seed)) is not None


def _run_seed(
    job: Job,
    seed: int,
    wanted: list[str],
    folder: Path,
    place: Path,
    progress: Advancing,
    command: str,
    cache: dict[Any, Any],
) -> None:
    """The missing methods; each is on disk before the next one is scored."""
    name = job.suite.name
    if found := len(job.suite.methods) - len(wanted):
        total = len(job.suite.methods)
        progress.note(f"{name}, seed {seed}: {found} of {total} methods were computed before")
    work = Work(
        name, job.plan.recipe, job.datasets, job.evaluated, seed, folder, job.versions, progress,
        cache, job.prefix, job.suite.scorings,
    )  # fmt: skip
    started = _start()
    for outcome in job.suite.run(work, wanted):
        write_record(job, outcome, seed, place, command, started())
        started = _start()


def _start() -> Callable[[], dict[str, Any]]:
    """Seconds and memory from here on."""
    memory.reset_peak()
    start = time.perf_counter()
    return lambda: {
        "seconds": round(time.perf_counter() - start, 2),
        "peak_mib": round(memory.peak_mib()),
    }


def write_record(
    job: Job, outcome: Outcome, seed: int, place: Path, command: str, measured: dict[str, Any]
) -> None:
    """Samples first, then the record: a record that exists is whole."""
    name = record_name(job.suite.name, outcome.method, seed)
    digest = write_samples(samples_path(place, name), outcome.predictions, job.evaluated)
    judged = judge(job.suite, outcome, job.evaluated)
    if judged.varying:
        measured["values"] = judged.varying
    Record(
        suite=job.suite.name, method=outcome.method, seed=seed, command=command,
        key=record_key(job.key, outcome.method, seed), **job.data_cards(),
        candidates=judged.candidates, samples_sha256=digest, metrics=judged.metrics,
        confusion=judged.confusion, extras=outcome.extras, items=judged.items,
        thresholds=outcome.thresholds,
        commit=commit(), hardware=hardware(), measured=measured,
    ).write(place)  # fmt: skip
