"""With how many training images does a VLM win?

All methods train on 1, 10 and 100 % of the study's training images.
At least one image of every class is kept. Validation and test splits stay whole.
"""

from dataclasses import replace

from bench.suite import FOUR, Method, Suite, Training, tsm_vanilla_vitask
from vitask.recipes import Recipe

PERCENT = (1, 10, 100)


class DataFraction(Suite):
    name = "data_fraction"
    methods = tuple(
        Method(
            f"{one.name}_{percent}",
            f"{one.text}, {percent} % of the training images",
            against=one.against and f"{one.against}_{percent}",
            model=f"{one.model}_{percent}",
            exemplar=one.exemplar,
        )
        for percent in PERCENT
        for one in FOUR
    )

    def models(self, recipe: Recipe) -> dict[str, Training]:
        return {
            f"{kind}_{percent}": replace(
                training,
                name=kind if percent == 100 else f"{kind}-{percent}percent",
                tsm=f"tsm_{percent}",
                share=percent / 100,
            )
            for percent in PERCENT
            for kind, training in tsm_vanilla_vitask(recipe).items()
        }


SUITE = DataFraction()
