"""Custom datasets: a `.npz` in MedMNIST's key layout and a JSON card that describes it.

`<name>.json` holds name, modality, task, label, n_channels, n_samples, license and source, as
medmnist's INFO does. `<name>.npz` beside it has the images at 28 pixels, or `<name>_224.npz` at
224. Optional keys of the archive, `train_groups`, `val_groups`, `test_groups`, say which images
belong together (one patient, one lesion); their names stay in the archive. Other fields of the
card are notes.

A name has letters from a to z, digits, - and _, and starts with a letter or a digit. It differs
from every other name in more than case. A hidden file, whose name starts with a period, is not a
card.
"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vitask.data import medmnist
from vitask.data.archive import group_pseudonyms, load_file
from vitask.data.spec import SPLITS, TASKS, Dataset, DatasetSpec
from vitask.errors import InputError
from vitask.names import canonical

FIELDS = {
    "name": str,
    "modality": str,
    "task": str,
    "label": dict,
    "n_channels": int,
    "n_samples": dict,
    "license": str,
    "source": str,
}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")  # a name is part of paths, ids and tables
RULE = (
    "a name has letters from a to z, digits, - and _, starts with a letter or a digit, and has at "
    "most 100 characters"
)
RESERVED = {  # names that stand for something else already
    "average": "the mean over datasets in tables",
    "mean": "the mean over datasets in validation curves",
    "loss": "the training loss in validation curves",
    **dict.fromkeys(medmnist.SHARED_HEADS, "the TSM's head that several official sets share"),
}


def fault(name: str, others: Iterable[str] = ()) -> str | None:
    """Why a custom dataset cannot have this name beside others; None if it can."""
    if not NAME.fullmatch(name):
        return f"{RULE}: rename its files and the card's field"
    form = canonical(name)
    if form in RESERVED:
        return f"{form!r} is taken by {RESERVED[form]}: rename its files and the card's field"
    for other in (*medmnist.NAMES, *others):
        if other != name and canonical(other) == form:
            return f"it differs from {other!r} only in case: rename one of the two"
    return None


def names(roots: Sequence[Path]) -> tuple[str, ...]:
    """Names in the roots that have a card and an archive, in order of the roots.

    Those that `faults` names are left out.
    """
    return tuple(path.stem for path, why in _judged(roots) if why is None)


def faults(roots: Sequence[Path]) -> list[str]:
    """A line for each card in the roots whose name cannot be used: its file, why, what to do."""
    lines = [f"{path} cannot be used: {why}" for path, why in _judged(roots) if why is not None]
    return [line.encode(errors="backslashreplace").decode() for line in lines]


def _judged(roots: Sequence[Path]) -> list[tuple[Path, str | None]]:
    """Every card with an archive, and what is wrong with its name."""
    cards, alike = _cards(roots), dict[str, list[str]]()
    for name in cards:
        alike.setdefault(canonical(name), []).append(name)
    return [(path, fault(name, alike[canonical(name)])) for name, path in cards.items()]


def begun(name: str, roots: Sequence[Path]) -> bool:
    """Whether a root has the card or the archive; `find` says which of the two is missing."""
    return bool(NAME.fullmatch(name)) and any(
        Path(root, f"{name}{ending}").is_file() for root in roots for ending in (".json", ".npz")
    )


def find(name: str, roots: Sequence[Path]) -> Path:
    """The card in the first root with a card or an archive; ValueError without a card."""
    if why := fault(name, _cards(roots)):
        raise InputError(f"dataset {name!r} cannot be used: {why}")
    for root in roots:
        card, archive = Path(root, f"{name}.json"), Path(root, f"{name}.npz")
        if card.is_file():
            return card
        if archive.is_file():
            raise InputError(
                f"{archive} has no card; write {card} with the fields {', '.join(FIELDS)}"
            )
    searched = ", ".join(map(str, roots)) or "no data root"
    raise InputError(f"{name}.json is missing; looked in {searched}: give the folder that has it")


def read_card(path: Path) -> DatasetSpec:
    """The description in a card; a ValueError names the field, its value and what is expected."""
    try:
        return _read(path)
    except RecursionError as error:
        raise InputError(f"{path}: not a JSON card (nested too deeply)") from error


def _read(path: Path) -> DatasetSpec:
    try:
        card = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except ValueError as error:  # not JSON, or not UTF-8
        raise InputError(f"{path}: not a JSON card ({error}); expected an object") from error
    if not isinstance(card, dict):
        raise InputError(f"{path}: holds a {type(card).__name__}; expected a JSON object")
    if missing := [field for field in FIELDS if field not in card]:
        raise InputError(f"{path}: lacks {missing}; a card has the fields {', '.join(FIELDS)}")
    for field, kind in FIELDS.items():
        if not isinstance(card[field], kind) or isinstance(card[field], bool):
            raise InputError(
                f"{path}: {field} is {card[field]!r}; expected a JSON "
                f"{ {str: 'text', int: 'integer', dict: 'object'}[kind] }"
            )
    if card["name"] != path.stem:
        raise InputError(
            f"{path}: name is {card['name']!r}; expected the file's name, {path.stem!r}: rename one"
        )
    if card["task"] not in TASKS:
        raise InputError(f"{path}: task is {card['task']!r}; expected one of {list(TASKS)}")
    try:
        return DatasetSpec(
            name=card["name"],
            task=card["task"],
            classes=_classes(card["label"]),
            modality=card["modality"],
            n_channels=card["n_channels"],
            n_samples=_counts(card["n_samples"]),
            license=card["license"],
            source=card["source"],
            head=card["name"],
        )
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; InputError for a key that it has twice."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise InputError(f"the key {key!r} is there twice in one object; keep one of the two")
        found[key] = value
    return found


def load(name: str, roots: Sequence[Path], *, size: int = 28) -> Dataset:
    """The dataset of a card; no MD5 is official, so `md5` is the file's and `md5_ok` is True."""
    path, spec = _found(name, roots, size)
    return load_file(path, spec, size=size, source="card")


def groups(name: str, roots: Sequence[Path], *, size: int = 28) -> dict[str, str]:
    """Name of a group (patient, lesion) -> its digest in records; empty without groups."""
    return group_pseudonyms(*_found(name, roots, size))


def _found(name: str, roots: Sequence[Path], size: int) -> tuple[Path, DatasetSpec]:
    """The archive of images of this size, and its description."""
    card = find(name, roots)
    path = card.with_name(f"{name}{'' if size == 28 else f'_{size}'}.npz")
    if not path.is_file():
        found = [p.name for p in _archives(card)]
        raise InputError(
            f"{path} is missing beside its card; found {found or 'no archive'}: add the images of "
            f"{size} pixels, or use a recipe with another source_size"
        )
    return path, read_card(card)


def _cards(roots: Sequence[Path]) -> dict[str, Path]:
    """Name -> JSON file with an archive beside it, whatever the name; hidden files left out."""
    found: dict[str, Path] = {}
    for root in map(Path, roots):
        stems = {re.sub(r"_\d+$", "", path.stem) for path in root.glob("*.npz")}
        stems |= {path.stem for path in root.glob("*.npz")}
        for path in sorted(root.glob("*.json")):
            if path.stem in stems and not path.name.startswith("."):
                found.setdefault(path.stem, path)
    return found


def _archives(card: Path) -> list[Path]:
    ending = re.compile(re.escape(card.stem) + r"(_\d+)?\.npz")
    return sorted(path for path in card.parent.glob("*.npz") if ending.fullmatch(path.name))


def _classes(label: dict[str, Any]) -> tuple[str, ...]:
    keys = [str(i) for i in range(len(label))]
    if sorted(label) != sorted(keys) or not all(isinstance(v, str) for v in label.values()):
        raise InputError(
            f"label is {label!r}; expected a text for each label of the archive, with the keys "
            "'0', '1', ..."
        )
    return tuple(label[key] for key in keys)


def _counts(n_samples: dict[str, Any]) -> dict[str, int]:
    good = sorted(n_samples) == sorted(SPLITS) and all(
        type(count) is int and count > 0 for count in n_samples.values()
    )
    if not good:
        raise InputError(f"n_samples is {n_samples!r}; expected a count above 0 for {list(SPLITS)}")
    return {split: n_samples[split] for split in SPLITS}
