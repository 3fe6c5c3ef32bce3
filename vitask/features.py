"""Frozen features of every image: computed once, cached, shared by all branches and methods."""

import shutil
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vitask.data.images import unmistakable
from vitask.data.spec import Dataset
from vitask.files import part_folder

CHUNK = 1024  # images computed at once when their features go to disk


class Features:
    """Features of the splits of some datasets, on the CPU.

    compute: uint8 images (n, h, w[, 3]) -> (n, ...) of a frozen model, without augmentation
    memory_mib: memory for all of them together; splits that do not fit go to files under `folder`
        (None: the system's temporary folder), which are memory-mapped. The files are deleted with
        this object.
    """

    def __init__(
        self,
        datasets: Mapping[str, Dataset],
        compute: Callable[[np.ndarray], Tensor],
        *,
        memory_mib: float | int = float("inf"),
        folder: Path | None = None,
    ) -> None:
        self._datasets = datasets
        self._compute = compute
        self._cached: dict[tuple[str, str], Tensor] = {}
        self._left = memory_mib * 2**20
        self._place = folder
        self._files: str | None = None

    def __call__(self, dataset: str, split: str) -> Tensor:
        """Features of a split, "train", "val" or "test", in the order of its images: (n, ...)."""
        key = (dataset, split)
        if key not in self._cached:
            images = self._datasets[dataset].splits[split].images
            one = self._compute(images[:1])
            size = one.nbytes * len(images)
            if size <= self._left:
                self._left -= size
                self._cached[key] = self._compute(unmistakable(images))
            else:
                self._cached[key] = self._on_disk(f"{dataset}-{split}", images, one)
        return self._cached[key]

    def _on_disk(self, name: str, images: np.ndarray, one: Tensor) -> Tensor:
        """Features computed in chunks, straight into a memory-mapped file."""
        if self._files is None:
            self._files = str(part_folder(self._place, "features"))
            weakref.finalize(self, shutil.rmtree, self._files, ignore_errors=True)
        shape = (len(images), *one.shape[1:])
        path = str(Path(self._files) / name)
        mapped = torch.from_file(path, shared=True, size=int(np.prod(shape)), dtype=one.dtype)
        mapped = mapped.view(shape)
        for start in range(0, len(images), CHUNK):
            chunk = unmistakable(images[start : start + CHUNK])
            mapped[start : start + CHUNK] = self._compute(chunk)
        return mapped


class Joined:
    """Several tensors (n, ...) that read as one; only the requested rows are copied."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self._parts = list(parts)
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, rows: Sequence[int] | np.ndarray | Tensor) -> Tensor:
        """The rows with these numbers, (len(rows), ...)."""
        numbers = np.asarray(rows)
        part = np.searchsorted(self._ends, numbers, side="right")
        starts = self._ends - [len(p) for p in self._parts]
        found = [self._parts[p][n - starts[p]] for p, n in zip(part, numbers, strict=True)]
        return torch.stack(found)
