"""The answers that records were scored by, read from the samples beside them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from bench.runs.records import Record, Samples, read_samples, samples_path
from bench.stats.resampling import bootstrap_weights, swaps
from bench.suite import Suite
from vitask.data.spec import DatasetSpec
from vitask.decision import Scored, scored
from vitask.prompts import Candidates


class Answers:
    """Answers to the test images of some records of a suite.

    samples: record's name -> dataset -> its samples
    """

    def __init__(
        self,
        samples: Mapping[str, Mapping[str, Samples]],
        specs: Mapping[str, DatasetSpec],
        suite: Suite,
    ) -> None:
        self.samples, self.specs, self.suite = samples, specs, suite

    @classmethod
    def read(cls, folder: Path, records: Sequence[Record], suite: Suite) -> "Answers":
        """From the folder of the records."""
        samples = {r.name: read_samples(samples_path(folder, r.name)) for r in records}
        return cls(samples, records[0].specs, suite)

    def scored(self, record: Record, dataset: str) -> Scored:
        """The record's answers to a dataset, ready to be measured."""
        spec, sample = self.specs[dataset], self.samples[record.name][dataset]
        known = None
        if spec.multi_label:
            known = Candidates.of_card(record.candidates[dataset], len(spec.classes))
        threshold = record.thresholds.get(dataset)
        return scored(
            spec, sample.labels, sample.prediction, known, threshold=threshold, groups=sample.groups
        )

    def weights(self, dataset: str) -> np.ndarray:
        """How often each image of a dataset is drawn, uint16 (2000, n)."""
        return bootstrap_weights(*self._drawn(dataset))

    def swaps(self, dataset: str) -> np.ndarray:
        """Which images of a dataset change method, bool (2000, n)."""
        return swaps(*self._drawn(dataset))

    def _drawn(self, dataset: str) -> tuple[str, int, np.ndarray | None]:
        sample = next(own[dataset] for own in self.samples.values() if dataset in own)
        return self.suite.images_of(dataset), len(sample.labels), sample.groups
