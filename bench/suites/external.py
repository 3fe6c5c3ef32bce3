"""The paper's table 3: how do the models answer images of other clinics?

They are trained on RetinaMNIST and tested on photographs of other clinics.
`vitask_plug` replaces the task-specific model by one that was trained on the external set's own
training split; nothing else is tuned. `referable_auc` is the AUC of grade 2 or more.
"""

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.runs.work import Work
from bench.stats.items import Items, Values
from bench.stats.metrics import binary_auc
from bench.suite import FOUR, Method, Metric, Names, Outcome, Published, Suite, Training, pick
from vitask.checkpoint import VITask
from vitask.data import external
from vitask.data.spec import Dataset
from vitask.data.subset import subset
from vitask.score import Prediction

if TYPE_CHECKING:
    from bench.runs.plan import Plan

TRAINED = "retinamnist"
REFERABLE = 2  # grade from which a patient is referred


class External(Suite):
    name = "external"
    methods = (
        *FOUR,
        Method("vitask_plug", "VITask with a TSM of the external set plugged in", "vanilla"),
    )
    metrics = (
        *pick("macro_f1", "accuracy", "auc", "qwk"),
        Metric("referable_auc", "AUC of grade 2 or more (referable)", ranks=("probability",)),
    )
    published = Published(
        "vitask_table3_external.csv",
        "Bai et al. 2024, table 3: InternVL2-2B at 224 pixels, whole external sets.",
    )

    def trained_on(self, study: Names, whole: Names) -> Names:
        return (TRAINED,)

    def lacking(self, plan: "Plan") -> str | None:
        if external.names(plan.source, plan.roots):
            return None
        looked = ", ".join(map(str, plan.roots)) or "no data root"
        return (
            f"none of the folders {', '.join(external.READERS)} is in {looked}; "
            "bench/suites/external.md says what they hold"
        )

    def evaluated(self, plan: "Plan", datasets: dict[str, Dataset]) -> dict[str, Dataset]:
        """The external sets in the data roots."""
        size, retina, found = plan.recipe.source_size, datasets[TRAINED].spec, {}
        for name in external.names(plan.source, plan.roots):
            dataset = external.load(name, retina, source=plan.source, roots=plan.roots, size=size)
            limit = plan.limit
            found[name] = subset(dataset, train=limit, val=limit, test=limit)
        return found

    def measured(self, values: Values, weights: np.ndarray) -> dict[str, np.ndarray]:
        """AUC of the probability of grade 2 or more."""
        truth = values["referable"] == 1
        return {"referable_auc": binary_auc(values["probability"], truth, weights.T)}

    def run(self, work: Work, wanted: Collection[str]) -> Iterator[Outcome]:
        for outcome in work.by_model(self, wanted):
            yield _with_referable(work, outcome)
        if "vitask_plug" in wanted:
            models = self.models(work.recipe)
            vitask = work.tuned(models["vitask"], work.tsm(models["tsm"]))
            predictions, logs = _plugged(work, vitask.model, models["tsm"])
            outcome = work.outcome("vitask_plug", predictions, vitask.note)
            extras = outcome.extras | {"training of the plugged TSM": logs}
            yield _with_referable(work, replace(outcome, extras=extras))


def _plugged(
    work: Work, model: VITask, training: Training
) -> tuple[list[Prediction], dict[str, Any]]:
    """Each external set with its own task-specific model, and the logs of their trainings."""
    done, logs = [], {}
    for name, dataset in work.evaluated.items():
        of_set = replace(training, name=f"tsm-{name}")
        tsm = work.tsm(of_set, {name: dataset}, planned=False)
        logs[name] = tsm.note["log"]
        plugged = model.plug(tsm.model)
        features = work.exemplar(tsm.model, of_set)(name, "test")
        tokens = plugged.tokens(work.image(name, "test"), features)
        written = plugged.write(name, tokens)
        done.append(Prediction(name, "candidates", plugged.score(name, tokens), written))
    return done, logs


def _with_referable(work: Work, outcome: Outcome) -> Outcome:
    items = {}
    for prediction in outcome.predictions:
        labels = work.evaluated[prediction.dataset].splits["test"].labels
        log_p = prediction.log_probability
        p = np.exp(log_p - np.logaddexp.reduce(log_p, axis=1, keepdims=True))
        referable = (labels >= REFERABLE).astype(float)
        items[prediction.dataset] = Items(
            {"probability": p[:, REFERABLE:].sum(1), "referable": referable}
        )
    return replace(outcome, items=items)


SUITE = External()
