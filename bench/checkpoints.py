"""Trained models on disk, found again by what made them and never by their names alone."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from bench.record import write_text
from bench.speed import Held

Model = TypeVar("Model")


def kept(
    folder: Path,
    key: str,
    suite: str,
    prepare: Callable[[], Callable[[], tuple[Model, Any]]],
    save: Callable[[Model, Path], None],
    load: Callable[[Path], Model],
) -> tuple[Model, dict[str, Any]]:
    """The model of this content key, whatever its name, and its note.

    The note holds log and seconds of its training, and peak_mib, what that held beyond what was
    there before.

    One that is not there is trained and saved. `prepare` gives the function that trains it, whose
    seconds are counted; what models share is computed before. The note is written last, so a
    checkpoint cut off in the middle does not count. The loaded model is used either way: what is
    scored is what is on disk. In the note, `found` says whether it was there and `suite` for
    which suite it was made.
    """
    for path in sorted(folder.parent.glob("*.json")):  # perhaps under another suite's name
        note, there = json.loads(path.read_text()), path.with_suffix("")
        if note["key"] == key and there.is_dir():
            return load(there), note | {"found": True}
    path = folder.with_name(f"{folder.name}.json")
    discard(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    train = prepare()
    start = time.perf_counter()
    with Held() as held:
        model, log = train()
    seconds = round(time.perf_counter() - start, 2)
    save(model, folder)
    note = {"key": key, "suite": suite, "log": log}
    note |= {"seconds": seconds, "peak_mib": round(held.mib)}
    write_text(path, json.dumps(note, indent=1) + "\n")
    return load(folder), json.loads(path.read_text()) | {"found": False}


def discard(folder: Path) -> None:
    """Remove a model; its note first, without which it does not count."""
    folder.with_name(f"{folder.name}.json").unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(folder)


def discard_of(place: Path, suite: str) -> None:
    """Remove the models that were made for a suite."""
    for path in place.glob("*.json"):
        if json.loads(path.read_text()).get("suite") == suite:
            discard(path.with_suffix(""))
