"""Read a `.npz` in MedMNIST's key layout, and refuse any other content.

Keys `train_images`, `train_labels`, `val_images`, ... ; images uint8 (n, size, size) or
(n, size, size, 3); labels integers (n, 1), or (n, classes) of 0 and 1 for multi-label. Names of
groups (patients, lesions) become pseudonyms, so that no record holds them.
"""

import hashlib
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from vitask.data.pseudonyms import pseudonyms
from vitask.data.spec import SPLITS, Dataset, DatasetSpec, Split, ids
from vitask.errors import InputError, reason
from vitask.files import file_sha256

_GROUPS = "groups"
_CONTENTS = "its table of contents"


def load_file(
    path: Path,
    spec: DatasetSpec,
    *,
    size: int,
    source: str,
    expected_md5: str | None = None,
    allow_unverified: bool = False,
) -> Dataset:
    """The dataset in a file, after every check against its description.

    size:             side of its images in pixels
    source:           of the `Dataset`, "medmnist" | "card"
    expected_md5:     the publisher's; None if there is no official file
    allow_unverified: go on if the MD5 differs, with `md5_ok` False; all other checks stay

    A ValueError names the file, what was expected and what was found. Pickled arrays are never
    loaded.
    """
    _check_archive(path)
    md5 = file_md5(path)
    md5_ok = expected_md5 is None or md5 == expected_md5
    if not md5_ok and not allow_unverified:
        raise InputError(
            f"{path}: MD5 is {md5}, expected {expected_md5}; download the official file again "
            f"(python -m bench data download), or admit this one with --allow-unverified "
            f"{spec.name}; every result then says so"
        )
    with _opened(path) as archive:
        grouped = _check_keys(path, archive.files, groups_allowed=expected_md5 is None)
        groups = _groups(path, archive, spec) if grouped else {}
        splits = {}
        for split in SPLITS:
            images = _images(path, archive, f"{split}_images", spec, split, size)
            labels = _labels(path, archive, f"{split}_labels", spec, split)
            splits[split] = Split(images, labels, ids(spec.name, split, len(images)))
    if grouped:
        named = _pseudonyms(path, groups)
        for split, group in groups.items():
            digests = np.array([named[name] for name in group.tolist()])
            splits[split] = replace(splits[split], groups=digests)
    return Dataset(spec, splits, size, source, md5, md5_ok)


def group_pseudonyms(path: Path, spec: DatasetSpec) -> dict[str, str]:
    """Name of a group in the file -> its digest in `Split.groups`; empty without groups."""
    _check_archive(path)
    with _opened(path) as archive:
        grouped = _check_keys(path, archive.files, groups_allowed=True)
        return _pseudonyms(path, _groups(path, archive, spec)) if grouped else {}


def _pseudonyms(path: Path, groups: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Keyed by the file's content, so that equal names in two splits stay equal."""
    names = {name: None for group in groups.values() for name in group.tolist()}
    return pseudonyms(names, bytes.fromhex(file_sha256(path)))


@contextmanager
def _opened(path: Path) -> "Iterator[np.lib.npyio.NpzFile]":
    with _reading(path, _CONTENTS):
        archive = np.load(path, allow_pickle=False)
    with archive:
        yield archive


@contextmanager
def _reading(path: Path, what: str) -> Iterator[None]:
    """Any error inside, of a library that reads `what` of the archive, becomes an InputError.

    On a damaged file they raise almost anything: of zipfile, zlib, numpy, tokenize, ...
    """
    try:
        yield
    except Exception as error:
        if "allow_pickle" in str(error):
            raise InputError(
                f"{path}: {what} cannot be read: it holds pickled objects; expected a plain "
                "numeric array. Pickles can run code and are never loaded: save the array with a "
                "numeric dtype"
            ) from error
        raise InputError(
            f"{path}: {what} cannot be read: the archive is damaged ({reason(error)}); expected a "
            "plain numeric array in a whole .npz file: copy or download it again"
        ) from error


def file_md5(path: Path) -> str:
    """Hexadecimal MD5 of a file's bytes: a fingerprint, not a protection against forgery."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, _md5).hexdigest()


def _md5() -> "hashlib._Hash":
    return hashlib.md5(usedforsecurity=False)


def _check_archive(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"{path} does not exist; put the .npz there, or give another data root")
    with _reading(path, _CONTENTS):
        whole = zipfile.is_zipfile(path)
    length = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(4)
    if whole and start in (b"PK\x03\x04", b"PK\x05\x06"):  # the second: without a member
        return
    if start == b"PK\x03\x04":
        raise InputError(
            f"{path}: the archive is truncated: it starts as a zip, but its table of contents is "
            f"missing after {length} bytes; copy or download it again"
        )
    raise InputError(
        f"{path}: not a .npz (zip) archive: {length} bytes that start with {start!r}; expected "
        "a file written by numpy.savez, or MedMNIST's own: copy or download it again"
    )


def _check_keys(path: Path, found: list[str], *, groups_allowed: bool) -> bool:
    """Whether the file has groups; ValueError for missing and unknown keys."""
    needed = {f"{split}_{what}" for split in SPLITS for what in ("images", "labels")}
    grouped = {f"{split}_{_GROUPS}" for split in SPLITS} if groups_allowed else set()
    missing, extra = needed - set(found), set(found) - needed - grouped
    if grouped & set(found):
        missing |= grouped - set(found)
    if missing or extra:
        raise InputError(
            f"{path}: keys are {sorted(found)}, expected {sorted(needed)}"
            f"{' and, if any, ' + str(sorted(grouped)) if groups_allowed else ''}; "
            f"missing {sorted(missing)}, unknown {sorted(extra)}; give a file in MedMNIST's layout"
        )
    return bool(grouped & set(found))


def _array(path: Path, archive: "np.lib.npyio.NpzFile", key: str) -> np.ndarray:
    with _reading(path, key):
        found = archive[key]
        if not isinstance(found, np.ndarray):  # a member that does not start like an array
            raise ValueError(f"it starts with {bytes(found[:6])!r}")
    return found


def _images(
    path: Path,
    archive: "np.lib.npyio.NpzFile",
    key: str,
    spec: DatasetSpec,
    split: str,
    size: int,
) -> np.ndarray:
    images = _array(path, archive, key)
    shape = (spec.n_samples[split], size, size, *((3,) if spec.n_channels == 3 else ()))
    if images.shape != shape or images.dtype != np.uint8:
        raise InputError(
            f"{path}: {key} is {images.dtype} {images.shape}, expected uint8 {shape}: "
            f"{shape[0]} images of {size} pixels with {spec.n_channels} channel(s), as "
            f"{spec.source} describes {spec.name}; another version or size of the file?"
        )
    return images


def _labels(
    path: Path, archive: "np.lib.npyio.NpzFile", key: str, spec: DatasetSpec, split: str
) -> np.ndarray:
    labels = _array(path, archive, key)
    shape = (spec.n_samples[split], len(spec.classes) if spec.multi_label else 1)
    if labels.shape != shape or labels.dtype.kind not in "iu":
        raise InputError(
            f"{path}: {key} is {labels.dtype} {labels.shape}, expected integers {shape}, one row "
            f"for each image ({spec.task}); another version of the file?"
        )
    top = 1 if spec.multi_label else len(spec.classes) - 1
    wrong = np.flatnonzero(((labels < 0) | (labels > top)).any(1))
    if len(wrong):
        raise InputError(
            f"{path}: {key} has labels out of range in {len(wrong)} row(s), first row {wrong[0]}: "
            f"{labels[wrong[0]].tolist()}; expected 0 to {top}: correct the labels or the classes"
        )
    labels = labels.astype(np.int64)
    return labels if spec.multi_label else labels[:, 0]


def _groups(
    path: Path, archive: "np.lib.npyio.NpzFile", spec: DatasetSpec
) -> dict[str, np.ndarray]:
    """The names of the groups as the file has them, by split."""
    found = {}
    for split, count in spec.n_samples.items():
        key = f"{split}_{_GROUPS}"
        groups = _array(path, archive, key)
        if groups.shape != (count,) or groups.dtype.kind not in "Uiu":
            raise InputError(
                f"{path}: {key} is {groups.dtype} {groups.shape}, expected texts or integers "
                f"({count},), one for each image"
            )
        with _reading(path, key):  # characters that do not exist, or half of a pair
            found[split] = groups.astype(np.str_)
            "".join(found[split].tolist()).encode()
    return found
