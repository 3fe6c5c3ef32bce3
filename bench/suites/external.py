"""The paper's table 3: trained on RetinaMNIST, tested on photographs of other clinics.

`vitask_plug` puts a task-specific model that was trained on the external set's own training part
in the place of the first; nothing else is tuned. `referable_auc` is the AUC of grade 2 or more.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.suites import Context, Outcome

if TYPE_CHECKING:
    from bench.plan import Plan
    from bench.work import Work
    from vitask.checkpoint import VITask
    from vitask.data.spec import Dataset
    from vitask.recipes import Recipe
    from vitask.score import Prediction

Names = tuple[str, ...]
STUDY = True
METHODS = {
    "tsm": "the task-specific model, trained on RetinaMNIST",
    "vanilla": "Van alone",
    "vitask_without_ep": "VITask, answering alone",
    "vitask_with_ep": "VITask, answering with the exemplar",
    "vitask_plug": "VITask with a task-specific model of the external set plugged in",
}
REFERENCE = "vanilla"
PUBLISHED = "vitask_table3_external.csv"
PUBLISHED_NOTE = """\
Bai et al. 2024, table 3: InternVL2-2B at 224 pixels, whole external sets."""
RANKED = {"referable_auc": ("probability",)}
TABLES = {
    "macro_f1": "Macro-F1, by constrained scoring",
    "accuracy": "Accuracy, by constrained scoring",
    "auc": "AUC, as MedMNIST's evaluator computes it",
    "qwk": "Quadratic weighted kappa",
    "referable_auc": "AUC of referable retinopathy (grade 2 or more)",
}
TRAINED = "retinamnist"
REFERABLE = 2  # grade from which on a patient is referred


def trained_on(study: Names, whole: Names) -> Names:
    return (TRAINED,)


def unavailable(plan: "Plan") -> str | None:
    from vitask.data import external

    if external.names(plan.source, plan.roots):
        return None
    looked = ", ".join(map(str, plan.roots)) or "no data root"
    return (
        f"none of the folders {', '.join(external.READERS)} lies in {looked}; "
        "vitask/data/external.py says what they hold"
    )


def evaluated(plan: "Plan", datasets: "dict[str, Dataset]") -> "dict[str, Dataset]":
    """The external sets that lie in the data roots."""
    from vitask.data import external, subset

    size, retina, found = plan.recipe.source_size, datasets[TRAINED].spec, {}
    for name in external.names(plan.source, plan.roots):
        found[name] = external.load(name, retina, source=plan.source, roots=plan.roots, size=size)
        if plan.limit is not None:
            found[name] = subset(found[name], train=plan.limit, val=plan.limit, test=plan.limit)
    return found


def units(recipe: "Recipe") -> float:
    from bench.work import SCORING, specialist_units, tuning_units
    from vitask.recipes import vanilla

    tuning = tuning_units(recipe) + tuning_units(vanilla(recipe))
    return tuning + specialist_units(recipe) + SCORING * len(METHODS)


def run(context: Context, seed: int, wanted: Collection[str]) -> Iterator[Outcome]:
    from bench.work import Work
    from vitask.recipes import vanilla

    work, recipe = Work(context, seed), context.recipe
    specialist = work.specialist()
    if "tsm" in wanted:
        answered = work.answers("tsm", work.classify(specialist.model), specialist.note)
        yield _with_referable(work, answered)
    if "vanilla" in wanted:
        plain = work.tuned(vanilla(recipe), name="vanilla")
        answered = work.answers("vanilla", work.predict(plain.model), plain.note)
        yield _with_referable(work, answered)
    if {"vitask_without_ep", "vitask_with_ep", "vitask_plug"} & set(wanted):
        tuned = work.tuned(recipe, specialist, name="vitask")
        for answered in work.both_ways(tuned, ("vitask_without_ep", "vitask_with_ep"), wanted):
            yield _with_referable(work, answered)
        if "vitask_plug" in wanted:
            predictions, logs = _plugged(work, tuned.model)
            answered = work.answers("vitask_plug", predictions, tuned.note)
            extras = answered.extras | {"tuning of what is plugged in": logs}
            yield _with_referable(work, replace(answered, extras=extras))


def _plugged(work: "Work", model: "VITask") -> "tuple[list[Prediction], dict[str, Any]]":
    """Each external set with its own task-specific model, and how those trainings went."""
    from vitask.score import Prediction

    done, logs = [], {}
    for name, dataset in work.context.evaluated.items():
        own = work.specialist(datasets={name: dataset}, name=f"tsm-{name}", planned=False)
        logs[name] = own.note["log"]
        plugged = model.plug(own.model)
        tokens = plugged.tokens(work.image(name, "test"), work.exemplar(own.model)(name, "test"))
        written = plugged.write(name, tokens)
        done.append(Prediction(name, "candidates", plugged.score(name, tokens), written))
    return done, logs


def _with_referable(work: "Work", answered: Outcome) -> Outcome:
    from bench.items import Items

    items = {}
    for prediction in answered.predictions:
        labels = work.context.evaluated[prediction.dataset].splits["test"].labels
        log_p = prediction.log_probability
        p = np.exp(log_p - np.logaddexp.reduce(log_p, axis=1, keepdims=True))
        probability = {"probability": p[:, REFERABLE:].sum(1), "referable": labels >= REFERABLE}
        items[prediction.dataset] = Items(
            {name: np.asarray(value, dtype=float) for name, value in probability.items()}
        )
    return replace(answered, items=items)


def measured(values: Mapping[str, np.ndarray], weights: np.ndarray) -> dict[str, np.ndarray]:
    """AUC of the probability of grade 2 or more."""
    from bench.metrics import binary_auc

    return {"referable_auc": binary_auc(values["probability"], values["referable"] == 1, weights.T)}
