"""phantom: a procedural stand-in for the 12 MedMNIST sets. It tests the pipeline, not science.

Names, classes, modalities, channels, tasks, splits and the imbalance of the classes are those of
the real sets. A program draws the pictures, so no file is shipped or fetched.

The classes differ in fine details. Each picture has PLACES small marks of 5 x 5 pixels at random
places, bright on dark or dark on bright at random. A class is one kind of mark; a label of
ChestMNIST adds its kind to the others present, a grade of RetinaMNIST is the share of two kinds.
The MARKS kinds have mean 0 and equal energy. They are symmetric left to right, so that a mirrored
picture keeps its class. They come in pairs that are upside down of each other and so have the same
power spectrum. All sets use the same kinds; OrganA, C and S share class marks, as they share
classes. Colour, place, shape, brightness, contrast and noise are random and independent of the
class (vitask/data/looks.py). In every split, the share LABEL_NOISE of the pictures is drawn with
the label of another image.

Approximations: TRAIN_COUNTS is from the published class frequencies (Retina, Breast and Pneumonia
checked against the real files, OrganC and OrganS rounded). Val has the shares of train, and so has
test except for OCTMNIST and PneumoniaMNIST. Every class has at least the share RAREST of a split,
or small splits would lack it. ChestMNIST's labels are independent of each other among the images
with a finding.

Two criteria alone decided the generator: a TSM on true labels is far above a linear probe of
generic features, and a TSM on shuffled labels is at chance. Measured with the default SIZES, mean
macro-F1 over the 12 test splits, one seed: TSM of the recipe `pocket` (test_resnet, 30 epochs)
0.707, with the labels of train and val shuffled 0.159; guessing at the frequencies of the classes
0.187, always the most frequent class 0.114. Logistic regression on the pixels at half size 0.189,
on pooled features of a random ResNet-18 0.260, on histograms of oriented gradients 0.376. These
three replaced the pocket VLM's frozen vision features, which did not exist yet and on which the
probe reaches 0.258.
"""

import hashlib
import zlib
from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import numpy as np

from vitask.data import medmnist
from vitask.data.looks import LOOKS, SIZE, column
from vitask.data.spec import SPLITS, Dataset, DatasetSpec, Split, ids
from vitask.data.subset import shares
from vitask.errors import InputError

PHANTOM_SEED = 2410_06456  # the paper's number on arXiv; fixed, so that the data never change
SIZES = (200, 60, 100)  # images in train, val, test
LABEL_NOISE = 0.04  # share of pictures drawn with another image's label
RAREST = 0.02  # smallest share of a class in a split

MARKS = 16  # kinds: ChestMNIST needs 14 and one for "no finding"
MARK = 5  # side in pixels
PLACES = 14  # marks in a picture
AMPLITUDE = 0.4  # of a mark of energy 1, in units of the brightness range
ALIKE = 0.62  # largest correlation of two kinds at any shift

TRAIN_COUNTS: Mapping[str, tuple[int, ...]] = {
    "pathmnist": (9366, 9509, 10360, 10401, 8006, 12182, 7886, 9401, 12885),
    "chestmnist": (
        7996, 1950, 9261, 13914, 3988, 4375, 978, 3705, 3263, 1690, 1799, 1158, 2279, 144,
    ),
    "dermamnist": (228, 359, 769, 80, 779, 4693, 99),
    "octmnist": (33484, 10213, 7754, 46026),
    "pneumoniamnist": (1214, 3494),
    "retinamnist": (486, 128, 206, 194, 66),
    "breastmnist": (147, 399),
    "bloodmnist": (852, 2181, 1085, 2026, 849, 993, 2330, 1643),
    "tissuemnist": (53075, 7814, 5866, 15406, 11789, 7705, 39203, 24608),
    "organamnist": (1956, 1390, 1357, 1474, 3963, 3817, 6164, 3919, 3929, 3031, 3561),
    "organcmnist": (1148, 619, 600, 600, 1088, 1170, 2986, 1002, 1022, 1173, 1567),
    "organsmnist": (1148, 630, 614, 721, 1132, 1119, 3464, 741, 803, 2004, 1556),
}  # fmt: skip
TEST_COUNTS: Mapping[str, tuple[int, ...]] = {
    "octmnist": (250, 250, 250, 250),
    "pneumoniamnist": (234, 390),
}
NO_FINDING = 0.538  # share of ChestMNIST's images: 60,361 of 112,120 in NIH-ChestXray14


def spec(name: str) -> DatasetSpec:
    """The official description, with the source and licence of the phantom."""
    return replace(
        medmnist.spec(name),
        license="none: drawn by a program",
        source=f"phantom, vitask/data/phantom.py, seed {PHANTOM_SEED}",
    )


def make(name: str, sizes: tuple[int, int, int] = SIZES) -> Dataset:
    """A stand-in with the given number of images in train, val and test; always the same bytes.

    The pictures of a split depend only on the set's name, the split and its size. `md5` is of all
    images and labels. On another processor or numpy, a rare pixel may be rounded differently; then
    the MD5 differs too. ValueError for sizes below 1.
    """
    if len(sizes) != len(SPLITS) or min(sizes) < 1:
        raise InputError(
            f"phantom sizes {tuple(sizes)} for {name}; expected three counts of 1 or more, for "
            f"{', '.join(SPLITS)}"
        )
    described, splits = spec(name), {}
    digest = hashlib.md5(usedforsecurity=False)
    for number, (split, count) in enumerate(zip(SPLITS, sizes, strict=True)):
        rng = np.random.default_rng([PHANTOM_SEED, zlib.crc32(name.encode()), number])
        labels = _labels(described, split, count, rng)
        images = _draw(described, labels, rng)
        splits[split] = Split(images, labels, ids(name, split, count))
        digest.update(images.tobytes() + labels.tobytes())
    return Dataset(described, splits, SIZE, "phantom", digest.hexdigest(), True)


def _labels(spec: DatasetSpec, split: str, n: int, rng: np.random.Generator) -> np.ndarray:
    """int64 (n,) or (n, classes), in random order, with the imbalance of the real set."""
    counts = np.array(TRAIN_COUNTS[spec.name], dtype=float)
    if spec.multi_label:
        return _label_sets(counts / spec.n_samples["train"], n, rng)
    if split == "test" and spec.name in TEST_COUNTS:
        counts = np.array(TEST_COUNTS[spec.name], dtype=float)
    share = np.maximum(counts / counts.sum(), RAREST)
    given = shares(np.round(share / share.sum() * 1e6), n)
    return rng.permutation(np.repeat(np.arange(len(counts)), given))


def _label_sets(frequency: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """int64 (n, labels) of 0 and 1: the share NO_FINDING without a label, each at its frequency."""
    labels = np.zeros((n, len(frequency)), dtype=np.int64)
    found = rng.permutation(n)[: n - round(n * NO_FINDING)]
    count = np.maximum(np.round(n * frequency).astype(int), max(1, round(RAREST * n)))
    for label, times in enumerate(count):
        labels[rng.permutation(found)[:times], label] = 1
    labels[found[~labels[found].any(1)], int(frequency.argmax())] = 1  # or it would have no finding
    return labels


@cache
def marks() -> np.ndarray:
    """The kinds of marks, float32 (MARKS, 5, 5): mean 0, energy 1, unlike at any shift."""
    rng = np.random.default_rng(PHANTOM_SEED)
    chosen: list[np.ndarray] = []
    while len(chosen) < MARKS:
        half = rng.choice([-1.0, 1.0], (MARK, MARK // 2 + 1))
        mark = np.concatenate([half, half[:, -2::-1]], axis=1)
        mark = mark - mark.mean()
        mark /= np.sqrt((mark**2).sum())
        pair = [mark, mark[::-1]]
        if _alike(*pair) < ALIKE and all(_alike(p, c) < ALIKE for p in pair for c in chosen):
            chosen += pair
    return np.stack(chosen).astype(np.float32)


def _alike(a: np.ndarray, b: np.ndarray) -> float:
    """Largest absolute correlation of two marks over all shifts."""
    views = np.lib.stride_tricks.sliding_window_view(np.pad(a, MARK - 1), b.shape)
    return float(np.abs((views * b).sum((-2, -1))).max())


def _mixtures(spec: DatasetSpec, labels: np.ndarray) -> np.ndarray:
    """Share of each kind of mark in each picture, (n, MARKS)."""
    rng = np.random.default_rng([PHANTOM_SEED, zlib.crc32(spec.head.encode())])
    kind, classes = rng.permutation(MARKS), len(spec.classes)
    mixture = np.zeros((len(labels), MARKS))
    if spec.multi_label:
        mixture[:, kind[:classes]] = labels
        mixture[~labels.any(1), kind[classes]] = 1
    elif spec.task == "ordinal-regression":
        grade = labels / (classes - 1)
        mixture[:, kind[0]], mixture[:, kind[1]] = 1 - grade, grade
    else:
        mixture[np.arange(len(labels)), kind[labels]] = 1
    return mixture / mixture.sum(1, keepdims=True)


def _draw(spec: DatasetSpec, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """uint8 (n, 28, 28) or (n, 28, 28, 3): looks, marks, then brightness, contrast and noise."""
    n = len(labels)
    base, mask = LOOKS[spec.name](rng, n)
    drawn, noisy = labels.copy(), rng.random(n) < LABEL_NOISE
    drawn[noisy] = labels[rng.permutation(n)][noisy]
    field = _scatter(_mixtures(spec, drawn), mask, rng)
    picture = base + (column(rng, n, 0.8, 1.2) * AMPLITUDE * field)[..., None]
    picture = (picture - 0.5) * column(rng, n, 0.8, 1.1, 1) + 0.5 + column(rng, n, -0.08, 0.08, 1)
    picture = picture + rng.normal(0, 1, picture.shape) * column(rng, n, 0.01, 0.04, 1)
    done = np.clip(np.round(picture * 255), 0, 255).astype(np.uint8)
    return done if spec.n_channels == 3 else done[..., 0]


def _scatter(mixture: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Marks at random places without overlap, inside the mask while it has room."""
    n, room = len(mixture), SIZE - MARK + 1
    kinds = np.stack([rng.choice(MARKS, PLACES, p=row) for row in mixture])
    edge = MARK // 2
    free = rng.random((n, room, room)) + 2 * (mask[:, edge:-edge, edge:-edge] > 0.5)
    sign = rng.choice([-1.0, 1.0], (n, PLACES))
    field = np.zeros((n, SIZE, SIZE), dtype=np.float32)
    side, (down, right) = np.arange(MARK), np.mgrid[0:room, 0:room]
    for k in range(PLACES):
        y, x = (at[:, None, None] for at in divmod(free.reshape(n, -1).argmax(1), room))
        patch = marks()[kinds[:, k]] * sign[:, k, None, None]
        field[np.arange(n)[:, None, None], y + side[:, None], x + side] += patch
        free[(abs(down - y) < MARK) & (abs(right - x) < MARK)] -= 4  # below every free place
    return field
