"""The form of every dataset, from every source: its description, its splits, its images."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vitask.errors import InputError
from vitask.names import check_answers, check_line, check_writable

TASKS = ("multi-class", "binary-class", "ordinal-regression", "multi-label, binary-class")
SPLITS = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """A classification task, as its publisher describes it.

    ValueError for a value that does not fit. Names of classes, and finer answers, must differ in
    the form in which written answers are compared (`vitask.names.canonical`). A name may end with
    a period, and blanks at its ends are kept.
    """

    name: str
    task: str  # one of TASKS, medmnist's strings
    classes: tuple[str, ...]  # index = label in the file; text = the answer the model must give
    modality: str  # fills {modality} in the instruction
    n_channels: int  # 1 | 3
    n_samples: dict[str, int]  # by split, of the whole published set
    license: str
    source: str  # where all of these can be checked
    head: str  # the TSM's head: "organ" for OrganA, C and S, else the set's name
    # If the question has finer answers than the set has labels: each answer and its label.
    answers: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        where = f"dataset {self.name!r}"
        if self.task not in TASKS:
            raise InputError(f"{where}: task is {self.task!r}; expected one of {list(TASKS)}")
        if self.n_channels not in (1, 3):
            raise InputError(f"{where}: n_channels is {self.n_channels!r}; expected 1 or 3")
        if len(self.classes) < 2:
            raise InputError(
                f"{where}: classes are {list(self.classes)}; expected two or more different names"
            )
        if self.task == "binary-class" and len(self.classes) != 2:
            raise InputError(f"{where}: {len(self.classes)} classes in a binary-class task")
        check_answers(where, self.classes, self.answers, multi_label=self.multi_label)
        check_line(f"{where}: modality", self.modality)
        for what in ("name", "license", "source", "head"):
            check_writable(f"{where}: {what}", getattr(self, what))
        if tuple(sorted(self.n_samples)) != tuple(sorted(SPLITS)):
            raise InputError(
                f"{where}: n_samples has {sorted(self.n_samples)}; expected {list(SPLITS)}"
            )

    @classmethod
    def of_json(cls, card: Mapping[str, Any]) -> "DatasetSpec":
        """The description whose `dataclasses.asdict` was written as JSON."""
        answers = tuple((text, label) for text, label in card.get("answers", ()))
        return cls(**{**card, "classes": tuple(card["classes"]), "answers": answers})

    @property
    def multi_label(self) -> bool:
        """Whether an image may have several labels, or none."""
        return self.task.startswith("multi-label")


@dataclass(frozen=True)
class Split:
    """The images of one split, in the order of their source.

    images: uint8 (n, h, w) or (n, h, w, 3)
    labels: int64 (n,), or (n, classes) of 0 and 1 for multi-label
    ids:    str (n,), equal in every subset, such as "breastmnist/test/000012", the place in the
            source, or "idrid/test/0c1d2e3f4a5b", a digest of the file's name
    groups: str (n,) or None, digest of the patient or lesion, whose images must be in one split
    """

    images: np.ndarray
    labels: np.ndarray
    ids: np.ndarray
    groups: np.ndarray | None = None

    def __post_init__(self) -> None:
        sizes = {len(a) for a in (self.images, self.labels, self.ids)}
        if self.groups is not None:
            sizes.add(len(self.groups))
        assert len(sizes) == 1, f"images, labels, ids and groups differ in length: {sizes}"

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: np.ndarray | Sequence[int]) -> "Split":
        """The images at these indices, in this order."""
        at = np.asarray(indices, dtype=np.int64)
        groups = None if self.groups is None else self.groups[at]
        return Split(self.images[at], self.labels[at], self.ids[at], groups)


@dataclass(frozen=True)
class Dataset:
    """A dataset with its images.

    size:   side of the source images in pixels
    source: "medmnist" | "card" | "phantom" | "external"
    md5:    of the file, or for phantom of all images and labels
    md5_ok: False for an official set whose file has another MD5 and was admitted
    notes:  what the user must know about the reading of its files
    """

    spec: DatasetSpec
    splits: dict[str, Split]
    size: int
    source: str
    md5: str
    md5_ok: bool
    notes: tuple[str, ...] = ()

    def identity(self, splits: Sequence[str] = SPLITS) -> list[Any]:
        """What decides a model or a score: description and content of some splits.

        The content enters by ids, labels and groups: a limit draws other images of the same file.
        """
        spec, digests = self.spec, []
        for split in (self.splits[name] for name in splits):
            digest = hashlib.sha256("\n".join(split.ids.tolist()).encode())
            digest.update(split.labels.tobytes())
            groups = () if split.groups is None else split.groups.tolist()
            digest.update("\n".join(groups).encode())
            digests.append(digest.hexdigest()[:16])
        described = [spec.task, spec.n_channels, spec.head, *spec.classes, *map(list, spec.answers)]
        return [self.source, self.size, self.md5, *described, *digests]

    def card(self) -> dict[str, Any]:
        """Source, description and sizes, JSON-able."""
        return {
            "source": self.source,
            "size": self.size,
            "md5": self.md5,
            "md5_ok": self.md5_ok,
            "license": self.spec.license,
            "spec": asdict(self.spec),
            "images": {name: len(split) for name, split in self.splits.items()},
        }


def ids(name: str, split: str, count: int) -> np.ndarray:
    """Image ids, str (count,), such as "breastmnist/test/000012"."""
    return np.array([f"{name}/{split}/{i:06d}" for i in range(count)], dtype=np.str_)
