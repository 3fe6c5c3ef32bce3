"""The 12 two-dimensional MedMNIST sets at 28, 64, 128 and 224 pixels.

Classes, counts, MD5, addresses and licences come from the medmnist package's `INFO`. It is read
from the text of `medmnist/info.py`, because importing the package takes seconds and makes a folder
in the home. This file has only facts that the package does not state.
"""

import ast
import hashlib
import importlib.metadata
import importlib.util
import os
import tempfile
import urllib.error
import urllib.request
from collections.abc import Collection, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from vitask.data.archive import file_md5, load_file
from vitask.data.spec import SPLITS, Dataset, DatasetSpec
from vitask.errors import InputError
from vitask.files import PART

MODALITY = {
    "pathmnist": "colon pathology",
    "chestmnist": "chest X-ray",
    "dermamnist": "dermatoscope",
    "octmnist": "retinal OCT",
    "pneumoniamnist": "chest X-ray",
    "retinamnist": "fundus camera",
    "breastmnist": "breast ultrasound",
    "bloodmnist": "blood cell microscope",
    "tissuemnist": "kidney cortex microscope",
    "organamnist": "abdominal CT",
    "organcmnist": "abdominal CT",
    "organsmnist": "abdominal CT",
}  # the order of the paper's tables

# The International Clinical Diabetic Retinopathy scale; medmnist only has '0' to '4'.
RETINOPATHY_GRADES = (
    "no apparent retinopathy",
    "mild nonproliferative retinopathy",
    "moderate nonproliferative retinopathy",
    "severe nonproliferative retinopathy",
    "proliferative retinopathy",
)
_SHARED_HEAD = dict.fromkeys(("organamnist", "organcmnist", "organsmnist"), "organ")
SHARED_HEADS = tuple(dict.fromkeys(_SHARED_HEAD.values()))

NAMES = tuple(MODALITY)
SIZES = (28, 64, 128, 224)
_CHUNK = 1 << 20  # bytes


@cache
def info() -> dict[str, dict[str, Any]]:
    """medmnist's `INFO`, parsed and not imported; ImportError if the package is missing."""
    package = importlib.util.find_spec("medmnist")
    if package is None or package.origin is None:
        raise ImportError("the package medmnist is not installed; pip install medmnist")
    path = Path(package.origin).with_name("info.py")
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "INFO":
            return ast.literal_eval(node.value)
    raise ImportError(f"{path} has no INFO; expected medmnist 3.0")


@cache
def spec(name: str) -> DatasetSpec:
    """The description of an official set, by its name in medmnist."""
    entry = info()[name]
    labels = entry["label"]
    classes = tuple(labels[str(i)] for i in range(len(labels)))
    return DatasetSpec(
        name=name,
        task=entry["task"],
        classes=RETINOPATHY_GRADES if name == "retinamnist" else classes,
        modality=MODALITY[name],
        n_channels=entry["n_channels"],
        n_samples={split: entry["n_samples"][split] for split in SPLITS},
        license=entry["license"],
        source=f"MedMNIST v{importlib.metadata.version('medmnist')}, medmnist/info.py",
        head=_SHARED_HEAD.get(name, name),
    )


def file_name(name: str, size: int) -> str:
    """`breastmnist.npz` at 28 pixels, `breastmnist_224.npz` at 224."""
    return f"{name}{_suffix(size)}.npz"


def expected_md5(name: str, size: int) -> str:
    """MD5 of the official file, hexadecimal."""
    return info()[name][f"MD5{_suffix(size)}"]


def load(
    name: str, roots: Sequence[Path], *, size: int = 28, allow_unverified: Collection[str] = ()
) -> Dataset:
    """An official set from the first root that has its file."""
    return load_file(
        find(name, size, roots),
        spec(name),
        size=size,
        source="medmnist",
        expected_md5=expected_md5(name, size),
        allow_unverified=name in allow_unverified,
    )


def find(name: str, size: int, roots: Sequence[Path]) -> Path:
    """The file in the first root that has it; ValueError names all roots searched."""
    wanted = file_name(name, size)
    for root in roots:
        if (path := Path(root) / wanted).is_file():
            return path
    looked = [f"{root}{'' if Path(root).is_dir() else ' (no such folder)'}" for root in roots]
    raise InputError(
        f"{wanted} is missing; looked in {', '.join(looked) or 'no data root at all'}. Give the "
        "folder that has it with --data-root, or fetch it with python -m bench data download DIR "
        f"--datasets {name} --size {size}"
    )


def download(name: str, size: int, root: Path, *, timeout_seconds: float = 60.0) -> Path:
    """Fetch an official file into `root`, which keeps only a file with the right MD5.

    A file that exists is kept if it is right. ValueError if it is wrong, and for an unknown name
    or size, a failed transfer and a wrong MD5.
    """
    if name not in NAMES:
        raise InputError(f"no MedMNIST set {name!r}; expected one of {', '.join(NAMES)}")
    path, md5 = Path(root) / file_name(name, size), expected_md5(name, size)
    if path.is_file():
        if (found := file_md5(path)) == md5:
            return path
        raise InputError(
            f"{path} exists with MD5 {found}, expected {md5}; move it away to fetch it again"
        )
    url = info()[name][f"url{_suffix(size)}"]
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, unfinished = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PART)
    try:
        with os.fdopen(descriptor, "wb") as file:
            found = _fetch(url, file, path, md5, timeout_seconds)
        if found != md5:
            raise InputError(
                f"{url} gave MD5 {found}, expected {md5}; nothing was kept. Try again: the "
                "transfer may have been cut off"
            )
        os.chmod(unfinished, 0o644)  # mkstemp makes files that only the owner can read
        os.replace(unfinished, path)
    finally:
        Path(unfinished).unlink(missing_ok=True)
    return path


def _fetch(url: str, file: Any, path: Path, md5: str, timeout_seconds: float) -> str:
    """Copy `url` into an open file and return the MD5 of its bytes."""
    digest = hashlib.md5(usedforsecurity=False)
    try:
        with urllib.request.urlopen(url, timeout=timeout_seconds) as answer:
            while chunk := answer.read(_CHUNK):
                file.write(chunk)
                digest.update(chunk)
    except (urllib.error.URLError, OSError) as error:
        raise InputError(
            f"{url} cannot be fetched ({error}). Without a network: fetch it elsewhere and put "
            f"it at {path} (MD5 {md5})"
        ) from error
    return digest.hexdigest()


def _suffix(size: int) -> str:
    if size not in SIZES:
        raise InputError(f"MedMNIST has no size {size}; expected one of {list(SIZES)}")
    return "" if size == 28 else f"_{size}"


def result_name(flag: str, size: int, *, auc: float, accuracy: float, run: str) -> str:
    """The name that MedMNIST's evaluator gives a result file."""
    suffix = "" if size == 28 else f"_{size}"
    return f"{flag}{suffix}_test_[AUC]{auc:.3f}_[ACC]{accuracy:.3f}@{run}.csv"
