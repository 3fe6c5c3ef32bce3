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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.runs.ingredients import record_key
from bench.runs.keys import changes
from bench.runs.models import models_of
from bench.runs.records import REMEDY, Record, record_name, record_path, samples_path
from bench.suite import suite as suite_of
from vitask.errors import InputError, reason
from vitask.files import linked, remove, sweep, write_bytes, write_text

MANIFEST = "run.json"
UNFINISHED, SUPERSEDED = "unfinished", "superseded"
OFFICIAL = "official"
RENDERED = ("csv", "md", "svg")


@dataclass
class Entry:
    """A suite in run.json. Older runs name no ingredients.

    ready: in unfinished/, the records of whole seeds that are being moved to their place
    """

    key: str
    command: str
    records: list[str]
    ingredients: dict[str, Any] = field(default_factory=dict)
    ready: list[str] = field(default_factory=list)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time writes a run's folder; the lock ends with the process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)  # the folder itself: no lock file stays behind
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written ({error.strerror}); give another --out"
        ) from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"another run is writing {folder}; wait for it, or give another --out"
            ) from None
        for place in (folder, *_places(folder)):
            for name in ("", "records", "samples", "checkpoints", OFFICIAL):
                if not linked(place / name, folder):
                    sweep(place / name)
        for place in _places(folder, UNFINISHED):
            for suite, entry in read_manifest(place).items():
                if entry.ready:  # killed while they were moved
                    promote(folder, suite, replace(entry, records=entry.ready))
        yield
    finally:
        os.close(descriptor)


def _places(folder: Path, *kinds: str) -> list[Path]:
    """The folders of unfinished and superseded sets; links are not followed."""
    found = (p for kind in kinds or (UNFINISHED, SUPERSEDED) for p in folder.glob(f"{kind}/*"))
    return sorted(path for path in found if path.is_dir() and not linked(path, folder))


def read_manifest(folder: Path) -> dict[str, Entry]:
    """Suite -> its entry; empty without a run. ValueError for a damaged file."""
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
        return {suite: _entry(suite, entry) for suite, entry in found.items()}
    except Exception as error:  # not JSON, not UTF-8, other fields, nested too deeply
        raise InputError(
            f"{path} is not a run's manifest ({reason(error)}); put it back from a copy, or give "
            "another --out: it names the records that belong to the run"
        ) from None


def _entry(suite: str, given: Mapping[str, Any]) -> Entry:
    entry = Entry(**{name: given[name] for name in Entry.__dataclass_fields__ if name in given})
    named = [*entry.records, *entry.ready]
    if not (isinstance(entry.key, str) and isinstance(entry.command, str) and entry.records):
        raise InputError(f"{suite}: expected a key, a command and the names of records")
    if not (isinstance(entry.ingredients, dict) and all(_is_name(suite, one) for one in named)):
        raise InputError(f"{suite}: expected names such as {suite}-METHOD-seed0")
    return entry


def _is_name(suite: str, name: object) -> bool:
    """Whether a record of the suite can have this name."""
    return isinstance(name, str) and bool(re.fullmatch(rf"{re.escape(suite)}-.+-seed\d+", name))


def write_manifest(folder: Path, manifest: Mapping[str, Entry]) -> None:
    text = json.dumps({suite: asdict(entry) for suite, entry in manifest.items()}, indent=1)
    write_text(folder / MANIFEST, text + "\n")


def find(folder: Path, set_key: str, name: str, key: str) -> Path | None:
    """The part of a run's folder that holds a whole record of this key, with its samples."""
    for place in (folder, folder / UNFINISHED / set_key, folder / SUPERSEDED / set_key):
        try:
            record = Record.read(record_path(place, name))
        except (OSError, ValueError):  # missing or damaged
            continue
        if record.key == key and record.damage(place) is None:
            return place
    return None


def begin(folder: Path, suite: str, entry: Entry) -> Path:
    """The place where the records of a set are written until their seeds are whole."""
    place = folder / UNFINISHED / entry.key
    there = read_manifest(place).get(suite)
    names = dict.fromkeys([*(there.records if there else ()), *entry.records])
    write_manifest(place, {suite: replace(entry, records=list(names), ready=[])})
    return place


def check_foreign(folder: Path, suite: str, entry: Entry) -> None:
    """ValueError if a record that run.json does not name would be replaced."""
    shown = read_manifest(folder).get(suite)
    for name in {*entry.records} - {*(shown.records if shown else ())}:
        path = record_path(folder, name)
        if path.is_file() and not _is_of(entry, folder, name):
            raise InputError(
                f"{path} belongs to no run in {folder / MANIFEST} and would be replaced; put the "
                "manifest back from a copy, move the record away, or give another --out"
            )


def superseding(folder: Path, suite: str, entry: Entry) -> list[str]:
    """How the ingredients differ from those of the set that is shown now; empty if none is."""
    shown = read_manifest(folder).get(suite)
    if shown is None or shown.key == entry.key:
        return []
    if not shown.ingredients:
        return ["the older records do not name their ingredients"]
    return changes(shown.ingredients, entry.ingredients)


def promote(folder: Path, suite: str, entry: Entry) -> None:
    """Show the records of whole seeds: they move to the run's folder, another set out of it.

    Every step can be repeated, so a killed move goes on. Other seeds of the set stay unfinished.
    """
    staged, again = folder / UNFINISHED / entry.key, folder / SUPERSEDED / entry.key
    unfinished = read_manifest(begin(folder, suite, entry))[suite]
    write_manifest(staged, {suite: replace(unfinished, ready=entry.records)})
    manifest = read_manifest(folder)
    shown, names = manifest.get(suite), dict.fromkeys(entry.records)
    if shown is not None and shown.key != entry.key:
        older = folder / SUPERSEDED / shown.key
        write_manifest(older, read_manifest(older) | {suite: shown})
        for name in shown.records:
            if not record_path(older, name).exists() and _is_of(shown, folder, name):
                _move(folder, older, name)
        for ending in RENDERED:
            _replace(folder / f"{suite}.{ending}", older / f"{suite}.{ending}")
    elif shown is not None:  # seeds are added
        names = dict.fromkeys([*shown.records, *names])
    if (was := read_manifest(again).get(suite)) is not None:
        names |= dict.fromkeys(was.records)
    for name in names:
        for place in (again, staged):
            if record_path(place, name).is_file():
                _move(place, folder, name)
    ordered = sorted(names, key=lambda name: int(name.rpartition("seed")[2]))  # then as methods
    write_manifest(folder, manifest | {suite: replace(entry, records=ordered, ready=[])})
    rest = [name for name in unfinished.records if record_path(staged, name).is_file()]
    if rest:
        write_manifest(staged, {suite: replace(unfinished, records=rest, ready=[])})
    for place in (again, *(() if rest else (staged,))):
        _discard(place)


def _is_of(entry: Entry, folder: Path, name: str) -> bool:
    """Whether the record of this name is of the entry's set; older sets cannot say."""
    if not entry.ingredients or not record_path(folder, name).is_file():
        return True
    record = Record.read(record_path(folder, name))
    return record.key == record_key(entry.key, record.method, record.seed)


def _discard(place: Path) -> None:
    """Remove our files from a set's folder, then every folder that is empty."""
    ours = []
    for suite, entry in read_manifest(place).items():
        ours += [
            path(place, name) for name in entry.records for path in (record_path, samples_path)
        ]
        ours += [place / f"{suite}.{ending}" for ending in RENDERED]
    for path in (*ours, place / MANIFEST):
        if not linked(path.parent, place.parent.parent):
            path.unlink(missing_ok=True)
    for folder in (place / "records", place / "samples", place, place.parent):
        if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
            folder.rmdir()


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
        raise InputError(f"no run of suite {suite!r} in {folder}; run it first")
    paths = [record_path(folder, name) for name in entry.records]
    missing = [path.stem for path in paths if not path.is_file()]
    if missing:
        raise InputError(
            f"{folder} lacks {len(missing)} of {len(paths)} records of suite {suite!r} "
            f"({', '.join(missing[:3])}, ...); the same command computes them again"
        )
    records = [Record.read(path) for path in paths]
    for path, record in zip(paths, records, strict=True):
        damage = record.damage(folder) if record.name == path.stem else "it is another record"
        if damage or record.suite != suite:
            raise InputError(f"{path}: {damage or 'it is of another suite'}; {REMEDY}")
    by_seed = {r.seed: {one.method for one in records if one.seed == r.seed} for r in records}
    if len({frozenset(methods) for methods in by_seed.values()}) > 1:
        raise InputError(
            f"{folder / MANIFEST} names other methods of suite {suite!r} for some seeds than for "
            "others; put it back from a copy, or run the suite again"
        )
    return records


def what_fresh_deletes(folder: Path, suites: Sequence[str]) -> list[Path]:
    """Everything that runs of these suites left in a folder: records, samples, models."""
    found: list[Path] = []
    shown = read_manifest(folder)
    for suite in suites:
        found += [place for place in _places(folder) if set(read_manifest(place)) == {suite}]
        methods = "|".join(re.escape(method.name) for method in suite_of(suite).methods)
        pattern = re.compile(rf"{re.escape(suite)}-({methods})-seed\d+")
        known = set(shown[suite].records) if suite in shown else set()
        for files in ("records/*.json", "samples/*.parquet", f"{OFFICIAL}/*@*.csv"):
            for path in sorted(folder.glob(files)):
                name = path.stem.rpartition("@")[2] if files.startswith(OFFICIAL) else path.stem
                if name in known or pattern.fullmatch(name):
                    found.append(path)
        found += [folder / f"{suite}.{ending}" for ending in RENDERED]
        found += models_of(folder / "checkpoints", suite)
    there = (path for path in dict.fromkeys(found) if os.path.lexists(path))
    return [path for path in there if not linked(path.parent, folder)]


def delete(folder: Path, suites: Sequence[str], paths: Sequence[Path]) -> None:
    """Delete what `what_fresh_deletes` named, and the suites from the manifest."""
    for path in paths:
        is_set = not path.is_symlink() and (path / MANIFEST).is_file()
        _discard(path) if is_set else remove(path)
    manifest = read_manifest(folder)
    write_manifest(folder, {name: entry for name, entry in manifest.items() if name not in suites})


def collect(source: Path, target: Path, note: Callable[[str], None]) -> list[str]:
    """Copy the sets that a run's folder shows into another folder; returns their suites.

    Every file is checked against its digest before anything is copied. Of two sets, the one with
    the newest record is shown.
    """
    manifest, records = read_manifest(source), read_whole(source)
    for suite, entry in manifest.items():
        shown = read_manifest(target).get(suite)
        changed = superseding(target, suite, entry)
        older = (
            bool(changed) and shown is not None and _newest(target, shown) > _newest(source, entry)
        )
        if older:
            place = target / SUPERSEDED / entry.key
            write_manifest(place, {suite: entry})
        else:
            place = begin(target, suite, entry)
        for record in records[suite]:
            if find(target, entry.key, record.name, record.key) is None:
                for path in (samples_path, record_path):
                    copy, original = path(place, record.name), path(source, record.name)
                    write_bytes(copy, original.read_bytes())
                    os.utime(copy, (time := original.stat().st_mtime, time))
        if changed:
            which = "collected set is older and" if older else "set shown so far"
            note(f"{suite}: the {which} is superseded: {'; '.join(changed[:5])}")
        if not older:
            promote(target, suite, entry)
    return list(manifest)


def read_whole(folder: Path) -> dict[str, list[Record]]:
    """The records of every set that is shown; InputError for one that differs from its digest."""
    records = {suite: read_records(folder, suite) for suite in read_manifest(folder)}
    if not records:
        raise InputError(f"{folder} holds no run (no {MANIFEST}); expected OUT/<recipe>-<data>")
    return records


def _newest(folder: Path, entry: Entry) -> float:
    paths = [record_path(folder, name) for name in entry.records]
    return max((path.stat().st_mtime for path in paths if path.is_file()), default=0.0)


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
