"""Trained models on disk, found again by the key of what made them and never by name alone."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from vitask.files import part_of, remove, write_text
from vitask.memory import Held

Model = TypeVar("Model")
NOTE = "training.json"  # in a model's folder


def kept(
    place: Path,
    name: str,
    key: str,
    suite: str,
    prepare: Callable[[], Callable[[], tuple[Model, Any]]],
    save: Callable[[Model, Path], None],
    load: Callable[[Path], Model],
) -> tuple[Model, dict[str, Any]]:
    """The model of this key under `place`, whatever its name, and the note on its training.

    A model that is not found is trained and saved as `name`; an older one of that name keeps its
    files under its name and key. `prepare` computes what models share and returns the function
    that trains; only that function's seconds count. The saved model is loaded either way, so what
    is scored is what is on disk.

    The note holds key, suite, log, seconds and peak_mib (beyond the memory held before).
    `found` says whether the model existed.
    """
    for folder, note in notes(place):
        if note["key"] == key:
            return load(folder), note | {"found": True}
    train = prepare()
    start = time.perf_counter()
    with Held() as held:
        model, log = train()
    seconds = round(time.perf_counter() - start, 2)
    folder = place / name
    part = part_of(folder)
    place.mkdir(parents=True, exist_ok=True)
    remove(part)
    save(model, part)
    note = {"key": key, "suite": suite, "log": log}
    note |= {"seconds": seconds, "peak_mib": round(held.mib)}
    write_text(part / NOTE, json.dumps(note, indent=1) + "\n")
    if folder.exists():
        older = json.loads((folder / NOTE).read_text("utf-8"))["key"] if noted(folder) else "old"
        os.replace(folder, place / f"{name}-{older[:8]}")
    os.replace(part, folder)
    return load(folder), json.loads(json.dumps(note)) | {"found": False}


def noted(folder: Path) -> bool:
    return (folder / NOTE).is_file()


def notes(place: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Every whole model under a folder, and its note."""
    found = sorted(path for path in place.glob(f"*/{NOTE}") if not path.parent.name.startswith("."))
    return [(path.parent, json.loads(path.read_text("utf-8"))) for path in found]


def models_of(place: Path, suite: str) -> list[Path]:
    """The models that were trained for a suite."""
    return [folder for folder, note in notes(place) if note.get("suite") == suite]
