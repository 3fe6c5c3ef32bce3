"""Corrupted images as MedMNIST-C defines them, made by its package `medmnistc`.

The package is optional. It pins an older medmnist, so no extra can name it, and it needs
ImageMagick's library; `missing` says how to install it. Its severities are meant for images of 224
pixels: smaller ones are enlarged to 224, corrupted, and reduced again.
"""

import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any
from unittest.mock import patch

import numpy as np
from PIL import Image

from vitask.data.medmnist import MODALITY
from vitask.data.spec import Dataset, DatasetSpec, Split
from vitask.names import canonical

SEVERITIES = 5
MARK = "+"  # between the names of a dataset and a corruption
SIDE = 224  # pixels; the image size that the severities are meant for
PICKLED = {"stain_deposit": "its inks are a pickled file, and nothing is unpickled here"}
INSTALL = (
    "pip install --no-deps medmnistc==0.1.0; pip install opencv-python-headless scikit-image wand; "
    "and ImageMagick's library (on Debian libmagickwand-6.q16-6)"
)


@cache
def missing() -> str | None:
    """Why the package cannot be used and how to install it; None if it can be used."""
    try:
        import medmnistc.corruptions.registry  # noqa: F401
    except Exception as error:  # Wand raises various errors without its library
        text = str(error).strip().splitlines() or [type(error).__name__]
        return f"medmnistc cannot be imported ({text[0]}); {INSTALL}"
    return None


def listed(spec: DatasetSpec) -> dict[str, Any]:
    """Corruption -> its maker, as MedMNIST-C lists them for the dataset or its modality.

    Empty for an unknown modality.
    """
    from medmnistc.corruptions.registry import CORRUPTIONS_DS

    if spec.name in CORRUPTIONS_DS:
        return CORRUPTIONS_DS[spec.name]
    wanted = canonical(spec.modality)
    same = [name for name, modality in MODALITY.items() if canonical(modality) == wanted]
    return next((CORRUPTIONS_DS[name] for name in same if name in CORRUPTIONS_DS), {})


def split_listed(spec: DatasetSpec) -> tuple[list[str], dict[str, str]]:
    """A dataset's corruptions that work, and the others -> reason. Tries every maker once."""
    usable, lacking = [], {}
    probe = np.full((1, SIDE, SIDE, 3), 128, dtype=np.uint8)
    for name in listed(spec):
        if name in PICKLED:
            lacking[name] = PICKLED[name]
            continue
        try:
            corrupted(probe, spec, name)
            usable.append(name)
        except Exception as error:  # a third-party package may raise anything
            lacking[name] = f"{type(error).__name__}: {error}"
    return usable, lacking


def corrupted(images: np.ndarray, spec: DatasetSpec, name: str) -> np.ndarray:
    """Every image at severities 1 to 5: uint8 (5 n, ...), severity by severity.

    images: uint8 (n, h, w) or (n, h, w, 3). The same images and name give the same result.
    """
    maker = listed(spec)[name]
    grey = images.ndim == 3
    large = [_resized(Image.fromarray(image).convert("RGB"), SIDE) for image in images]
    done = []
    with _seeded(f"{spec.name}/{name}") as rng, patch.object(np, "fromstring", np.frombuffer):
        # Motion blur reads bytes with np.fromstring, which NumPy 2.3 no longer allows.
        maker.rng = rng  # impulse noise draws from it
        for severity in range(SEVERITIES):
            for image in large:
                made = Image.fromarray(np.asarray(maker.apply(image, severity), dtype=np.uint8))
                made = _resized(made.convert("L" if grey else "RGB"), images.shape[1])
                done.append(np.asarray(made))
    return np.stack(done)


def _resized(image: Image.Image, side: int) -> Image.Image:
    """The image enlarged smoothly, reduced by averaging, or unchanged if its size fits."""
    if image.width == side:
        return image
    how = Image.Resampling.BICUBIC if side > image.width else Image.Resampling.BOX
    return image.resize((side, side), how)


@contextmanager
def _seeded(text: str) -> Iterator[np.random.Generator]:
    """Seed Python's and NumPy's global generators, which the package uses; restore them after."""
    seed = zlib.crc32(f"corruption/{text}".encode())
    before = random.getstate(), np.random.get_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    try:
        yield np.random.default_rng(seed)
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002


def relative_errors(
    spec: DatasetSpec, clean: float, errors: dict[str, float]
) -> dict[str, tuple[float, float]]:
    """Corruption -> MedMNIST-C's BE and RBE: balanced errors relative to AlexNet's, as its paper.

    clean, errors: balanced error on clean images, and per corruption, averaged over severities.
    Its AlexNet was trained at 224 pixels, so compare only that size. Empty for other datasets.
    """
    from medmnistc.utils.baselines import BASELINES

    if spec.name not in BASELINES:
        return {}
    base, alexnet = BASELINES[spec.name]["clean_score"], BASELINES[spec.name]["raw_scores"]
    return {
        name: (error / alexnet[name], (error - clean) / (alexnet[name] - base))
        for name, error in errors.items()
    }


def base_of(dataset: str) -> str:
    """The name of the clean dataset."""
    return dataset.partition(MARK)[0]


def described(clean: Dataset, corruption: str) -> Dataset:
    """A corrupted dataset's labels, ids and groups, with black images that take no memory."""
    test = clean.splits["test"]
    split = Split(
        np.broadcast_to(np.uint8(0), (SEVERITIES * len(test), *test.images.shape[1:])),
        np.concatenate([test.labels] * SEVERITIES),
        np.array([f"{i}@{severity + 1}" for severity in range(SEVERITIES) for i in test.ids]),
        np.concatenate([test.ids if test.groups is None else test.groups] * SEVERITIES),
    )
    spec = replace(clean.spec, name=f"{clean.spec.name}{MARK}{corruption}")
    return replace(clean, spec=spec, splits=clean.splits | {"test": split})
