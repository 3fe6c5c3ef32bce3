"""Frozen features of every image: computed once, kept, shared by all branches and methods."""

from collections.abc import Callable, Mapping

import numpy as np
from torch import Tensor

from vitask.data.spec import Dataset


class Features:
    """Features of the parts of some datasets, in memory, on the CPU.

    compute: uint8 images (n, h, w[, 3]) -> (n, ...) of a frozen model, without augmentation
    """

    def __init__(
        self, datasets: Mapping[str, Dataset], compute: Callable[[np.ndarray], Tensor]
    ) -> None:
        self._datasets = datasets
        self._compute = compute
        self._kept: dict[tuple[str, str], Tensor] = {}

    def __call__(self, dataset: str, part: str) -> Tensor:
        """Features of a part ("train", "val", "test"), in the order of its images."""
        key = (dataset, part)
        if key not in self._kept:
            self._kept[key] = self._compute(self._datasets[dataset].splits[part].images)
        return self._kept[key]
