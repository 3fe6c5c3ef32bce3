"""A run's folder, and the sets of records in it: none is lost, none is mixed with another.

A set is a suite's records with equal ingredients but seed and method. It is whole when every
method is present for each of its seeds.

    run.json, records/, samples/   the newest whole set of each suite: what tables show
    unfinished/<key>/              a set, or seeds of it, while it is computed
    superseded/<key>/              older whole sets

All three have the same form. `run.json` names, for each suite, its set's key and ingredients, the
command, and its records. A command that is killed at any moment goes on when it is given again.
"""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from bench.runs.files import file_sha256, write_text
from bench.runs.keys import changes
from bench.runs.models import models_of
from bench.runs.records import Record, record_name, record_path, samples_path

MANIFEST = "run.json"
UNFINISHED, SUPERSEDED = "unfinished", "superseded"
OFFICIAL = "official"
# Names that a killed process leaves; nothing else that is hidden is ours.
LEFT_BEHIND = re.compile(r"\.+.+\.part(\..*)?|\.features-\w+")


@dataclass
class Entry:
    """A suite in run.json. Older runs name no ingredients."""

    key: str
    command: str
    records: list[str]
    ingredients: dict[str, Any] = field(default_factory=dict)
    whole: bool = True


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time writes a run's folder; the lock ends with the process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)  # the folder itself: no lock file stays behind
    except OSError as error:
        raise ValueError(
            f"{folder} cannot be written ({error.strerror}); give another --out"
        ) from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another run is writing {folder}; wait for it, or give another --out"
            ) from None
        _sweep(folder)
        for place in sorted((folder / UNFINISHED).glob("*")):
            for suite, entry in read_manifest(place).items():
                if entry.whole:  # killed while it was moved to its place
                    promote(folder, suite, entry)
        yield
    finally:
        os.close(descriptor)


def _sweep(folder: Path) -> None:
    """Remove the files that a killed process was writing."""
    for place in (folder, *(p for p in folder.rglob("*") if p.is_dir() and not p.is_symlink())):
        for path in place.glob(".*"):
            if LEFT_BEHIND.fullmatch(path.name) and not path.is_symlink():
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def read_manifest(folder: Path) -> dict[str, Entry]:
    """Suite -> its entry; empty without a run. ValueError for a damaged file."""
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
        known = set(Entry.__dataclass_fields__)
        return {
            suite: Entry(**{name: value for name, value in entry.items() if name in known})
            for suite, entry in found.items()
        }
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a run's manifest ({error}); put it back from a copy, or give another "
            "--out: it names the records that belong to the run"
        ) from None


def write_manifest(folder: Path, manifest: Mapping[str, Entry]) -> None:
    text = json.dumps({suite: asdict(entry) for suite, entry in manifest.items()}, indent=1)
    write_text(folder / MANIFEST, text + "\n")


def find(folder: Path, set_key: str, record: Path, key: str) -> Path | None:
    """The part of a run's folder that holds a whole record of this key, with its samples."""
    for place in (folder, folder / UNFINISHED / set_key, folder / SUPERSEDED / set_key):
        path = place / record
        if not path.is_file():
            continue
        found = Record.read(path)
        samples = samples_path(place, found.name)
        if found.key == key and samples.is_file() and file_sha256(samples) == found.samples_sha256:
            return place
    return None


def begin(folder: Path, suite: str, entry: Entry) -> Path:
    """The place where the records of a set are written until it is whole."""
    place = folder / UNFINISHED / entry.key
    write_manifest(place, {suite: entry})
    return place


def superseding(folder: Path, suite: str, entry: Entry) -> list[str]:
    """How the ingredients differ from those of the set that is shown now; empty if none is."""
    shown = read_manifest(folder).get(suite)
    if shown is None or shown.key == entry.key:
        return []
    if not shown.ingredients:
        return ["the older records do not name their ingredients"]
    return changes(shown.ingredients, entry.ingredients)


def promote(folder: Path, suite: str, entry: Entry) -> None:
    """Show a whole set: its files move to the run's folder, those of another set out of it.

    Every step can be repeated, so a killed move goes on.
    """
    staged = folder / UNFINISHED / entry.key
    entry = Entry(**(asdict(entry) | {"whole": True}))
    write_manifest(staged, {suite: entry})
    manifest = read_manifest(folder)
    shown = manifest.get(suite)
    if shown is not None and shown.key != entry.key:
        older = folder / SUPERSEDED / shown.key
        write_manifest(older, read_manifest(older) | {suite: shown})
        for name in shown.records:
            if not record_path(older, name).exists():
                _move(folder, older, name)
        for ending in ("csv", "md"):
            _replace(folder / f"{suite}.{ending}", older / f"{suite}.{ending}")
    elif shown is not None:  # seeds are added
        entry.records = list(dict.fromkeys([*shown.records, *entry.records]))
    again = folder / SUPERSEDED / entry.key
    for place in (again, staged):
        for name in read_manifest(place)[suite].records if place.exists() else ():
            _move(place, folder, name)
            if name not in entry.records:
                entry.records.append(name)
    entry.records.sort(key=lambda name: int(name.rpartition("seed")[2]))  # stable: methods' order
    write_manifest(folder, manifest | {suite: entry})
    for place in (again, staged):
        shutil.rmtree(place, ignore_errors=True)
    for parent in (folder / SUPERSEDED, folder / UNFINISHED):
        if parent.is_dir() and not any(parent.iterdir()):
            parent.rmdir()


def _move(source: Path, target: Path, name: str) -> None:
    """Samples first: a record that is in its place is whole."""
    _replace(samples_path(source, name), samples_path(target, name))
    _replace(record_path(source, name), record_path(target, name))


def _replace(source: Path, target: Path) -> None:
    if source.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(source, target)


def read_records(folder: Path, suite: str) -> list[Record]:
    """The records of the set that is shown, by seed and method; all must be present."""
    entry = read_manifest(folder).get(suite)
    if entry is None:
        raise ValueError(f"no run of suite {suite!r} in {folder}; run it first")
    paths = [record_path(folder, name) for name in entry.records]
    missing = [path.stem for path in paths if not path.is_file()]
    if missing:
        raise ValueError(
            f"{folder} lacks {len(missing)} of {len(paths)} records of suite {suite!r} "
            f"({', '.join(missing[:3])}, ...); the same command computes them again"
        )
    return [Record.read(path) for path in paths]


def what_fresh_deletes(folder: Path, suites: Sequence[str]) -> list[Path]:
    """Everything that runs of these suites left in a folder: records, samples, models."""
    found: list[Path] = []
    for suite in suites:
        places = [folder, *folder.glob(f"{UNFINISHED}/*"), *folder.glob(f"{SUPERSEDED}/*")]
        for place in places:
            for name in ((entry := read_manifest(place).get(suite)) and entry.records) or ():
                found += [record_path(place, name), samples_path(place, name)]
                found += place.glob(f"{OFFICIAL}/*@{name}.csv")
        found += [folder / f"{suite}.csv", folder / f"{suite}.md"]
        found += models_of(folder / "checkpoints", suite)
    return [path for path in dict.fromkeys(found) if path.exists()]


def delete(folder: Path, suites: Sequence[str], paths: Sequence[Path]) -> None:
    """Delete what `what_fresh_deletes` named, manifests last."""
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for place in (folder, *folder.glob(f"{UNFINISHED}/*"), *folder.glob(f"{SUPERSEDED}/*")):
        manifest = read_manifest(place)
        left = {suite: entry for suite, entry in manifest.items() if suite not in suites}
        if manifest and not left and place != folder:
            shutil.rmtree(place)
        elif left != manifest:
            write_manifest(place, left)


def collect(source: Path, target: Path, note: Callable[[str], None]) -> list[str]:
    """Copy the sets that a run's folder shows into another folder; returns their suites.

    Every file is checked against its digest before anything is copied.
    """
    manifest = read_manifest(source)
    if not manifest:
        raise ValueError(f"{source} holds no run (no {MANIFEST}); expected OUT/<recipe>-<data>")
    records = {suite: read_records(source, suite) for suite in manifest}
    for record in chain.from_iterable(records.values()):
        if damage := record.damage(source):
            raise ValueError(f"{source}: {record.name}: {damage}; nothing was copied")
    for suite, entry in manifest.items():
        if changed := superseding(target, suite, entry):
            note(f"{suite}: the set shown so far is superseded: {'; '.join(changed[:5])}")
        place = target / UNFINISHED / entry.key
        for record in records[suite]:
            known = record_path(target, record.name)
            if known.is_file() and Record.read(known).key == record.key:
                continue
            for path in (samples_path, record_path):
                copy = path(place, record.name)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path(source, record.name), copy)
        promote(target, suite, entry)
    return list(manifest)


def strays(folder: Path) -> list[str]:
    """Records and samples that no manifest names, and a folder without any run."""
    manifest = read_manifest(folder)
    if not manifest:
        return [f"{MANIFEST} names no run; run a suite into this folder first"]
    owned = {name for entry in manifest.values() for name in entry.records}
    files = [*(folder / "records").glob("*.json"), *(folder / "samples").glob("*.parquet")]
    return [
        f"{path.parent.name}/{path.name} belongs to no run"
        for path in sorted(files)
        if path.stem not in owned
    ]


def names_of(suite: str, methods: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """Names of a set's records, by seed and method."""
    return [record_name(suite, method, seed) for seed in seeds for method in methods]
