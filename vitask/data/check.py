"""Find images in two splits, or with two labels.

Images are compared by the hash of their pixel bytes, so only exact copies are found, not copies
that were resized or compressed again.
"""

import hashlib
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from vitask.data.spec import SPLITS, Dataset


@dataclass(frozen=True)
class Duplicates:
    """Sets of ids of identical images in one dataset. Ids of a set are in order of the splits.

    across:      identical images in two or more splits, such as test images in training
    within:      identical images inside one split, and in no other
    conflicting: identical images with different labels, in the same split or not
    groups:      groups (patients, lesions) with images in two or more splits
    """

    dataset: str
    across: tuple[tuple[str, ...], ...]
    within: tuple[tuple[str, ...], ...]
    conflicting: tuple[tuple[str, ...], ...]
    groups: tuple[str, ...]

    @property
    def clean(self) -> bool:
        """No image and no group is in two splits, and no labels conflict."""
        return not (self.across or self.conflicting or self.groups)

    def lines(self, show: int = 3) -> list[str]:
        """The report as text, with the first few of each kind."""
        kinds = {
            "image(s) in two splits": self.across,
            "image(s) that occur twice within a split": self.within,
            "image(s) with conflicting labels": self.conflicting,
            "group(s) in two splits": tuple((group,) for group in self.groups),
        }
        done = []
        for kind, found in kinds.items():
            done.append(f"{self.dataset}: {len(found)} {kind}")
            done.extend("    " + " = ".join(same) for same in found[:show])
            if len(found) > show:
                done.append(f"    and {len(found) - show} more")
        return done


def duplicates(dataset: Dataset) -> Duplicates:
    """Identical images across and within splits, their conflicting labels, and torn groups."""
    places = defaultdict(list)  # hash of the pixels -> (split, id, label bytes)
    for split in SPLITS:
        found = dataset.splits[split]
        for image, label, name in zip(found.images, found.labels, found.ids, strict=True):
            pixels = np.ascontiguousarray(image).tobytes()
            places[hashlib.sha256(pixels).digest()].append((split, str(name), label.tobytes()))
    copies = [same for same in places.values() if len(same) > 1]
    torn = [same for same in copies if len({split for split, _, _ in same}) > 1]
    return Duplicates(
        dataset=dataset.spec.name,
        across=_ids(torn),
        within=_ids([same for same in copies if len({split for split, _, _ in same}) == 1]),
        conflicting=_ids([same for same in copies if len({label for _, _, label in same}) > 1]),
        groups=torn_groups(dataset),
    )


def torn_groups(dataset: Dataset) -> tuple[str, ...]:
    """Groups (patients, lesions) with images in two or more splits."""
    splits = defaultdict(set)
    for split in SPLITS:
        groups = dataset.splits[split].groups
        for group in () if groups is None else np.unique(groups):
            splits[str(group)].add(split)
    return tuple(group for group, found in splits.items() if len(found) > 1)


def _ids(found: list[list[tuple[str, str, bytes]]]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(name for _, name, _ in same) for same in found)
