"""Images, labels, classes, modality, splits and per-image ids: one form from every source."""

from vitask.data.loading import SOURCES, load, names, spec, specs
from vitask.data.spec import SPLITS, TASKS, Dataset, DatasetSpec, Split
from vitask.data.subset import subset

__all__ = [
    "SOURCES",
    "SPLITS",
    "TASKS",
    "Dataset",
    "DatasetSpec",
    "Split",
    "load",
    "names",
    "spec",
    "specs",
    "subset",
]
