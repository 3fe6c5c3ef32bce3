"""phantom: a procedural stand-in for the 12 MedMNIST sets. It proves plumbing, not science.

Names, classes, modalities, channels, tasks, splits and the imbalance of the classes are those of
the real sets; the pictures are drawn by a program and no file is shipped or fetched.

What tells the classes apart is fine-grained. Each picture carries PLACES small marks of 5 x 5
pixels at random places, bright on dark or dark on bright at random. A class is one kind of mark
(a label of ChestMNIST one among those present, a grade of RetinaMNIST the share of two kinds).
The MARKS kinds have mean 0 and equal energy, are symmetric left to right, so that a mirrored
picture keeps its class, and come in pairs upside down of each other, which have the same power
spectrum. The same kinds serve all sets; OrganA, C and S share class marks, as they share classes.
Colour, place, shape, brightness, contrast and noise vary at random and say nothing about the
class (vitask/data/looks.py). LABEL_NOISE of the pictures are drawn after the label of another
image of the same split, in every split.

Approximate: TRAIN_COUNTS, written from the published class frequencies (Retina, Breast and
Pneumonia checked against the real files, OrganC and OrganS rounded); val has the shares of train,
and so has test except for OCTMNIST and PneumoniaMNIST; no class has a smaller share of a split than
RAREST, else small splits would lack it; ChestMNIST's labels are drawn independently of each other
among the images with a finding.

The generator was fixed by two criteria and nothing else: a TSM on true labels is far above a
linear probe of generic features, and one on shuffled labels is at chance. Measured with the
default SIZES, mean macro-F1 over the 12 test splits, one seed: TSM of the recipe `pocket`
(test_resnet, 30 epochs) 0.707, on shuffled labels of train and val 0.159; guessing at the
frequencies of the classes 0.187, always the most frequent class 0.114. Logistic regression on the
pixels at half size 0.189, on pooled features of a random ResNet-18 0.260, on histograms of
oriented gradients 0.376: these stood in for the pocket VLM's frozen vision features, which were
made later and on which the probe reaches 0.258.
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

PHANTOM_SEED = 2410_06456  # the paper's number on arXiv; fixed: the data are one and the same
SIZES = (200, 60, 100)  # images in train, val, test
LABEL_NOISE = 0.04  # share of pictures drawn after another image's label
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
    """The official description under the phantom's own source and licence."""
    return replace(
        medmnist.spec(name),
        license="none: drawn by a program",
        source=f"phantom, vitask/data/phantom.py, seed {PHANTOM_SEED}",
    )


def make(name: str, sizes: tuple[int, int, int] = SIZES) -> Dataset:
    """A stand-in with so many images in train, val and test; the same call, the same bytes.

    Each split has its own stream of random numbers: it depends on its name and size alone, and
    another size gives other pictures. `md5` is that of all images and labels; another processor or
    numpy may round a rare pixel the other way, and then says so by another MD5.
    """
    if len(sizes) != len(SPLITS) or min(sizes) < 1:
        raise ValueError(
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
    """int64 (n,) or (n, classes), in random order and with the real set's imbalance."""
    counts = np.array(TRAIN_COUNTS[spec.name], dtype=float)
    if spec.multi_label:
        return _label_sets(counts / spec.n_samples["train"], n, rng)
    if split == "test" and spec.name in TEST_COUNTS:
        counts = np.array(TEST_COUNTS[spec.name], dtype=float)
    share = np.maximum(counts / counts.sum(), RAREST)
    given = shares(np.round(share / share.sum() * 1e6), n)
    return rng.permutation(np.repeat(np.arange(len(counts)), given))


def _label_sets(frequency: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """int64 (n, labels) of 0 and 1: NO_FINDING of the rows empty, each label at its frequency."""
    labels = np.zeros((n, len(frequency)), dtype=np.int64)
    found = rng.permutation(n)[: n - round(n * NO_FINDING)]
    count = np.maximum(np.round(n * frequency).astype(int), max(1, round(RAREST * n)))
    for label, times in enumerate(count):
        labels[rng.permutation(found)[:times], label] = 1
    labels[found[~labels[found].any(1)], int(frequency.argmax())] = 1  # else it has no finding
    return labels


@cache
def marks() -> np.ndarray:
    """The kinds of marks, float32 (MARKS, 5, 5): mean 0, energy 1, unlike at every shift."""
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
    shown, noisy = labels.copy(), rng.random(n) < LABEL_NOISE
    shown[noisy] = labels[rng.permutation(n)][noisy]
    field = _scatter(_mixtures(spec, shown), mask, rng)
    picture = base + (column(rng, n, 0.8, 1.2) * AMPLITUDE * field)[..., None]
    picture = (picture - 0.5) * column(rng, n, 0.8, 1.1, 1) + 0.5 + column(rng, n, -0.08, 0.08, 1)
    picture = picture + rng.normal(0, 1, picture.shape) * column(rng, n, 0.01, 0.04, 1)
    done = np.clip(np.round(picture * 255), 0, 255).astype(np.uint8)
    return done if spec.n_channels == 3 else done[..., 0]


def _scatter(mixture: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Marks at random places apart from each other, inside the mask as far as there is room."""
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
