"""With how many training images does a VLM win?

All methods train on 1, 10 and 100 % of the study's training images.
At least one image of every class is kept. Validation and test splits stay whole.
"""

from collections.abc import Collection, Iterator
from dataclasses import replace

from bench.runs.work import Work
from bench.suite import KINDS, Method, Outcome, Suite, Training, tsm_vanilla_vitask
from vitask.data.spec import Dataset
from vitask.data.subset import subset
from vitask.recipes import Recipe

PERCENT = (1, 10, 100)


class DataFraction(Suite):
    name = "data_fraction"
    methods = tuple(
        Method(
            f"{kind}_{percent}",
            f"{text}, {percent} % of the training images",
            against=None if kind == "vanilla" else f"vanilla_{percent}",
        )
        for percent in PERCENT
        for kind, text in KINDS.items()
    )

    def models(self, recipe: Recipe) -> dict[str, Training]:
        return {
            f"{kind}_{percent}": replace(
                training,
                name=kind if percent == 100 else f"{kind}-{percent}percent",
                share=percent / 100,
            )
            for percent in PERCENT
            for kind, training in tsm_vanilla_vitask(recipe).items()
        }

    def run(self, work: Work, wanted: Collection[str]) -> Iterator[Outcome]:
        models = self.models(work.recipe)
        for percent in PERCENT:
            pair = (f"vitask_without_ep_{percent}", f"vitask_with_ep_{percent}")
            alone, plain = f"tsm_{percent}", f"vanilla_{percent}"
            if not {alone, plain, *pair} & set(wanted):
                continue
            datasets = work.datasets if percent == 100 else fraction(work.datasets, percent)
            if {alone, *pair} & set(wanted):
                tsm = work.tsm(models[alone], datasets)
            if alone in wanted:
                yield work.outcome(alone, work.classify(tsm.model), tsm.note)
            if plain in wanted:
                vanilla = work.tuned(models[plain], datasets=datasets)
                yield work.outcome(plain, work.predict(vanilla.model), vanilla.note)
            if {*pair} & set(wanted):
                vitask = work.tuned(models[f"vitask_{percent}"], tsm, datasets)
                yield from work.both_ways(vitask, pair, wanted)


def fraction(datasets: dict[str, Dataset], percent: int) -> dict[str, Dataset]:
    """So many percent of the training images, at least as many as there are classes."""
    found = {}
    for name, dataset in datasets.items():
        images = len(dataset.splits["train"]) * percent // 100
        found[name] = subset(dataset, train=max(images, len(dataset.spec.classes)))
    return found


SUITE = DataFraction()
