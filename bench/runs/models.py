"""Trained models on disk, found again by the key of what made them and never by name alone.

A damaged model, or one with a damaged note, is set aside and trained again; nothing is deleted.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from vitask.card import CARD, EARLIER, NOTE, TSM_FILES
from vitask.errors import Damaged, boundary
from vitask.files import digests, part_of, remove, told_apart
from vitask.memory import Held
from vitask.sealed import SEAL, Fields, check_files, write_sealed

Model = TypeVar("Model")
DAMAGED = "damaged"  # the folder of models that were set aside
REMEDY = "the model is trained again where it is needed"
FIELDS = {"key": str, "seconds": float, "peak_mib": float}  # of a note, and `log` of any kind
FULL = "free space there, or give another --out"


def kept(
    place: Path,
    name: str,
    key: str,
    suite: str,
    prepare: Callable[[], Callable[[], tuple[Model, Any]]],
    save: Callable[[Model, Path], None],
    load: Callable[[Path], Model],
    *,
    say: Callable[[str], None] = print,
) -> tuple[Model, dict[str, Any]]:
    """The model of this key under `place`, whatever its name, and the note on its training.

    A model that is not found is trained and saved as `name`; an older one of that name keeps its
    files under its name and key. `prepare` computes what models share and returns the function
    that trains; only that function's seconds count. The saved model is loaded either way, so what
    is scored is what is on disk.

    The note holds key, suite, log, seconds and peak_mib (beyond the memory held before).
    `found` says whether the model existed.

    say: is told of every damaged model that is set aside
    """
    for folder, note in _whole(place, say):
        if note["key"] == key:
            try:
                check_files(folder, note.pop("files"), REMEDY)
                return load(folder), note | {"found": True}
            except Damaged as error:
                _set_aside(folder, error, say)
    train = prepare()
    start = time.perf_counter()
    with Held() as held:
        model, log = train()
    seconds = round(time.perf_counter() - start, 2)
    folder = place / name
    part = part_of(folder)
    with boundary(place, FULL):
        place.mkdir(parents=True, exist_ok=True)
        remove(part)
    save(model, part)
    made = {"key": key, "suite": suite, "log": log}
    made |= {"seconds": seconds, "peak_mib": round(held.mib)}
    with boundary(place, FULL):
        write_sealed(part / NOTE, made | {"files": digests(part)})
        if os.path.lexists(folder):
            _make_room(folder, say)
        os.replace(part, folder)
    note = _note(folder)
    del note["files"]
    return load(folder), note | {"found": False}


def models_of(place: Path, suite: str) -> list[Path]:
    """What was saved for a suite: folders of models, or their files where there are others too.

    Of a model elsewhere the link alone; nothing if `place` itself is a link.
    """
    found: list[Path] = []
    for folder in () if place.is_symlink() else _folders(place):
        try:
            note = _note(folder)
        except Damaged:
            continue
        if note["suite"] == suite and folder.is_symlink():
            found.append(folder)
        elif note["suite"] == suite:
            ours, others = told_apart(folder, {*(note["files"] or EARLIER), NOTE})
            found += ours if others else [folder]
    return found


def _folders(place: Path) -> list[Path]:
    """Every folder with a note."""
    found = (path.parent for path in place.glob(f"*/{NOTE}"))
    return sorted(folder for folder in found if not folder.name.startswith("."))


def _whole(place: Path, say: Callable[[str], None]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every model whose note is whole, and its note; other models are set aside.

    A folder that a user put there, with a note of another kind, stays where it is.
    """
    for folder in _folders(place):
        try:
            note = _note(folder)
        except Damaged as error:
            if _ours(folder):
                _set_aside(folder, error, say)
        else:
            yield folder, note


def _ours(folder: Path) -> bool:
    """Whether a folder whose note is not whole is a model of a run.

    It has files of a model and a note with some of our fields, or with none that can be read; or
    its note has the fields that only ours have.
    """
    try:
        found = json.loads((folder / NOTE).read_text("utf-8"))
    except Exception:  # cut, not UTF-8, nested too deeply, not readable
        found = None
    model = any((folder / name).is_file() for name in (CARD, TSM_FILES[0]))
    if not found or not isinstance(found, dict):
        return model
    return {"key", "peak_mib"} <= found.keys() or (
        model and not found.keys().isdisjoint((*FIELDS, "log"))
    )


def _note(folder: Path) -> dict[str, Any]:
    """A model's note; Damaged names the file and the field.

    files: empty, and suite None, in notes of earlier versions
    """
    fields = Fields(folder / NOTE, REMEDY)
    files: dict[str, str] = {}
    if "files" in fields.values or SEAL in fields.values:
        fields.check_seal()
        files = fields.digests("files")
    for name, kind in FIELDS.items():
        fields.of(name, kind)
    if "log" not in fields.values:
        raise fields.damaged("it lacks the field 'log'")
    fields.values.pop(SEAL, None)
    return {"suite": None} | fields.values | {"files": files}


def _make_room(folder: Path, say: Callable[[str], None]) -> None:
    """Give what has a model's name another one: an older model's has its key."""
    try:
        older = _note(folder)["key"]
    except Damaged as error:
        _set_aside(folder, error, say)
    else:
        os.replace(folder, _free(folder.with_name(f"{folder.name}-{older[:8]}")))


def _set_aside(folder: Path, error: Damaged, say: Callable[[str], None]) -> None:
    """Move a folder to the damaged ones and say so."""
    with boundary(folder, "make the folder beside it writable"):
        (folder.parent / DAMAGED).mkdir(exist_ok=True)
        target = _free(folder.parent / DAMAGED / folder.name)
        os.replace(folder, target)
    say(f"{error}; nothing was deleted, it is now {target}")


def _free(path: Path) -> Path:
    """The path, with a number if it is taken."""
    number, free = 1, path
    while os.path.lexists(free):
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free
