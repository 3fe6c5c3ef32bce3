"""An outcome -> what its record says: metrics, confusion matrices, candidates, items."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bench.stats.items import Items, points
from bench.stats.metrics import confusion, measure
from bench.suite import Outcome, Suite
from vitask.data.spec import Dataset
from vitask.decision import scored
from vitask.prompts import Candidates, candidates


@dataclass
class Judged:
    """By dataset. `varying`: values that differ from run to run."""

    metrics: dict[str, dict[str, float | None]] = field(default_factory=dict)
    confusion: dict[str, list[list[int]]] = field(default_factory=dict)
    candidates: dict[str, dict[str, Any]] = field(default_factory=dict)  # multi-label alone
    items: dict[str, dict[str, Any]] = field(default_factory=dict)
    varying: dict[str, dict[str, float]] = field(default_factory=dict)


def judge(suite: Suite, outcome: Outcome, datasets: Mapping[str, Dataset]) -> Judged:
    """Everything that an outcome says of the test images."""
    found = Judged()
    for prediction in outcome.predictions:
        name, dataset = prediction.dataset, datasets[prediction.dataset]
        test = dataset.splits["test"].labels
        known = candidates(dataset.spec, dataset.splits["train"].labels)
        if dataset.spec.multi_label:
            found.candidates[name] = candidates_card(known, test)
        data = scored(
            dataset.spec, test, prediction, known,
            threshold=outcome.thresholds.get(name), groups=dataset.splits["test"].groups,
        )  # fmt: skip
        found.metrics[name] = plain(measure(data))
        found.confusion[name] = confusion(data)
    for name, items in outcome.items.items():
        found.items[name] = items.card()
        own = plain(points(Items.of(found.items[name]), suite.measured))
        found.metrics[name] = found.metrics.get(name, {}) | own
    for name, values in outcome.values.items():
        own = {k: float(v) for k, v in values.items() if k not in outcome.measured}
        found.metrics[name] = found.metrics.get(name, {}) | own
        if varying := {k: float(v) for k, v in values.items() if k in outcome.measured}:
            found.varying[name] = varying
    return found


def plain(metrics: Mapping[str, np.ndarray]) -> dict[str, float | None]:
    """Point values rounded to 12 digits (far below any meaning), None for NaN."""
    values = {name: float(value[0]) for name, value in metrics.items()}
    return {name: None if v != v else round(v, 12) for name, v in values.items()}


def candidates_card(known: Candidates, labels: np.ndarray) -> dict[str, Any]:
    """Candidates of a multi-label dataset, and the share of test images whose labels they hold."""
    return known.card() | {"coverage": known.coverage(labels)}
