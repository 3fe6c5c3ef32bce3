"""A run: which folder, what is done already, what is missing, and doing it.

Every (suite, method, seed) is written as soon as it exists. A run that was killed continues when
it is started again, and ends with the same files; a finished one is computed again unless
`resume` is wanted, `fresh` throws away what is there.
"""

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import record as records
from bench.metrics import confusion, measure, scored
from bench.progress import Progress
from bench.record import (
    Record,
    content_key,
    file_sha256,
    record_name,
    write_samples,
    write_text,
)
from bench.suites import Context, Outcome, suite
from vitask.data import load, subset
from vitask.data.spec import Dataset, DatasetSpec
from vitask.prompts import candidates, instruction
from vitask.recipes import Recipe

PARTS = ("records", "samples", "checkpoints", "official")  # folders of a run


@dataclass(frozen=True)
class Plan:
    """What was asked for on the command line."""

    recipe: Recipe
    source: str  # phantom | medmnist
    names: tuple[str, ...]  # datasets
    roots: tuple[Path, ...] = ()
    allow_unverified: tuple[str, ...] = ()
    limit: int | None = None
    out: Path = Path("leaderboards")
    seeds: tuple[int, ...] = (0,)

    @property
    def folder(self) -> Path:
        """OUT/<recipe>-<data>, with what makes it another run: the limit, other datasets."""
        name = f"{self.recipe.name}-{self.source}"
        if self.limit is not None:
            name += f"-limit{self.limit}"
        if set(self.names) != set(self.recipe.datasets(self.source)):
            text = ",".join(sorted(self.names))
            name += f"-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        return self.out / name

    def datasets(self) -> dict[str, Dataset]:
        """All datasets, checked before anything is computed, cut to the recipe's size."""
        found = {}
        for name in self.names:
            dataset = load(
                name,
                source=self.source,
                roots=self.roots,
                size=self.recipe.source_size,
                allow_unverified=self.allow_unverified,
                phantom_sizes=self.recipe.phantom_samples,
            )
            dataset = subset(dataset, train=self.recipe.train_limit, val=self.recipe.val_limit)
            if self.limit is not None:
                dataset = subset(dataset, train=self.limit, val=self.limit, test=self.limit)
            found[name] = dataset
        return found


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
    path = folder / "run.json"
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON ({error}); remove the folder or use --fresh") from None


def run_suite(
    name: str,
    plan: Plan,
    datasets: dict[str, Dataset],
    progress: Progress,
    *,
    command: str,
    resume: bool = False,
    fresh: bool = False,
    cache: dict[str, Any] | None = None,
) -> list[Record]:
    """Run one suite over all seeds and return its records, in the order of methods and seeds."""
    import torch

    module = suite(name)
    folder = plan.folder
    base = _identity(plan, datasets)
    keys = {
        (method, seed): content_key(base | {"suite": name, "method": method, "seed": seed})
        for seed in plan.seeds
        for method in module.METHODS
    }
    wanted_names = [record_name(name, method, seed) for method, seed in keys]
    run_key = content_key(dict(zip(wanted_names, keys.values(), strict=True)))
    manifest = {} if fresh else read_manifest(folder)
    before = manifest.get(name, {})
    continues = before.get("key") == run_key and not before.get("finished")
    if before and not (continues or before.get("finished") or resume):
        progress.note(f"{name}: the unfinished run in {folder} is of another key; starting again")
    if not (continues or resume):
        _discard(folder, name)
    manifest[name] = {
        "key": run_key,
        "command": command,
        "finished": False,
        "records": wanted_names,
    }
    _write_manifest(folder, manifest)

    context = Context(
        recipe=plan.recipe,
        datasets=datasets,
        folder=folder,
        key=content_key(base),
        device="cuda" if torch.cuda.is_available() else "cpu",
        progress=progress,
        cache={} if cache is None else cache,
    )
    for seed in plan.seeds:
        missing = [m for m in module.METHODS if not _there(folder, name, m, seed, keys[m, seed])]
        done = len(module.METHODS) - len(missing)
        if done:
            share = module.units(plan.recipe) * done / len(module.METHODS)
            progress.note(f"{name}, seed {seed}: {done} of {len(module.METHODS)} methods are there")
        if not missing:
            progress.advance(share, f"{name}, seed {seed}")
            continue
        start = time.perf_counter()
        for outcome in module.run(context, seed, missing):
            measured = {
                "seconds": round(time.perf_counter() - start, 2),
                "peak_mib": round(records.peak_mib()),
            }
            _write(
                plan, name, seed, keys[outcome.method, seed], outcome, context, command, measured
            )
            start = time.perf_counter()
    manifest[name]["finished"] = True
    _write_manifest(folder, manifest)
    return read_records(folder, name)


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


def _identity(plan: Plan, datasets: dict[str, Dataset]) -> dict[str, Any]:
    """Everything that decides a result, but for suite, method and seed."""
    return {
        "recipe": asdict(plan.recipe),
        "limit": plan.limit,
        "data": {name: [d.source, d.size, d.md5] for name, d in datasets.items()},
        "prompts": _prompts_sha256(datasets),
        "sources": records.sources_sha256(),
        "versions": records.versions(),
    }


def _prompts(datasets: dict[str, Dataset]) -> dict[str, str]:
    return {name: instruction(dataset.spec) for name, dataset in datasets.items()}


def _prompts_sha256(datasets: dict[str, Dataset]) -> str:
    text = json.dumps(_prompts(datasets), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _there(folder: Path, suite_name: str, method: str, seed: int, key: str) -> bool:
    path = folder / "records" / f"{record_name(suite_name, method, seed)}.json"
    samples = folder / "samples" / f"{path.stem}.parquet"
    if not (path.is_file() and samples.is_file()):
        return False
    there = Record.read(path)
    return there.key == key and file_sha256(samples) == there.samples_sha256


def _discard(folder: Path, suite_name: str) -> None:
    """Remove a suite's records before it is computed again; its checkpoints go with them."""
    for part, ending in (("records", "json"), ("samples", "parquet")):
        for path in (folder / part).glob(f"{suite_name}-*-seed*.{ending}"):
            path.unlink()
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    write_text(folder / "run.json", json.dumps(manifest, indent=1) + "\n")


def _write(
    plan: Plan,
    suite_name: str,
    seed: int,
    key: str,
    outcome: Outcome,
    context: Context,
    command: str,
    measured: dict[str, Any],
) -> None:
    """Samples first, then the record: a record that exists is whole."""
    datasets, folder = context.datasets, context.folder
    name = record_name(suite_name, outcome.method, seed)
    digest = write_samples(folder / "samples" / f"{name}.parquet", outcome.predictions, datasets)
    metrics, matrices, cards = {}, {}, {}
    for prediction in outcome.predictions:
        dataset = datasets[prediction.dataset]
        test = dataset.splits["test"].labels
        answers = candidates(dataset.spec, dataset.splits["train"].labels)
        if dataset.spec.multi_label:
            cards[prediction.dataset] = records.candidates_card(answers, test)
        data = scored(dataset.spec, test, prediction, answers)
        metrics[prediction.dataset] = plain(measure(data))
        matrices[prediction.dataset] = confusion(data)
    Record(
        suite=suite_name,
        method=outcome.method,
        seed=seed,
        key=key,
        command=command,
        recipe=asdict(plan.recipe),
        data={name: _data_card(dataset, plan) for name, dataset in datasets.items()},
        candidates=cards,
        prompts=_prompts(datasets),
        prompts_sha256=_prompts_sha256(datasets),
        samples_sha256=digest,
        metrics=metrics,
        confusion=matrices,
        extras=outcome.extras,
        versions=records.versions(),
        commit=records.commit(),
        hardware=records.hardware(),
        measured=measured,
    ).write(folder)


def plain(metrics: dict[str, Any]) -> dict[str, float | None]:
    """Point values rounded to 12 digits (far below any meaning), None for NaN."""
    values = {name: float(value[0]) for name, value in metrics.items()}
    return {name: None if v != v else round(v, 12) for name, v in values.items()}


def _data_card(dataset: Dataset, plan: Plan) -> dict[str, Any]:
    return {
        "source": dataset.source,
        "size": dataset.size,
        "md5": dataset.md5,
        "md5_ok": dataset.md5_ok,
        "license": dataset.spec.license,
        "spec": asdict(dataset.spec),
        "images": {part: len(split) for part, split in dataset.splits.items()},
        "limit": plan.limit,
    }


def specs_of(record: Record) -> dict[str, DatasetSpec]:
    """The descriptions of a record's datasets, as they were when it was made."""
    specs = {}
    for name, card in record.data.items():
        fields: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in card["spec"].items()
        }
        specs[name] = DatasetSpec(**fields)
    return specs


def plan_of(
    record: Record, *, roots: Sequence[Path], allow_unverified: Sequence[str], folder: Path
) -> Plan:
    """The plan that a record was made by, for loading its data again."""
    recipe = Recipe.of_json(record.recipe)
    cards = record.data.values()
    return Plan(
        recipe=recipe,
        source="phantom" if any(c["source"] == "phantom" for c in cards) else "medmnist",
        names=tuple(record.data),
        roots=tuple(roots),
        allow_unverified=tuple(allow_unverified),
        limit=next(iter(cards))["limit"],
        out=folder.parent,
    )
