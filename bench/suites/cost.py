"""What does each method cost in parameters, time and memory?

Seconds and memory depend on this machine and differ from run to run. Seconds are those of the run
that trained the model, here or in an earlier suite, without the frozen image features that all
methods share. Training of VITask includes its task-specific model's. Images per second include
every model that an answer needs, from pixels to class scores.
"""

import statistics
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from bench.runs.work import Tuned, Work
from bench.suite import FOUR, Metric, Outcome, Suite
from vitask.data.images import unmistakable
from vitask.parameters import parameters

MEASURED = ("training_seconds", "training_peak_mib", "images_per_second")
ROUNDS = 5
IMAGES = 128  # of the first dataset's test split, whose answers are timed
Answer = Callable[["np.ndarray"], Any]


class Cost(Suite):
    name = "cost"
    methods = tuple(replace(one, against=None) for one in FOUR)
    metrics = (
        Metric("parameters_trained", "Parameters that are trained"),
        Metric("parameters_total", "Parameters that an answer needs"),
        Metric("training_seconds", "Seconds of training"),
        Metric("training_peak_mib", "Peak memory of training beyond that held before, MiB"),
        Metric("images_per_second", "Images per second, from pixels to class scores"),
    )
    scorings = 0.0  # no test split is scored

    def run(self, work: Work, wanted: Collection[str]) -> Iterator[Outcome]:
        models = self.models(work.recipe)
        tsm = work.tsm(models["tsm"])
        name, dataset = next(iter(work.evaluated.items()))
        tuned: dict[str, Tuned] = {}
        costs: dict[str, dict[str, float]] = {}
        notes: dict[str, list[dict[str, Any]]] = {}
        answers: dict[str, Answer] = {}
        for method in (m.name for m in self.methods if m.name in wanted):
            if method == "tsm":
                notes[method], exemplar, model = [tsm.note], False, None
                answers[method] = partial(tsm.model.log_probabilities, spec=dataset.spec)
            else:
                kind, exemplar = method.partition("_")[0], method == "vitask_with_ep"
                if kind not in tuned:
                    tuned[kind] = work.tuned(models[kind], tsm)
                model = tuned[kind].model
                notes[method] = [tuned[kind].note, *([tsm.note] if kind == "vitask" else [])]
                answers[method] = partial(model.predict, name, exemplar=exemplar)
            costs[method] = parameters(model, tsm.model, exemplar=exemplar)
        rates = _rates(answers, unmistakable(dataset.splits["test"].images[:IMAGES]))
        for method, values in costs.items():
            values["training_seconds"] = sum(note["seconds"] for note in notes[method])
            values["training_peak_mib"] = max(note["peak_mib"] for note in notes[method])
            values["images_per_second"] = rates[method]
            extras = {"changed": notes[method][0]["changed"]}
            yield Outcome(method, [], extras, values={"all datasets": values}, measured=MEASURED)


def _rates(answers: dict[str, Answer], images: np.ndarray) -> dict[str, float]:
    """Images per second of each: the median of rounds in which all take their turn."""
    seconds: dict[str, list[float]] = {method: [] for method in answers}
    for number in range(ROUNDS + 1):
        for method, answer in answers.items():
            start = time.perf_counter()
            answer(images)
            if number > 0:  # the first warms up
                seconds[method].append(time.perf_counter() - start)
    return {method: len(images) / statistics.median(taken) for method, taken in seconds.items()}


SUITE = Cost()
