"""When does a VLM win? All methods at 1, 10 and 100 % of the study's training images.

At least one image of every class is kept; validation and test parts stay whole.
"""

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from bench.suites import Context, Outcome

if TYPE_CHECKING:
    from vitask.data.spec import Dataset
    from vitask.recipes import Recipe

STUDY = True
PERCENT = (1, 10, 100)
KINDS = {
    "tsm": "the task-specific model",
    "vanilla": "Van alone",
    "vitask_without_ep": "VITask, answering alone",
    "vitask_with_ep": "VITask, answering with the exemplar",
}
METHODS = {
    f"{kind}_{percent}": f"{text}, {percent} % of the training images"
    for percent in PERCENT
    for kind, text in KINDS.items()
}
REFERENCE = {
    f"{kind}_{percent}": f"vanilla_{percent}"
    for percent in PERCENT
    for kind in KINDS
    if kind != "vanilla"
}
PUBLISHED = None
PUBLISHED_NOTE = ""


def units(recipe: "Recipe") -> float:
    from bench.work import SCORING, specialist_units, tuning_units
    from vitask.recipes import vanilla

    whole = tuning_units(recipe) + tuning_units(vanilla(recipe)) + specialist_units(recipe)
    return whole * len(PERCENT) + SCORING * len(METHODS)


def run(context: Context, seed: int, wanted: Collection[str]) -> Iterator[Outcome]:
    from bench.work import Work
    from vitask.recipes import vanilla

    work, recipe = Work(context, seed), context.recipe
    for percent in PERCENT:
        asked = {kind for kind in KINDS if f"{kind}_{percent}" in wanted}
        if not asked:
            continue
        whole = percent == 100
        datasets = context.datasets if whole else _part(context.datasets, percent)
        end = "" if whole else f"-{percent}percent"
        specialist = work.specialist(recipe, datasets, name=f"tsm{end}")
        if "tsm" in asked:
            predictions = work.classify(specialist.model)
            yield work.answers(f"tsm_{percent}", predictions, specialist.note)
        if "vanilla" in asked:
            plain = work.tuned(vanilla(recipe), name=f"vanilla{end}", datasets=datasets)
            predictions = work.predict(plain.model)
            yield work.answers(f"vanilla_{percent}", predictions, plain.note)
        if asked & {"vitask_without_ep", "vitask_with_ep"}:
            tuned = work.tuned(recipe, specialist, name=f"vitask{end}", datasets=datasets)
            pair = (f"vitask_without_ep_{percent}", f"vitask_with_ep_{percent}")
            yield from work.both_ways(tuned, pair, wanted)


def _part(datasets: "dict[str, Dataset]", percent: int) -> "dict[str, Dataset]":
    from vitask.data import subset

    found = {}
    for name, dataset in datasets.items():
        images = len(dataset.splits["train"]) * percent // 100
        found[name] = subset(dataset, train=max(images, len(dataset.spec.classes)))
    return found
