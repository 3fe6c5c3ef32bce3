"""External sets of diabetic retinopathy in their published form, which the user provides.

Grades 0 to 4 are RetinaMNIST's. A set's files are in a folder of its name in a data root:

    aptos2019   train.csv (id_code, diagnosis), train_images/ID.png
    idrid       "B. Disease Grading" as it is unpacked
    messidor2   messidor_data.csv (image_id, adjudicated_dr_grade, adjudicated_gradable), images/
    messidor    the published XLS files, one for each base (Image name, Retinopathy grade 0-3),
                read with xlrd, or all of them saved as one annotations.csv; images/. Its grade 3
                is severe or proliferative, so the answers for RetinaMNIST's grades 3 and 4 are one
                class, which is not an exact map

Images are cut to their centre square and resized to `size` pixels. IDRiD keeps its test split;
others are divided with a fixed seed, stratified by grade: 60 % train, 10 % val, 30 % test.
IDRiD_118 (train) is the same picture as IDRiD_064 (test) and is left out.
Phantom: other pictures of RetinaMNIST's phantom, with another shift for each set.
"""

import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from vitask.data import phantom
from vitask.data.images import ENDINGS, notes, read_image
from vitask.data.pseudonyms import pseudonyms
from vitask.data.spec import SPLITS, Dataset, DatasetSpec, Split, ids
from vitask.data.tables import Row, read_table
from vitask.errors import InputError, boundary
from vitask.files import file_sha256

Labelled = list[tuple[Path, int, str]]  # file, grade, split ("" if the set has none)
SHARES = (0.6, 0.1, 0.3)  # of train, val, test if the set has no splits
SAME_AS_TEST = {"IDRiD_118"}
LAST_TWO_MERGED = {"messidor": "severe nonproliferative or proliferative retinopathy"}


def names(source: str, roots: Sequence[Path]) -> tuple[str, ...]:
    """The sets with a folder in the roots; phantom has all of them except MESSIDOR."""
    if source == "phantom":
        return tuple(SHIFTS)
    return tuple(name for name in READERS if _folder(name, roots) is not None)


def load(
    name: str, retina: DatasetSpec, *, source: str, roots: Sequence[Path], size: int
) -> Dataset:
    """One external set, described like RetinaMNIST; an InputError says what is missing or wrong.

    retina: the description of RetinaMNIST
    source: "phantom" | any other for files in `roots`
    size:   side in pixels
    """
    if source == "phantom":
        return _phantom(name, retina)
    folder, labelled = _labelled(name, roots)
    named, done = _image_ids(name, folder, labelled), Counter[str]()
    digest, splits = hashlib.md5(usedforsecurity=False), {}
    for split in SPLITS:
        chosen = [(path, grade) for path, grade, place in labelled if place == split]
        if not chosen:
            raise InputError(
                f"{folder} has {len(labelled)} labelled image(s), none for the split {split}; "
                "expected the whole published set"
            )
        images = np.stack([read_image(path, size, 3, square=True, done=done) for path, _ in chosen])
        labels = np.array([grade for _, grade in chosen], dtype=np.int64)
        splits[split] = Split(images, labels, np.array([named[path] for path, _ in chosen]))
        digest.update(images.tobytes() + labels.tobytes())
    spec = replace(
        retina,
        name=name,
        n_samples={name: len(split) for name, split in splits.items()},
        license="the publisher's own",
        source="vitask/data/external.py",
    )
    if name in LAST_TWO_MERGED:
        last = len(retina.classes) - 2
        spec = replace(
            spec,
            classes=(*retina.classes[:last], LAST_TWO_MERGED[name]),
            answers=tuple((text, min(grade, last)) for grade, text in enumerate(retina.classes)),
        )
    return Dataset(spec, splits, size, "external", digest.hexdigest(), True, notes(done))


def image_ids(name: str, roots: Sequence[Path]) -> dict[str, str]:
    """File, relative to the set's folder -> the image's id, which no record maps back."""
    folder, labelled = _labelled(name, roots)
    named = _image_ids(name, folder, labelled)
    return {path.relative_to(folder).as_posix(): one for path, one in named.items()}


def _labelled(name: str, roots: Sequence[Path]) -> tuple[Path, Labelled]:
    """The set's folder; its files with grades and splits."""
    folder = _folder(name, roots)
    if folder is None:
        looked = ", ".join(map(str, roots)) or "no data root"
        raise InputError(
            f"no folder {name!r} in {looked}; expected the set's published files there"
        )
    labelled = READERS[name](folder)
    if not labelled:
        raise InputError(f"{folder} has no labelled image of {name}; expected its published files")
    return folder, _divided(labelled, name)


def _image_ids(name: str, folder: Path, labelled: Labelled) -> dict[Path, str]:
    """Ids without the files' names, which could be a person's: digests keyed by all the images.

    The key is of the files as they are, so ids are the same at every size.
    """
    whole = hashlib.sha256()
    with boundary(f"the images in {folder}", "make them readable, or copy them again"):
        for line in sorted(f"{file_sha256(path)} {grade}\n" for path, grade, _ in labelled):
            whole.update(line.encode())
    relative = {path: _name(path.relative_to(folder)) for path, _, _ in labelled}
    digests = pseudonyms(relative.values(), whole.digest())
    return {path: f"{name}/{split}/{digests[relative[path]]}" for path, _, split in labelled}


def _folder(name: str, roots: Sequence[Path]) -> Path | None:
    return next((Path(root) / name for root in roots if (Path(root) / name).is_dir()), None)


# One reader for each set: folder -> files, grades, splits


def _aptos(folder: Path) -> Labelled:
    images, columns = _Images(folder / "train_images"), ("id_code", "diagnosis")
    rows = read_table(folder / "train.csv", columns)
    return [(images.file(row), row.whole("diagnosis", 4), "") for row in rows]


def _idrid(folder: Path) -> Labelled:
    inner = folder / "B. Disease Grading"
    found: Labelled = []
    for split, letter, place, labels in (
        ("train", "a", "a. Training Set", "Training Labels"),
        ("test", "b", "b. Testing Set", "Testing Labels"),
    ):
        file = inner / "2. Groundtruths" / f"{letter}. IDRiD_Disease Grading_{labels}.csv"
        images = _Images(inner / "1. Original Images" / place)
        for row in read_table(file, ("Image name", "Retinopathy grade")):
            grade = row.whole("Retinopathy grade", 4)
            if split == "train" and row.id in SAME_AS_TEST:
                continue
            found.append((images.file(row), grade, split))
    return found


def _messidor2(folder: Path) -> Labelled:
    columns = ("image_id", "adjudicated_dr_grade", "adjudicated_gradable")
    images = _Images(folder / "images")
    found: Labelled = []
    for row in read_table(folder / "messidor_data.csv", columns):
        if row.whole("adjudicated_gradable", 1) == 1:
            found.append((images.file(row), row.whole("adjudicated_dr_grade", 4), ""))
        else:  # it has no grade
            images.stem(row)
    return found


def _messidor(folder: Path) -> Labelled:
    tables = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() == ".xls" and not path.name.startswith(".")
    )
    tables = tables or sorted(folder.glob("annotations.csv"))
    if not tables:
        raise InputError(
            f"{folder} has neither the published XLS files nor an annotations.csv; expected one of "
            "the two"
        )
    images, columns = _Images(folder / "images"), ("Image name", "Retinopathy grade")
    rows = [row for table in tables for row in read_table(table, columns)]
    return [(images.file(row), row.whole("Retinopathy grade", 3), "") for row in rows]


READERS: dict[str, Callable[[Path], Labelled]] = {
    "aptos2019": _aptos,
    "idrid": _idrid,
    "messidor2": _messidor2,
    "messidor": _messidor,
}


class _Images:
    """The image files of a folder, found by the ids of a table."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, list[Path]] = {}
        self.given: dict[str, Row] = {}
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if path.suffix.lower() in ENDINGS and not path.name.startswith("."):
                self.files.setdefault(_name(Path(path.stem)), []).append(path)

    def stem(self, row: Row) -> str:
        """The name of a row's image without its ending; InputError if another row has it."""
        if any(sign in row.id for sign in "/\\") or row.id.startswith("."):
            raise InputError(f"{row}: an id is the name of a file, not a path, and not hidden")
        ending = Path(row.id).suffix
        stem = _composed(row.id.removesuffix(ending) if ending.lower() in ENDINGS else row.id)
        if stem in self.given:
            raise InputError(f"{row} is listed before, in {self.given[stem]}; keep one row")
        self.given[stem] = row
        return stem

    def file(self, row: Row) -> Path:
        """The one file of a row's image, whatever its ending."""
        stem = self.stem(row)
        found = self.files.get(stem, [])
        if not found:
            raise InputError(
                f"{self.folder} has no image {stem!r} ({row}); expected one of {', '.join(ENDINGS)}"
            )
        if len(found) > 1:
            raise InputError(
                f"{row}: {self.folder} has {' and '.join(path.name for path in found)}; expected "
                "one file: move the others away"
            )
        if not found[0].is_file():
            raise InputError(f"{found[0]} ({row}) is not a regular file; expected an image")
        return found[0]


def _name(path: Path) -> str:
    """A file's name as a table in UTF-8 has it; the locale does not count."""
    return _composed(os.fsencode(path.as_posix()).decode("utf-8", "surrogateescape"))


def _composed(name: str) -> str:
    """A name in one Unicode form: some systems store accents apart from their letters."""
    return unicodedata.normalize("NFC", name)


def _divided(labelled: Labelled, name: str) -> Labelled:
    """A split for every image: the set's, with val taken from train, or by a fixed seed."""
    rng = np.random.default_rng(list(name.encode()))
    divided = any(split for _, _, split in labelled)
    splits = [split for _, _, split in labelled]
    grades = np.array([grade for _, grade, _ in labelled])
    free = np.array([split != "test" for split in splits])
    shares = (1 - SHARES[1], SHARES[1], 0.0) if divided else SHARES
    for grade in np.unique(grades):
        members = rng.permutation(np.flatnonzero(free & (grades == grade)))
        cuts = np.round(np.cumsum(shares)[:2] * len(members)).astype(int)
        for split, chosen in zip(SPLITS, np.split(members, cuts), strict=True):
            for place in chosen:
                splits[place] = split
    return [(path, g, split) for (path, g, _), split in zip(labelled, splits, strict=True)]


# Phantom: other pictures of the same marks, as from another camera

SHIFTS: dict[str, tuple[tuple[float, float, float], float, tuple[int, int, int]]] = {
    "aptos2019": ((0.9, 1.0, 1.1), 0.85, (90, 20, 90)),  # colour, contrast, images
    "idrid": ((1.1, 0.9, 0.8), 0.7, (80, 20, 80)),
    "messidor2": ((0.8, 0.8, 0.8), 1.0, (70, 20, 70)),
}


def _phantom(name: str, retina: DatasetSpec) -> Dataset:
    colour, contrast, sizes = SHIFTS[name]
    made = phantom.make(retina.name, sizes)
    splits = {}
    for split, base in made.splits.items():
        pixels = 128 + contrast * (base.images.astype(float) - 128)
        images = np.clip(pixels * np.array(colour), 0, 255).round().astype(np.uint8)
        splits[split] = Split(images, base.labels, ids(name, split, len(base)))
    spec = replace(retina, name=name, source=f"{retina.source}, shifted")
    return Dataset(spec, splits, made.size, "phantom", made.md5, True)
