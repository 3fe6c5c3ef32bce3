"""Trained models on disk, found again by what made them and never by their names alone."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from bench.record import write_text

Model = TypeVar("Model")


def kept(
    folder: Path,
    key: str,
    make: Callable[[], tuple[Model, Any]],
    save: Callable[[Model, Path], None],
    load: Callable[[Path], Model],
) -> tuple[Model, Any, bool]:
    """The model of this content key with its log, and whether it was found.

    Otherwise it is made and saved; the note with the key is written last, so a checkpoint cut off
    in the middle does not count. The loaded model is used either way: what is scored is what is
    on disk.
    """
    note = folder.with_name(f"{folder.name}.json")
    found = False
    if note.is_file() and folder.is_dir():
        written = json.loads(note.read_text())
        found = written["key"] == key
    if not found:
        note.unlink(missing_ok=True)
        if folder.exists():
            shutil.rmtree(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        model, log = make()
        save(model, folder)
        write_text(note, json.dumps({"key": key, "log": log}, indent=1) + "\n")
    return load(folder), json.loads(note.read_text())["log"], found
