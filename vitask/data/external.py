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
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from vitask.data import phantom
from vitask.data.images import read_image
from vitask.data.spec import SPLITS, Dataset, DatasetSpec, Split, ids
from vitask.errors import InputError

Labelled = list[tuple[Path, int, str]]  # file, grade, split ("" if the set has none)
SHARES = (0.6, 0.1, 0.3)  # of train, val, test if the set has no splits
ENDINGS = (".png", ".jpg", ".jpeg", ".tif", ".JPG")
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
    """One external set, described like RetinaMNIST; a ValueError says what is missing.

    retina: the description of RetinaMNIST
    source: "phantom" | any other for files in `roots`
    size:   side in pixels
    """
    if source == "phantom":
        return _phantom(name, retina)
    folder = _folder(name, roots)
    if folder is None:
        looked = ", ".join(map(str, roots)) or "no data root"
        raise InputError(
            f"no folder {name!r} in {looked}; expected the set's published files there"
        )
    labelled = READERS[name](folder)
    if not labelled:
        raise InputError(f"{folder} has no labelled image of {name}; expected its published files")
    labelled = _divided(labelled, name)
    digest, splits = hashlib.md5(usedforsecurity=False), {}
    for split in SPLITS:
        chosen = [(path, grade) for path, grade, place in labelled if place == split]
        images = np.stack([read_image(path, size, 3, square=True) for path, _ in chosen])
        labels = np.array([grade for _, grade in chosen], dtype=np.int64)
        files = np.array([f"{name}/{split}/{path.stem}" for path, _ in chosen], dtype=np.str_)
        splits[split] = Split(images, labels, files)
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
    return Dataset(spec, splits, size, "external", digest.hexdigest(), True)


def _folder(name: str, roots: Sequence[Path]) -> Path | None:
    return next((Path(root) / name for root in roots if (Path(root) / name).is_dir()), None)


# One reader for each set: folder -> files, grades, splits


def _aptos(folder: Path) -> Labelled:
    table = _table(folder / "train.csv", ("id_code", "diagnosis"))
    return [
        (_image(folder / "train_images", str(row.id_code)), int(row.diagnosis), "")
        for row in table.itertuples()
    ]


def _idrid(folder: Path) -> Labelled:
    inner = folder / "B. Disease Grading"
    found: Labelled = []
    for split, letter, images, labels in (
        ("train", "a", "a. Training Set", "Training Labels"),
        ("test", "b", "b. Testing Set", "Testing Labels"),
    ):
        file = inner / "2. Groundtruths" / f"{letter}. IDRiD_Disease Grading_{labels}.csv"
        table = _table(file, ("Image name", "Retinopathy grade"))
        for name, grade in zip(table["Image name"], table["Retinopathy grade"], strict=True):
            if split == "test" or name not in SAME_AS_TEST:
                place = inner / "1. Original Images" / images
                found.append((_image(place, str(name)), int(grade), split))
    return found


def _messidor2(folder: Path) -> Labelled:
    columns = ("image_id", "adjudicated_dr_grade", "adjudicated_gradable")
    table = _table(folder / "messidor_data.csv", columns)
    table = table[table["adjudicated_gradable"].astype(int) == 1]
    return [
        (_image(folder / "images", Path(str(row.image_id)).stem), int(row.adjudicated_dr_grade), "")
        for row in table.itertuples()
    ]


def _messidor(folder: Path) -> Labelled:
    columns = ("Image name", "Retinopathy grade")
    files = sorted(folder.glob("*.xls")) or sorted(folder.glob("annotations.csv"))
    if not files:
        raise InputError(
            f"{folder} has neither the published XLS files nor an annotations.csv; expected one of "
            "the two"
        )
    table = pd.concat([_table(file, columns)[[*columns]] for file in files])
    rows = zip(table["Image name"], table["Retinopathy grade"], strict=True)
    return [(_image(folder / "images", Path(str(n)).stem), int(grade), "") for n, grade in rows]


READERS: dict[str, Callable[[Path], Labelled]] = {
    "aptos2019": _aptos,
    "idrid": _idrid,
    "messidor2": _messidor2,
    "messidor": _messidor,
}


def _table(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """A CSV or XLS file, without blanks around column names and without rows that lack a value."""
    if not path.is_file():
        raise InputError(f"{path} is missing; expected a table with {', '.join(columns)}")
    table = _xls(path) if path.suffix == ".xls" else pd.read_csv(path)
    table.columns = [str(column).strip() for column in table.columns]
    if lacking := [column for column in columns if column not in table.columns]:
        raise InputError(f"{path} lacks the column(s) {lacking}; it has {list(table.columns)}")
    return table.dropna(subset=list(columns))


def _xls(path: Path) -> pd.DataFrame:
    """The first sheet; its first row names the columns, empty cells are None."""
    try:
        import xlrd
    except ImportError as error:  # optional: only MESSIDOR needs it
        raise InputError(f"{path} cannot be read without xlrd: pip install xlrd") from error
    try:  # not with pandas, which drops xlrd
        sheet = xlrd.open_workbook(path).sheet_by_index(0)
    except xlrd.XLRDError as error:
        raise InputError(f"{path} is not an XLS file: {error}") from error
    header, *rows = (sheet.row_values(number) for number in range(sheet.nrows))
    return pd.DataFrame([[None if v == "" else v for v in row] for row in rows], columns=header)


def _image(folder: Path, stem: str) -> Path:
    for ending in ENDINGS:
        path = folder / f"{stem}{ending}"
        if path.is_file():
            return path
    raise InputError(f"{folder} has no image {stem!r}; expected one of {', '.join(ENDINGS)}")


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
